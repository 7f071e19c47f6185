package debimage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
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

const (
	fillerFileBytes = 4_000_000
	// Half of the filler does not compress.
	fillerRandomBytes = fillerFileBytes / 2
)

// works is the folder that one image is built in.
type works struct {
	dir string
	log io.Writer
	recipe
}

func (w works) path(name string) string { return filepath.Join(w.dir, name) }

func (w works) run(ctx context.Context, name string, args ...string) error {
	fmt.Fprintf(w.log, "%s: %s %s\n", w.name, name, strings.Join(args, " "))
	return w.fed(ctx, nil, name, args...)
}

// fed is run with something on standard input.
func (w works) fed(ctx context.Context, in io.Reader, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = in
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, out[max(0, len(out)-2000):])
	}
	return nil
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
	w := works{dir: work, log: log, recipe: r}
	layers, err := w.layers(ctx)
	if err != nil {
		return err
	}
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	if img, err = mutate.AppendLayers(img, layers...); err != nil {
		return err
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		return err
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", "amd64"
	cfg.Created = v1.Time{Time: time.Unix(1, 0).UTC()}
	cfg.Config.Env = append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, r.env...)
	cfg.Config.Cmd = r.command
	if img, err = mutate.ConfigFile(img, cfg); err != nil {
		return err
	}
	return w.keep(ctx, img, dir)
}

// keep writes the image to its place. Rename is the commit: a build that was cut short
// leaves nothing.
func (w works) keep(ctx context.Context, img v1.Image, dir string) error {
	made := w.path("layout")
	path, err := layout.Write(made, empty.Index)
	if err != nil {
		return err
	}
	fmt.Fprintf(w.log, "%s: compressing the layers\n", w.name)
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
	if err := w.run(ctx, "cp", "-a", made, staged); err != nil {
		return err
	}
	err = os.Rename(staged, dir)
	if errors.Is(err, os.ErrExist) || errors.Is(err, syscall.ENOTEMPTY) {
		return os.RemoveAll(staged) // that one was quicker
	}
	return err
}

// layers makes them, the lowest first.
func (w works) layers(ctx context.Context) ([]v1.Layer, error) {
	mirror, err := mirror(ctx)
	if err != nil {
		return nil, err
	}
	if w.packages == "" {
		if err := w.run(ctx, "debootstrap", "--variant=minbase", "bookworm", w.path("base"), mirror); err != nil {
			return nil, err
		}
		base, err := w.layer(ctx, "base")
		return []v1.Layer{base}, err
	}
	base, err := w.unpackBase(ctx)
	if err != nil {
		return nil, err
	}
	if err := w.install(ctx, "upper", w.packages, w.path("base")); err != nil {
		return nil, err
	}
	for name, content := range w.files {
		path := filepath.Join(w.path("app"), name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, err
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return nil, err
		}
	}
	trees := []string{"upper", "app"}
	if w.prepare != "" {
		if err := w.prepared(ctx); err != nil {
			return nil, err
		}
	}
	if w.fillerBytes > 0 {
		if err := w.fill(); err != nil {
			return nil, err
		}
		trees = []string{"upper", "filler", "app"}
	}
	layers := []v1.Layer{base}
	for _, tree := range trees {
		l, err := w.layer(ctx, tree)
		if err != nil {
			return nil, err
		}
		layers = append(layers, l)
	}
	return layers, nil
}

// unpackBase lays Minbase out, and gives its layer.
func (w works) unpackBase(ctx context.Context) (v1.Layer, error) {
	img, err := Minbase(ctx, w.log)
	if err != nil {
		return nil, err
	}
	layers, err := img.Layers()
	if err != nil {
		return nil, err
	}
	r, err := layers[0].Uncompressed()
	if err != nil {
		return nil, err
	}
	if err := os.Mkdir(w.path("base"), 0o755); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	err = w.fed(ctx, r, "tar", "--xattrs", "--xattrs-include=security.capability", "--numeric-owner", "-C", w.path("base"), "-xpf", "-")
	return layers[0], errors.Join(err, r.Close())
}

// install puts packages, and what else is to be done in the image, into a tree of its own
// above others, the topmost first.
func (w works) install(ctx context.Context, tree, packages string, below ...string) error {
	return w.changed(ctx, tree, "apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "+packages+" && apt-get clean && rm -rf /var/lib/apt/lists/*", below...)
}

// changed runs a script in the image that is laid down by some trees; what it changes comes into tree.
func (w works) changed(ctx context.Context, tree, script string, below ...string) error {
	scratch, merged := w.path(tree+"-scratch"), w.path(tree+"-merged")
	for _, d := range []string{w.path(tree), scratch, merged} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if err := w.run(ctx, "mount", "-t", "overlay", "overlay", "-o", "lowerdir="+strings.Join(below, ":")+",upperdir="+w.path(tree)+",workdir="+scratch, merged); err != nil {
		return err
	}
	proc := filepath.Join(merged, "proc") // Java does not run without it
	err := w.run(ctx, "mount", "-t", "proc", "proc", proc)
	if err == nil {
		err = w.run(ctx, "chroot", merged, "sh", "-c", script)
		err = errors.Join(err, w.run(context.WithoutCancel(ctx), "umount", proc))
	}
	return errors.Join(err, w.run(context.WithoutCancel(ctx), "umount", merged))
}

// prepared runs the recipe's script, and has what it leaves below /srv in the app's layer.
func (w works) prepared(ctx context.Context) error {
	if err := w.install(ctx, "tools", w.tools, w.path("upper"), w.path("base")); err != nil {
		return err
	}
	if err := w.changed(ctx, "made", w.prepare, w.path("app"), w.path("tools"), w.path("upper"), w.path("base")); err != nil {
		return err
	}
	return w.run(ctx, "cp", "-a", filepath.Join(w.path("made"), "srv"), w.path("app"))
}

// fill makes the same files each time.
func (w works) fill() error {
	dir := filepath.Join(w.path("filler"), "srv", "data")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	random := rand.NewChaCha8([32]byte{1})
	content := []byte(strings.Repeat("a line of data, the like of which there are many\n", fillerFileBytes/49+1))[:fillerFileBytes]
	for n := int64(0); n*fillerFileBytes < w.fillerBytes; n++ {
		_, _ = random.Read(content[:fillerRandomBytes]) // never fails
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%04d", n)), content, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// layer is a tree as one.
func (w works) layer(ctx context.Context, tree string) (v1.Layer, error) {
	dir := w.path(tree)
	if err := markWhiteouts(dir); err != nil {
		return nil, err
	}
	if err := w.run(ctx, "tar", "--sort=name", "--xattrs", "--xattrs-include=security.capability", "--numeric-owner", "-C", dir, "-cf", dir+".tar", "."); err != nil {
		return nil, err
	}
	return tarball.LayerFromFile(dir+".tar", tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(6))
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
