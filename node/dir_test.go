package node

import (
	"os"
	"path/filepath"
	"testing"
)

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
