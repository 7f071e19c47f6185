package debimage

import (
	"context"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// recipe names an image; a change of what is built needs a new name.
type recipe struct {
	name        string
	packages    string            // installed on top of debootstrap's minbase; empty: the base alone
	fillerBytes int64             // in files of a layer of their own, which nothing reads
	files       map[string]string // of the last layer, by path; with packages
	// prepare is a shell script that makes more files below /srv out of those. It runs in the
	// image with the packages of tools, which are left out again.
	prepare, tools string
	env            []string // beside PATH
	command        []string
}

var python = []string{"python3", "/srv/app.py"}

var minbase = recipe{name: "minbase-1", command: python}

var pyweb = recipe{
	name:     "pyweb-1",
	packages: "python3",
	files: map[string]string{"srv/app.py": `import http.server, json, sys
class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"python": sys.version}).encode())
    def log_message(self, *args):
        pass
http.server.HTTPServer(("0.0.0.0", 9000), Hello).serve_forever()
`},
	command: python,
}

var pyapp = recipe{
	name:     "pyapp-2",
	packages: "python3 python3-numpy python3-scipy python3-pandas python3-flask",
	files: map[string]string{"srv/app.py": `from flask import Flask
import numpy, pandas, scipy.optimize
app = Flask(__name__)
@app.route("/")
def root():
    return str(pandas.DataFrame({"a": numpy.arange(10)}).a.sum())
app.run(host="0.0.0.0", port=9000)
`},
	command: python,
}

var node = recipe{
	name:     "node-1",
	packages: "nodejs node-express",
	files: map[string]string{"srv/app.js": `const express = require("express")
const { sum } = require("./lib/sum")
const app = express()
app.get("/", (req, res) => res.send(String(sum(10))))
app.listen(9000, "0.0.0.0")
`, "srv/lib/sum.js": `exports.sum = (n) => n * (n - 1) / 2
`},
	command: []string{"node", "/srv/app.js"},
}

var java = recipe{
	name:     "java-1",
	packages: "default-jre-headless",
	files: map[string]string{"srv/src/Main.java": `import com.sun.net.httpserver.*;
import java.net.*;
import java.util.stream.*;
public class Main {
	public static void main(String[] args) throws Exception {
		var server = HttpServer.create(new InetSocketAddress("0.0.0.0", 9000), 0);
		server.createContext("/", x -> {
			byte[] b = String.valueOf(IntStream.range(0, 10).boxed().collect(Collectors.summingInt(i -> i))).getBytes();
			x.sendResponseHeaders(200, b.length);
			x.getResponseBody().write(b);
			x.close();
		});
		server.start();
	}
}
`},
	tools:   "default-jdk-headless",
	prepare: "cd /srv/src && javac -d /tmp/classes Main.java && jar --create --file /srv/app.jar --main-class Main -C /tmp/classes .",
	command: []string{"java", "-jar", "/srv/app.jar"},
}

var nginx = recipe{
	name:     "nginx-1",
	packages: "nginx",
	files: map[string]string{
		"etc/nginx/conf.d/app.conf":         "server {\n\tlisten 9000;\n\tlocation / { root /srv/www; }\n}\n",
		"etc/nginx/sites-available/default": "\n", // Debian's own server, on port 80
		"srv/www/index.html":                "45",
	},
	command: []string{"nginx", "-g", "daemon off;"},
}

var redis = recipe{
	name:     "redis-1",
	packages: "redis-server",
	files:    map[string]string{"srv/redis.conf": "port 9000\nbind 0.0.0.0\nprotected-mode no\nsave \"\"\n"},
	command:  []string{"redis-server", "/srv/redis.conf"},
}

var golang = recipe{
	name:     "golang-1",
	packages: "golang-go",
	files: map[string]string{"srv/main.go": `package main

import (
	"fmt"
	"syscall"
)

// Without package net, which would be compiled anew for want of a C compiler.
func main() {
	s, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err == nil {
		err = syscall.SetsockoptInt(s, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)
	}
	if err == nil {
		err = syscall.Bind(s, &syscall.SockaddrInet4{Port: 9000})
	}
	if err == nil {
		err = syscall.Listen(s, 16)
	}
	for err == nil {
		var c int
		if c, _, err = syscall.Accept(s); err == nil {
			fmt.Println("asked", c)
			request := make([]byte, 4096)
			syscall.Read(c, request)
			syscall.Write(c, []byte("HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n45"))
			syscall.Close(c)
		}
	}
	panic(err)
}
`},
	env:     []string{"HOME=/root", "CGO_ENABLED=0"},
	command: []string{"go", "run", "/srv/main.go"},
}

var big = recipe{
	name:        "big-1",
	packages:    pyweb.packages,
	fillerBytes: 1_700_000_000,
	files:       pyweb.files,
	command:     python,
}

var readAll = recipe{
	name:     "readall-1",
	packages: "python3 git",
	files:    map[string]string{"srv/readall.sh": "find / -xdev -type f -exec cat {} + >/dev/null\n"},
	command:  []string{"sh", "/srv/readall.sh"},
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

// Node returns an image with Node.js and express, whose server on port 9000 answers 45.
func Node(ctx context.Context, log io.Writer) (v1.Image, error) { return node.image(ctx, log) }

// Java returns an image with a headless Java runtime, whose server on port 9000 answers 45.
func Java(ctx context.Context, log io.Writer) (v1.Image, error) { return java.image(ctx, log) }

// Nginx returns an image whose nginx on port 9000 answers 45.
func Nginx(ctx context.Context, log io.Writer) (v1.Image, error) { return nginx.image(ctx, log) }

// Redis returns an image whose redis listens on port 9000.
func Redis(ctx context.Context, log io.Writer) (v1.Image, error) { return redis.image(ctx, log) }

// Golang returns an image with the Go toolchain, which builds and runs a server that answers
// 45 on port 9000.
func Golang(ctx context.Context, log io.Writer) (v1.Image, error) { return golang.image(ctx, log) }

// Big returns PyWeb's programs in an image of 2 GB: a layer of 1.7 GB, which compress to
// half of that, is never read.
func Big(ctx context.Context, log io.Writer) (v1.Image, error) { return big.image(ctx, log) }

// ReadAll returns an image of some 10,000 files whose program reads all of them and ends.
func ReadAll(ctx context.Context, log io.Writer) (v1.Image, error) { return readAll.image(ctx, log) }
