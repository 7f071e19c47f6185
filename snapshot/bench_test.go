package snapshot

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// benchBed is a snapshotter with images of ten layers each.
func benchBed(b *testing.B, images int) (*Snapshotter, Options, []string) {
	b.Helper()
	needsRoot(b)
	dir := b.TempDir()
	layers, held := &trees{dir: filepath.Join(dir, "layers")}, &pins{dir: filepath.Join(dir, "pins")}
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	must(unix.Mkdir(layers.dir, 0o755))
	must(unix.Mkdir(held.dir, 0o755))
	o := Options{Dir: filepath.Join(dir, "s"), Images: layers, Mounts: layers, Pins: held, Log: slog.New(slog.DiscardHandler)}
	s, err := Open(b.Context(), o)
	must(err)
	var tops []string
	for i := range images {
		var image []digest.Digest
		parent := ""
		for l := range 10 {
			image = append(image, layers.add(b, map[string]string{"f": fmt.Sprint(i, l)}))
			key := fmt.Sprint("extract", i, l)
			if _, err := s.Prepare(b.Context(), key, parent, snapshots.WithLabels(labelsOf(fmt.Sprint("image", i), image, l))); !errdefs.IsAlreadyExists(err) {
				b.Fatal(err)
			}
			parent = chain(image, l)
		}
		tops = append(tops, parent)
	}
	b.Cleanup(func() {
		for _, l := range s.Lazy() {
			must(layers.Unmount(context.Background(), s.upperPath(l.ID)))
		}
		must(s.Close())
	})
	return s, o, tops
}

// BenchmarkLayer is the answer for a layer, and its removal; with bind mounts.
func BenchmarkLayer(b *testing.B) {
	s, o, _ := benchBed(b, 20)
	image := []digest.Digest{o.Mounts.(*trees).add(b, map[string]string{"f": "one more"})}
	for b.Loop() {
		if _, err := s.Prepare(b.Context(), "extract", "", snapshots.WithLabels(labelsOf("r", image, 0))); !errdefs.IsAlreadyExists(err) {
			b.Fatal(err)
		}
		if err := s.Remove(b.Context(), chain(image, 0)); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkContainer is the snapshot of a container on ten lazy layers, and its removal.
func BenchmarkContainer(b *testing.B) {
	s, _, tops := benchBed(b, 20)
	for b.Loop() {
		if _, err := s.Prepare(b.Context(), "container", tops[0]); err != nil {
			b.Fatal(err)
		}
		if err := s.Remove(b.Context(), "container"); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkStart is a daemon's start among two hundred layers that are mounted.
func BenchmarkStart(b *testing.B) {
	s, o, _ := benchBed(b, 20)
	for b.Loop() {
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
		again, err := Open(b.Context(), o)
		if err != nil {
			b.Fatal(err)
		}
		if err := again.Restore(b.Context()); err != nil {
			b.Fatal(err)
		}
		*s = Snapshotter{o: again.o, store: again.store, options: again.options, metrics: again.metrics, remotes: again.remotes} //nolint:govet // for the clean-up; nobody holds its locks
	}
}

// BenchmarkSought is how containerd looks for a snapshot that is said to be there, among two hundred.
func BenchmarkSought(b *testing.B) {
	s, _, tops := benchBed(b, 20)
	top, err := s.Stat(b.Context(), tops[0])
	if err != nil {
		b.Fatal(err)
	}
	filter := fmt.Sprintf(`labels.%q==%s,parent==%q`, snapshots.LabelSnapshotRef, tops[0], top.Parent)
	for b.Loop() {
		found := 0
		if err := s.Walk(b.Context(), func(context.Context, snapshots.Info) error { found++; return nil }, filter); err != nil || found != 1 {
			b.Fatal(found, err)
		}
	}
}
