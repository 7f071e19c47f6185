package lazy

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

// TestLayersAreFoundAfterARestart: also where the registry is away, and they are forgotten with the layers.
func TestLayersAreFoundAfterARestart(t *testing.T) {
	b := newBed(t)
	image := b.push("team/app", true, b.layerWith("a", []byte("one")), b.layerWith("b", []byte("two")))
	must(t, b.ask(image))
	want := []digest.Digest{image.layers[0].digest, image.layers[1].digest}
	ref, err := accel.ParseReference(image.name)
	must(t, err)

	b.start(nil)
	b.answerWith(http.StatusServiceUnavailable, func(*http.Request) bool { return true })
	if got := b.lazy.LayersOf(image.manifest); !slices.Equal(got, want) {
		t.Fatalf("layers %v, want %v", got, want)
	}
	if got := b.lazy.ManifestOf(ref); got != image.manifest {
		t.Errorf("%s is manifest %q", image.name, got)
	}
	stopped := OpenStopped(filepath.Join(b.dir, "lazy"), slog.New(slog.DiscardHandler))
	if got := stopped.ManifestOf(ref); got != image.manifest || !slices.Equal(stopped.LayersOf(got), want) {
		t.Errorf("the folder knows %s as %q, %v", image.name, got, stopped.LayersOf(got))
	}
	if nothing := OpenStopped(t.TempDir(), slog.Default()); nothing.ManifestOf(ref) != "" || nothing.LayersOf(image.manifest) != nil {
		t.Error("an empty folder knows something")
	}
	for _, d := range want {
		must(t, b.lazy.Forget(t.Context(), d))
		must(t, b.stored.Remove(d))
	}
	must(t, b.lazy.images.sweep(time.Hour, b.lazy.absent))
	if got := b.lazy.LayersOf(image.manifest); len(got) != 2 {
		t.Error("what was noted just now is swept")
	}
	b.start(nil)
	if got := b.lazy.LayersOf(image.manifest); got != nil {
		t.Errorf("of layers that are gone is left %v", got)
	}
}

func TestImagesOnDisk(t *testing.T) {
	m := mountables{dir: t.TempDir()}
	img := imageWith("app", "base", "app")
	must(t, m.put(img))
	img.name = "registry.example/app:v2"
	must(t, m.put(img))
	for _, tag := range []string{"v1", "v2"} {
		if got, err := m.named("registry.example/app:" + tag); err != nil || got != img.manifest {
			t.Errorf("%s is %q, %v", tag, got, err)
		}
	}
	// A tag means what was looked at last under it.
	next := imageWith("app", "base", "next")
	next.manifest = named("next")
	old := time.Now().Add(-time.Hour)
	must(t, os.Chtimes(m.path(img.manifest), old, old))
	must(t, m.put(next))
	if got, err := m.named("registry.example/app:v1"); err != nil || got != next.manifest {
		t.Errorf("v1 is %q, %v", got, err)
	}
	must(t, os.Chtimes(m.path(next.manifest), old.Add(-time.Hour), old.Add(-time.Hour)))
	img.name = "registry.example/app:v1"
	must(t, m.put(img))
	if got, err := m.named("registry.example/app:v1"); err != nil || got != img.manifest {
		t.Errorf("v1 is %q again, %v", got, err)
	}
	for i := range 2 * maxNames {
		img.name = fmt.Sprint("registry.example/app:t", i)
		must(t, m.put(img))
	}
	if known, err := m.get(img.manifest); err != nil || len(known.Names) != maxNames || !slices.Equal(known.Layers, img.digests()) {
		t.Errorf("known %+v, %v", known, err)
	}
	must(t, os.WriteFile(m.path(img.manifest), []byte(`{"layers": ["sha256:../x"]}`), 0o600))
	if _, err := m.get(img.manifest); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("damaged: %v", err)
	}
	must(t, m.sweep(0, func(digest.Digest) bool { return false }))
	if left, err := filepath.Glob(filepath.Join(m.dir, "*")); err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
}
