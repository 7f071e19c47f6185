// Package pyapp builds the image that the benchmarks measure with: a Debian
// minbase, python3 with numpy, scipy, pandas and flask, and a small HTTP server
// on port 9000. About 1 GB in 31,000 files, in three gzip layers. It is made
// from the machine's own Debian mirror and kept in the user's cache directory.
package pyapp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// recipe names what is built; a change of the recipe needs a new name.
const recipe = "pyapp-1"

const packages = "python3 python3-numpy python3-scipy python3-pandas python3-flask"

const server = `from flask import Flask
import numpy, pandas, scipy.optimize
app = Flask(__name__)
@app.route("/")
def root():
    return str(pandas.DataFrame({"a": numpy.arange(10)}).a.sum())
app.run(host="0.0.0.0", port=9000)
`

// Image returns the image, and builds it first where the cache has none (some
// minutes, as root, with debootstrap installed). log takes the progress.
func Image(ctx context.Context, log io.Writer) (v1.Image, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, "accel-bench", recipe)
	if _, err := os.Stat(filepath.Join(dir, "index.json")); errors.Is(err, os.ErrNotExist) {
		if err := build(ctx, dir, log); err != nil {
			return nil, fmt.Errorf("build the benchmark image: %w", err)
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

func build(ctx context.Context, dir string, log io.Writer) error {
	if os.Geteuid() != 0 {
		return errors.New("debootstrap and overlay mounts need root")
	}
	work, err := os.MkdirTemp("", "accel-pyapp-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	base, upper, scratch, merged := filepath.Join(work, "base"), filepath.Join(work, "upper"), filepath.Join(work, "scratch"), filepath.Join(work, "merged")
	app := filepath.Join(work, "app")
	for _, d := range []string{upper, scratch, merged, filepath.Join(app, "srv")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(app, "srv", "app.py"), []byte(server), 0o644); err != nil {
		return err
	}
	run := func(name string, args ...string) error {
		fmt.Fprintf(log, "pyapp: %s %s\n", name, strings.Join(args, " "))
		cmd := exec.CommandContext(ctx, name, args...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s: %w: %s", name, err, out[max(0, len(out)-2000):])
		}
		return nil
	}
	mirror, err := mirror()
	if err != nil {
		return err
	}
	if err := run("debootstrap", "--variant=minbase", "bookworm", base, mirror); err != nil {
		return err
	}
	if err := run("mount", "-t", "overlay", "overlay", "-o", "lowerdir="+base+",upperdir="+upper+",workdir="+scratch, merged); err != nil {
		return err
	}
	err = run("chroot", merged, "sh", "-c", "apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "+packages+" && apt-get clean && rm -rf /var/lib/apt/lists/*")
	if uerr := run("umount", merged); err == nil {
		err = uerr
	}
	if err != nil {
		return err
	}
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	for _, tree := range []string{base, upper, app} {
		file := tree + ".tar"
		// The upper directory's whiteouts (character devices 0:0) hold only caches
		// that the start never asks for; leaving them out keeps this to plain tar.
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
	fmt.Fprintln(log, "pyapp: compressing the layers")
	if err := path.AppendImage(img); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	staged := dir + ".tmp"
	if err := os.RemoveAll(staged); err != nil {
		return err
	}
	if err := run("cp", "-a", made, staged); err != nil {
		return err
	}
	return os.Rename(staged, dir)
}

// mirror is the Debian mirror that this machine itself is configured with.
func mirror() (string, error) {
	out, err := exec.Command("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages").Output()
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
