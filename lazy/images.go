package lazy

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"accel"
	"accel/internal/durable"

	"github.com/opencontainers/go-digest"
)

const (
	// maxImages is of how many images it is remembered from what they are mounted; those looked at last stay.
	maxImages = 1000
	// maxNames of one image are remembered, those used last.
	maxNames    = 8
	imageSuffix = ".json"
)

// mountable is from what an image is mounted. It is kept on disk, so that its layers are found in the store by the image's
// name when the daemon that looked at it is gone, also where nobody can be asked.
type mountable struct {
	Names  []string        `json:"names"`  // "host/path:tag" or "host/path@digest", the one used last last
	Layers []digest.Digest `json:"layers"` // in the form that is mounted, the lowest first
}

// mountables are the files of what is known of images, one for each platform's manifest.
type mountables struct {
	dir string
	mu  sync.Mutex
}

func (m *mountables) path(manifest digest.Digest) string {
	return filepath.Join(m.dir, manifest.Algorithm().String()+"-"+manifest.Encoded()+imageSuffix)
}

// get returns accel.ErrNotFound where nothing is known, also where what was there is damaged.
func (m *mountables) get(manifest digest.Digest) (mountable, error) {
	if err := manifest.Validate(); err != nil {
		return mountable{}, fmt.Errorf("%w: manifest %.100q: %w", accel.ErrNotFound, manifest, err)
	}
	raw, err := os.ReadFile(m.path(manifest))
	if errors.Is(err, fs.ErrNotExist) {
		return mountable{}, fmt.Errorf("%w: from what %s is mounted", accel.ErrNotFound, manifest)
	}
	if err != nil {
		return mountable{}, err
	}
	var known mountable
	bad := func(d digest.Digest) bool { return d.Validate() != nil }
	if err := json.Unmarshal(raw, &known); err != nil || slices.ContainsFunc(known.Layers, bad) {
		return mountable{}, fmt.Errorf("%w: from what %s is mounted: %s is damaged", accel.ErrNotFound, manifest, m.path(manifest))
	}
	return known, nil
}

// put notes from what an image is mounted, and that this is the one that is meant by its name now.
func (m *mountables) put(img *image) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	was, err := m.get(img.manifest)
	if err != nil && !errors.Is(err, accel.ErrNotFound) {
		return err
	}
	now := mountable{Names: was.Names, Layers: img.digests()}
	if ref, err := accel.ParseReference(img.name); err == nil {
		name := nameIn(img.repository, ref)
		now.Names = append(slices.DeleteFunc(slices.Clone(was.Names), func(n string) bool { return n == name }), name)
		now.Names = now.Names[max(0, len(now.Names)-maxNames):]
	}
	if slices.Equal(was.Names, now.Names) && slices.Equal(was.Layers, now.Layers) {
		at := time.Now()
		return os.Chtimes(m.path(img.manifest), at, at)
	}
	raw, err := json.Marshal(now)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(m.path(img.manifest), raw, 0o600); err != nil {
		return err
	}
	return keepNewest(m.dir, imageSuffix, maxImages)
}

// named is the manifest that was looked at last under a name; empty: none was.
func (m *mountables) named(name string) (digest.Digest, error) {
	files, err := filesIn(m.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	for _, f := range slices.Backward(files) {
		manifest := layerOfFile(f.Name())
		if known, err := m.get(manifest); err == nil && slices.Contains(known.Names, name) {
			return manifest, nil
		}
	}
	return "", nil
}

// sweep removes the files of images none of whose layers is there any more. Younger ones stay: their layers may be
// just being made.
func (m *mountables) sweep(younger time.Duration, absent func(digest.Digest) bool) error {
	files, err := filesIn(m.dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range files {
		if time.Since(f.ModTime()) < younger {
			continue
		}
		known, err := m.get(layerOfFile(f.Name()))
		if err == nil && slices.ContainsFunc(known.Layers, func(d digest.Digest) bool { return !absent(d) }) {
			continue
		}
		if err := os.Remove(filepath.Join(m.dir, f.Name())); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// nameIn is an image's name with the repository as the node has it.
func nameIn(repository string, ref accel.Reference) string {
	if ref.Digest != "" {
		return repository + "@" + ref.Digest.String()
	}
	return repository + ":" + ref.Tag
}

// digests are the layers that an image is mounted from, the lowest first.
func (i *image) digests() (layers []digest.Digest) {
	for _, y := range i.layers {
		layers = append(layers, y.Digest)
	}
	return layers
}

// note keeps from what an image is mounted. Without that it is mounted all the same.
func (l *Lazy) note(img *image) {
	if err := l.images.put(img); err != nil {
		l.o.Log.Warn("from what an image is mounted is not known after the node's next start", "image", img.name, "error", err)
	}
}

// LayersOf are the layers that are mounted for an image, by its platform's manifest, as far as this node has looked
// at it.
func (l *Lazy) LayersOf(manifest digest.Digest) []digest.Digest {
	if img, known := l.starts.images.Get(manifest); known {
		return img.digests()
	}
	return l.images.layersOf(manifest, l.o.Log)
}

func (m *mountables) layersOf(manifest digest.Digest, log *slog.Logger) []digest.Digest {
	known, err := m.get(manifest)
	if err != nil && !errors.Is(err, accel.ErrNotFound) {
		log.Warn("from what an image is mounted cannot be read", "manifest", manifest, "error", err)
	}
	return known.Layers
}

// ManifestOf is the platform's manifest that containerd asked for last under a name, whose registry is canonical; empty: it
// has not, as far as is known. containerd resolves names without the node.
func (l *Lazy) ManifestOf(ref accel.Reference) digest.Digest {
	name := nameIn(ref.Name(), ref)
	for _, img := range slices.Backward(l.starts.images.Values()) { // the newest are last
		asked, err := accel.ParseReference(img.name)
		if err == nil && nameIn(img.repository, asked) == name || ref.Digest == img.manifest {
			return img.manifest
		}
	}
	return l.images.manifestOf(ref, l.o.Log)
}

func (m *mountables) manifestOf(ref accel.Reference, log *slog.Logger) digest.Digest {
	if ref.Digest != "" {
		if _, err := m.get(ref.Digest); err == nil {
			return ref.Digest
		}
	}
	manifest, err := m.named(nameIn(ref.Name(), ref))
	if err != nil {
		log.Warn("which images were mounted cannot be read", "error", err)
	}
	return manifest
}

// Stopped is what is known in the folder of a Lazy that does not run.
type Stopped struct {
	images mountables
	log    *slog.Logger
}

// OpenStopped looks into Options.Dir, which need not be there. log nil: slog.Default.
func OpenStopped(dir string, log *slog.Logger) *Stopped {
	return &Stopped{mountables{dir: imagesIn(dir)}, cmp.Or(log, slog.Default())}
}

// LayersOf is Lazy.LayersOf.
func (s *Stopped) LayersOf(manifest digest.Digest) []digest.Digest {
	return s.images.layersOf(manifest, s.log)
}

// ManifestOf is Lazy.ManifestOf.
func (s *Stopped) ManifestOf(ref accel.Reference) digest.Digest {
	return s.images.manifestOf(ref, s.log)
}

func imagesIn(dir string) string { return filepath.Join(dir, "images") }
