package profile_test

import (
	"archive/zip"
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"accel/profile"
)

// wants compares the files of a prediction, in order.
func wants(t *testing.T, files map[string]string, s profile.Start, want string) {
	t.Helper()
	got := predicted(t, imageOf(t, files), s)
	if g, w := strings.Join(got, " "), strings.Join(strings.Fields(want), " "); g != w {
		t.Errorf("%v\n got %s\nwant %s", s.Cmd, g, w)
	}
}

func TestPredictPython(t *testing.T) {
	const lib, site, ext = "usr/local/lib/python3.12/", "usr/local/lib/python3.12/site-packages/", ".cpython-312-x86_64-linux-gnu.so"
	files := map[string]string{
		"usr/local/bin/python3.12": elf{}.String(), "usr/local/bin/python3": "-> python3.12", "usr/local/bin/python": "-> python3",
		lib + "encodings/__init__.py": "import codecs\nfrom . import aliases", lib + "encodings/__pycache__/__init__.cpython-312.pyc": "c1",
		lib + "encodings/aliases.py": "", lib + "encodings/utf_8.py": "utf8", lib + "codecs.py": "import builtins, _codecs\nimport site", lib + "site.py": "import os", lib + "os.py": "import stat\ndef f():\n    import never\n",
		lib + "never.py": "never", lib + "json/__init__.py": "from .decoder import JSONDecoder", lib + "json/decoder.py": "from json import scanner", lib + "json/scanner.py": "scan", lib + "json/tool.py": "tool",
		lib + "json/__pycache__/decoder.cpython-312.pyc": "dec", lib + "json/__pycache__/decoder.cpython-311.pyc": "old",
		lib + "lib-dynload/_math" + ext: elf{needed: []string{"libm.so"}}.String(), "lib/libm.so": elf{}.String(),
		site + "x.pth": "# comment\nextra\nimport hook; hook.x()\n", site + "hook.py": "hook", site + "extra/far.py": "far",
		site + "pkg/__init__.py": "'''\nimport never\n'''\nfrom pkg import (\n  sub, # import never\n  attribute)\nfrom ..pkg import never\nif TYPE_CHECKING:\n    import never\nelse:\n    import json\ntry:\n    import _math\nexcept ImportError:\n    import never\n",
		site + "pkg/sub.py":      "from .deep.er import y\nx = \"\\\n import never\"\nimport \\\n  far\n", site + "pkg/never.py": "n", site + "pkg/deep/er.py": "namespace", site + "pkg/__main__.py": "import sys\nimport json.tool",
		"srv/app.py":   "#!/usr/bin/python\nimport pkg, local as l; import importlib\nm = importlib.import_module('late')\nif __name__ == '__main__':\n    import maininside\n",
		"srv/local.py": "if sys.platform == 'win32': import never\nif __name__ == '__main__':\n    import never\nclass A:\n    import inclass\n", "srv/late.py": "l", "srv/maininside.py": "m", "srv/inclass.py": "i",
		"venv/bin/python": "-> /usr/local/bin/python3", "venv/pyvenv.cfg": "home = /usr/local/bin\n", "venv/lib/python3.12/site-packages/only.py": "o", "srv/v.py": "import only, pkg",
		"venv/bin/gunicorn": "#!/venv/bin/python\nfrom gunicorn.app.wsgiapp import run\n", "venv/lib/python3.12/site-packages/gunicorn/__init__.py": "g", "venv/lib/python3.12/site-packages/gunicorn/app/__init__.py": "a",
		"venv/lib/python3.12/site-packages/gunicorn/app/wsgiapp.py": "w", "venv/lib/python3.12/site-packages/gunicorn/workers/sync.py": "s",
		"srv/wsgi.py": "from local import A", "srv/__main__.py": "import late",
	}
	for name := range files {
		if files[name] == "" {
			files[name] = " "
		}
	}
	boot := "usr/local/bin/python3.12 " + site + "x.pth " + site + "hook.py " + lib + "encodings/__pycache__/__init__.cpython-312.pyc " + lib + "encodings/aliases.py " + lib + "encodings/utf_8.py"
	pkg := site + "pkg/__init__.py " + site + "pkg/sub.py " + site + "pkg/deep/er.py " + site + "extra/far.py "
	json := lib + "json/__init__.py " + lib + "json/__pycache__/decoder.cpython-312.pyc " + lib + "json/scanner.py "
	math := lib + "lib-dynload/_math" + ext + " lib/libm.so "
	in := func(cmd ...string) profile.Start {
		return profile.Start{Cmd: cmd, WorkingDir: "/srv"}
	}
	wants(t, files, in("python", "app.py"), boot+" srv/app.py "+pkg+json+math+"srv/local.py srv/inclass.py srv/late.py srv/maininside.py")
	wants(t, files, in("python3", "-u", "-m", "pkg"), boot+" "+pkg+json+math+site+"pkg/__main__.py "+lib+"json/tool.py")
	wants(t, files, in("python3", "-W", "ignore", "-c", "import late"), boot+" srv/late.py")
	wants(t, files, in("python3", "."), boot+" srv/__main__.py srv/late.py")
	// What settings name, and a server's directory.
	files["prj/site.py"] = "x = ['shop.apps.Config', 'app', \"pkg.never\"]\ndef f(): return 'pkg.deep'\nROOT = 'shop.urls'\nimport django, vendor\n"
	files["prj/shop/__init__.py"], files["prj/shop/apps.py"], files["prj/shop/urls.py"] = "s", "a", "u"
	files[site+"django/__init__.py"] = "x = 'json.tool'"
	files[site+"vendor/__init__.py"], files[site+"vendor/extern/__init__.py"], files[site+"vendor/_vendor/__init__.py"], files[site+"vendor/_vendor/own.py"] = "from vendor.extern import own", "e", "v", "o"
	files["usr/local/bin/uvicorn"] = "#!/usr/local/bin/python3\n"
	wants(t, files, profile.Start{Cmd: []string{"uvicorn", "--app-dir", "/prj/", "site2:app"}}, "usr/local/bin/uvicorn "+boot)
	files["prj/site2.py"], files["prj/site.py"] = files["prj/site.py"], "never"
	wants(t, files, profile.Start{Cmd: []string{"uvicorn", "--app-dir", "/prj/", "site2:app"}}, "usr/local/bin/uvicorn "+boot+" prj/site2.py "+site+"django/__init__.py "+
		site+"vendor/__init__.py "+site+"vendor/extern/__init__.py "+site+"vendor/_vendor/__init__.py "+site+"vendor/_vendor/own.py prj/shop/__init__.py prj/shop/apps.py "+site+"pkg/__init__.py "+site+"pkg/sub.py "+site+"pkg/deep/er.py "+site+"extra/far.py "+json+math+site+"pkg/never.py prj/shop/urls.py")
	venvBoot := "usr/local/bin/python3.12 venv/pyvenv.cfg " + lib + "encodings/__pycache__/__init__.cpython-312.pyc " + lib + "encodings/aliases.py " + lib + "encodings/utf_8.py "
	wants(t, files, in("/venv/bin/python", "v.py"), venvBoot+"srv/v.py venv/lib/python3.12/site-packages/only.py")
	gunicorn := "venv/lib/python3.12/site-packages/gunicorn/"
	wants(t, files, in("/venv/bin/gunicorn", "-b", ":8000", "--workers=2", "wsgi:app"), "venv/bin/gunicorn "+venvBoot+gunicorn+"__init__.py "+gunicorn+"app/__init__.py "+gunicorn+"app/wsgiapp.py "+gunicorn+"workers/sync.py srv/wsgi.py srv/local.py srv/inclass.py")
}

func TestPredictNode(t *testing.T) {
	files := map[string]string{
		"usr/local/bin/node": elf{}.String(),
		"app/package.json":   `{"type":"commonjs","imports":{"#own":"./lib/own.js"},"scripts":{"start":"node --require ./pre.js index.js"}}`,
		"app/index.js":       "#!/usr/bin/env node\n// require('./never')\nconst a = require('./lib/a'), fs = require('fs'), s = \"require('./never')\"\nconst re = /['\"]/; const b = require(\"b\")\nfunction f() { require('./never') }\nmodule.require('./never'); require('#own')\n`${require('./never')}`\n",
		"app/pre.js":         "pre", "app/never.js": "never", "app/lib/a.js": "exports.x = require('./data'); require('..')", "app/lib/data.json": "{}", "app/lib/own.js": "own",
		"app/node_modules/b/package.json": `{"main":"./dist","exports":{"./*":"./src/*.mjs",".":{"browser":"./never.js","import":"./esm.mjs","require":{"default":"./cjs.js"}}}}`,
		"app/node_modules/b/cjs.js":       "(function (g) { g.x = require('c') })(this)", "app/node_modules/b/esm.mjs": "import x from 'c'\nexport { y } from \"b/feature\"\nimport('./never.js')\nimport './side.mjs'", "app/node_modules/b/src/feature.mjs": "f",
		"app/node_modules/b/never.js": "n", "app/node_modules/b/side.mjs": "s", "node_modules/c/index.js": "require('@s/d/sub')", "node_modules/@s/d/sub.js": "require('./native.node')", "node_modules/@s/d/native.node": elf{needed: []string{"libx.so"}}.String(), "lib/libx.so": elf{}.String(),
		"app/main.mjs":      "import b from 'b'",
		"usr/local/bin/npm": "-> ../lib/node_modules/npm/bin/npm-cli.js", "usr/local/lib/node_modules/npm/bin/npm-cli.js": "#!/usr/bin/env node\nrequire('../lib/cli.js')", "usr/local/lib/node_modules/npm/lib/cli.js": "cli", "usr/bin/env": elf{}.String(), "bin/sh": elf{}.String(),
	}
	in := func(cmd ...string) profile.Start { return profile.Start{Cmd: cmd, WorkingDir: "/app"} }
	native := "node_modules/c/index.js node_modules/@s/d/sub.js node_modules/@s/d/native.node lib/libx.so "
	app := "app/package.json app/index.js app/lib/a.js app/lib/data.json app/node_modules/b/package.json app/node_modules/b/cjs.js " + native + "app/lib/own.js"
	wants(t, files, in("node", "index.js"), "usr/local/bin/node "+app)
	wants(t, files, in("node", "--max-old-space-size=100", "-r", "./pre", "."), "usr/local/bin/node app/package.json app/pre.js "+strings.TrimPrefix(app, "app/package.json "))
	wants(t, files, in("node", "main.mjs"), "usr/local/bin/node app/package.json app/main.mjs app/node_modules/b/package.json app/node_modules/b/esm.mjs "+native+"app/node_modules/b/src/feature.mjs app/node_modules/b/never.js app/node_modules/b/side.mjs")
	wants(t, files, in("npm", "start"), "usr/local/lib/node_modules/npm/bin/npm-cli.js usr/bin/env usr/local/bin/node usr/local/lib/node_modules/npm/lib/cli.js app/package.json bin/sh app/pre.js "+strings.TrimPrefix(app, "app/package.json "))
}

func zipOf(t *testing.T, files ...string) string {
	t.Helper()
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	for n := 0; n < len(files); n += 2 {
		w, err := z.Create(files[n])
		must(t, err)
		_, err = w.Write([]byte(files[n+1]))
		must(t, err)
	}
	must(t, z.Close())
	return b.String()
}

func TestPredictJava(t *testing.T) {
	const home = "opt/jdk/"
	tables := new(bytes.Buffer)
	must(t, binary.Write(tables, binary.LittleEndian, []uint32{0xCAFEDADA, 1, 0, 10, 1000, 3000, 5000}))
	files := map[string]string{
		home + "bin/java": elf{runpath: "$ORIGIN/../lib", needed: []string{"libjli.so"}}.String(), home + "lib/libjli.so": elf{}.String(), "usr/bin/java": "-> /opt/jdk/bin/java",
		home + "lib/jvm.cfg": "x", home + "lib/server/libjvm.so": elf{}.String(), home + "lib/libjava.so": elf{}.String(), home + "lib/server/classes.jsa": "jsa", home + "lib/modules": tables.String() + strings.Repeat("m", 1<<20),
		"app/app.jar":   zipOf(t, "META-INF/MANIFEST.MF", "Main-Class: X\r\nClass-Path: lib/a.jar lib/\r\n b.jar gone.jar http://x/y.jar\r\n", "X.class", "x"),
		"app/lib/a.jar": zipOf(t, "a", "a"), "app/lib/b.jar": zipOf(t, "b", "b"), "app/other.jar": "no zip", "app/X.class": "class", "agent.jar": zipOf(t, "g", "g"), "app.jsa": "own",
	}
	in := func(cmd ...string) profile.Start { return profile.Start{Cmd: cmd, WorkingDir: "/app"} }
	jvm := home + "bin/java " + home + "lib/libjli.so " + home + "lib/jvm.cfg " + home + "lib/server/libjvm.so " + home + "lib/libjava.so "
	shared := home + "lib/server/classes.jsa " + home + "lib/modules "
	wants(t, files, in("java", "-Xmx1g", "-javaagent:/agent.jar=x", "-XX:SharedArchiveFile=/app.jsa", "-jar", "app.jar", "-cp", "no"), jvm+"agent.jar app.jsa "+shared+"app/app.jar app/lib/a.jar app/lib/b.jar")
	wants(t, files, in("java", "-cp", "lib/*:other.jar:.", "X"), jvm+shared+"app/lib/a.jar app/lib/b.jar app/other.jar app/X.class")
	items, err := profile.Predict(t.Context(), imageOf(t, files), in("java", "X"))
	must(t, err)
	for _, i := range items {
		if i.Path == home+"lib/modules" && i.Bytes != 16384 { // 28 + 8000 + 3000 + 5000, in pages
			t.Errorf("%d bytes of the JDK's classes", i.Bytes)
		}
	}
}

func TestPredictRuby(t *testing.T) {
	const lib = "usr/local/lib/ruby/3.3.0/"
	files := map[string]string{
		"usr/local/bin/ruby": elf{}.String(), "usr/local/bin/rackup": "#!/usr/bin/env ruby\nrequire \"rack\"\n", "usr/bin/env": elf{}.String(),
		lib + "rubygems.rb": "require 'rbconfig'\n  require_relative \"rubygems/compat\"\nautoload :X, 'never'\n# require 'never'\n", lib + "rubygems/compat.rb": "x", lib + "never.rb": "n",
		lib + "x86_64-linux/rbconfig.rb": "r", lib + "x86_64-linux/monitor.so": elf{}.String(), lib + "monitor.rb": "require 'monitor.so'",
		"usr/local/bundle/specifications/rack-3.0.gemspec": "spec", "usr/local/bundle/gems/rack-3.0/lib/rack.rb": "require_relative 'rack/version'", "usr/local/bundle/gems/rack-3.0/lib/rack/version.rb": "v",
		"app/config.ru": "require './app'\nrequire_relative 'app'", "app/app.rb": "app",
	}
	boot := "usr/local/bin/ruby usr/local/bundle/specifications/rack-3.0.gemspec " + lib + "rubygems.rb " + lib + "x86_64-linux/rbconfig.rb " + lib + "rubygems/compat.rb " + lib + "x86_64-linux/monitor.so " + lib + "monitor.rb "
	rack := "usr/local/bundle/gems/rack-3.0/lib/rack.rb usr/local/bundle/gems/rack-3.0/lib/rack/version.rb "
	wants(t, files, profile.Start{Cmd: []string{"rackup"}, WorkingDir: "/app"}, "usr/local/bin/rackup usr/bin/env "+boot+rack+"app/config.ru app/app.rb")
	wants(t, files, profile.Start{Cmd: []string{"ruby", "-rrack", "/app/app.rb"}}, boot+rack+"app/app.rb")
}
