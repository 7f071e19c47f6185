// Package debimage makes the images that tests and benchmarks measure with, from
// the machine's own Debian mirror, and keeps them in the user's cache directory.
package debimage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// recipe names an image; a change of what is built needs a new name.
type recipe struct {
	name     string
	packages string // installed on top of debootstrap's minbase; empty: the base alone
	server   string // the program of the last layer, with packages
}

var minbase = recipe{name: "minbase-1"}

var pyweb = recipe{
	name:     "pyweb-1",
	packages: "python3",
	server: `import http.server, json, sys
class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"python": sys.version}).encode())
    def log_message(self, *args):
        pass
http.server.HTTPServer(("0.0.0.0", 9000), Hello).serve_forever()
`,
}

var pyapp = recipe{
	name:     "pyapp-2",
	packages: "python3 python3-numpy python3-scipy python3-pandas python3-flask",
	server: `from flask import Flask
import numpy, pandas, scipy.optimize
app = Flask(__name__)
@app.route("/")
def root():
    return str(pandas.DataFrame({"a": numpy.arange(10)}).a.sum())
app.run(host="0.0.0.0", port=9000)
`,
}

// Minbase returns a Debian minbase image of one gzip layer, about 90 MB. The
// first call builds it, as root, with debootstrap installed; log takes the
// progress.
func Minbase(ctx context.Context, log io.Writer) (v1.Image, error) { return minbase.image(ctx, log) }

// PyWeb returns an image of about 170 MB in three gzip layers: a Debian minbase, python3,
// and a small HTTP server on port 9000.
func PyWeb(ctx context.Context, log io.Writer) (v1.Image, error) { return pyweb.image(ctx, log) }

// PyApp returns an image of about 1 GB in 31,000 files and three gzip layers: a
// Debian minbase, python3 with numpy, scipy, pandas and flask, and a small HTTP
// server on port 9000. The first call builds it, which takes some minutes.
func PyApp(ctx context.Context, log io.Writer) (v1.Image, error) { return pyapp.image(ctx, log) }

func (r recipe) image(ctx context.Context, log io.Writer) (v1.Image, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, "accel-images", r.name)
	if _, err := os.Stat(filepath.Join(dir, "index.json")); errors.Is(err, os.ErrNotExist) {
		if err := r.build(ctx, dir, log); err != nil {
			return nil, fmt.Errorf("build the image %s: %w", r.name, err)
		}
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, err
	}
	m, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	return index.Image(m.Manifests[0].Digest)
}

func (r recipe) build(ctx context.Context, dir string, log io.Writer) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("debootstrap needs root")
	}
	work, err := os.MkdirTemp("", "accel-image-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	base, upper, scratch, merged := filepath.Join(work, "base"), filepath.Join(work, "upper"), filepath.Join(work, "scratch"), filepath.Join(work, "merged")
	app := filepath.Join(work, "app")
	for _, d := range []string{upper, scratch, merged, filepath.Join(app, "srv")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	run := func(name string, args ...string) error {
		fmt.Fprintf(log, "%s: %s %s\n", r.name, name, strings.Join(args, " "))
		cmd := exec.CommandContext(ctx, name, args...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s: %w: %s", name, err, out[max(0, len(out)-2000):])
		}
		return nil
	}
	mirror, err := mirror(ctx)
	if err != nil {
		return err
	}
	if err := run("debootstrap", "--variant=minbase", "bookworm", base, mirror); err != nil {
		return err
	}
	trees := []string{base}
	if r.packages != "" {
		if err := r.install(run, base, upper, scratch, merged, app); err != nil {
			return err
		}
		trees = append(trees, upper, app)
	}
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	for _, tree := range trees {
		file := tree + ".tar"
		if err := markWhiteouts(tree); err != nil {
			return err
		}
		if err := run("tar", "--sort=name", "--xattrs", "--xattrs-include=security.capability", "--numeric-owner", "-C", tree, "-cf", file, "."); err != nil {
			return err
		}
		layer, err := tarball.LayerFromFile(file, tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(6))
		if err != nil {
			return err
		}
		if img, err = mutate.AppendLayers(img, layer); err != nil {
			return err
		}
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		return err
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", "amd64"
	cfg.Created = v1.Time{Time: time.Unix(1, 0).UTC()}
	cfg.Config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cfg.Config.Cmd = []string{"python3", "/srv/app.py"}
	if img, err = mutate.ConfigFile(img, cfg); err != nil {
		return err
	}
	// Rename is the commit: a build that was cut short leaves nothing.
	made := filepath.Join(work, "layout")
	path, err := layout.Write(made, empty.Index)
	if err != nil {
		return err
	}
	fmt.Fprintf(log, "%s: compressing the layers\n", r.name)
	if err := path.AppendImage(img); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	staged := fmt.Sprintf("%s.%d", dir, os.Getpid()) // another process may build the same
	if err := os.RemoveAll(staged); err != nil {
		return err
	}
	if err := run("cp", "-a", made, staged); err != nil {
		return err
	}
	err = os.Rename(staged, dir)
	if errors.Is(err, os.ErrExist) || errors.Is(err, syscall.ENOTEMPTY) {
		return os.RemoveAll(staged) // that one was quicker
	}
	return err
}

// markWhiteouts makes overlayfs's whiteouts those of a layer (image spec, "Whiteouts").
func markWhiteouts(tree string) error {
	return filepath.WalkDir(tree, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.Type()&fs.ModeCharDevice == 0 {
			return err
		}
		info, err := e.Info()
		if err != nil || info.Sys().(*syscall.Stat_t).Rdev != 0 {
			return err
		}
		return errors.Join(os.WriteFile(filepath.Join(filepath.Dir(path), ".wh."+e.Name()), nil, 0o644), os.Remove(path))
	})
}

// install puts the packages into upper, and the server into app.
func (r recipe) install(run func(string, ...string) error, base, upper, scratch, merged, app string) error {
	if err := os.WriteFile(filepath.Join(app, "srv", "app.py"), []byte(r.server), 0o644); err != nil {
		return err
	}
	if err := run("mount", "-t", "overlay", "overlay", "-o", "lowerdir="+base+",upperdir="+upper+",workdir="+scratch, merged); err != nil {
		return err
	}
	err := run("chroot", merged, "sh", "-c", "apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "+r.packages+" && apt-get clean && rm -rf /var/lib/apt/lists/*")
	return errors.Join(err, run("umount", merged))
}

// mirror is the Debian mirror that this machine itself is configured with.
func mirror(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages").Output()
	if err != nil {
		return "", fmt.Errorf("ask apt for its mirror: %w", err)
	}
	for uri := range strings.FieldsSeq(string(out)) {
		if strings.HasPrefix(uri, "http") && !strings.Contains(uri, "security") {
			return uri, nil
		}
	}
	return "", errors.New("apt has no http mirror configured")
}
