package node

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"accel/snapshot"

	"github.com/opencontainers/go-digest"
)

// TestLiesAreNotHeldAgainstOthers: an image that claims another's chain ID must not have that one's snapshot set aside.
func TestLiesAreNotHeldAgainstOthers(t *testing.T) {
	honest, liar, chain := digest.FromString("honest"), digest.FromString("liar"), digest.FromString("chain")
	all := []snapshot.LazySnapshot{
		{ID: "1", Layer: honest, Request: snapshot.Request{Chain: chain}},
		{ID: "2", Layer: liar, Request: snapshot.Request{Chain: chain}},
		{ID: "3", Layer: liar, Request: snapshot.Request{Chain: digest.FromString("its own")}},
	}
	if ids := liarsAmong(all, liar, chain); !slices.Equal(ids, []string{"2"}) {
		t.Errorf("set aside: %s", ids)
	}
}

// TestFolderWithoutSymlinks: mounts are found by the path that the kernel has for them.
func TestFolderWithoutSymlinks(t *testing.T) {
	at, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(at)
	if err := os.Symlink(at, filepath.Join(at, "link")); err != nil {
		t.Fatal(err)
	}
	for given, want := range map[string]string{
		filepath.Join(at, "link", "data"): filepath.Join(at, "data"), "data": filepath.Join(at, "data"), filepath.Join("link", "new", "data"): filepath.Join(at, "new", "data"),
	} {
		if got, err := resolved(given); err != nil || got != want {
			t.Errorf("%s is %s, %v; want %s", given, got, err, want)
		}
	}
}
