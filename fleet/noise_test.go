package fleet_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"accel"
	"accel/fleet"
)

// TestNoise overwrites some bytes of a file, in half of the runs at the heads of pages. Whatever
// is hit, the fleet opens, and goes on or says what is wrong.
func TestNoise(t *testing.T) {
	b := newBed(t, fleet.Options{Rules: everything()})
	for i := range 6 {
		b.seen(node(fmt.Sprint("n", i)))
	}
	for i := range 40 {
		b.ready(fmt.Sprint("image", i), fmt.Sprint("v", i))
	}
	must(t, b.Close())
	raw, err := os.ReadFile(b.path)
	must(t, err)
	healed := 0
	const runs, pageBytes = 60, 4096
	for seed := range runs {
		r := rand.New(rand.NewPCG(uint64(seed), 1))
		noisy := slices.Clone(raw)
		for range 1 + r.IntN(8) {
			at := r.IntN(len(noisy))
			if seed%2 == 0 {
				at = at/pageBytes*pageBytes + r.IntN(16)
			}
			for k := range min(1+r.IntN(64), len(noisy)-at) {
				noisy[at+k] = byte(r.Uint32())
			}
		}
		path := filepath.Join(t.TempDir(), "fleet.db")
		must(t, os.WriteFile(path, noisy, 0o600))
		f, err := fleet.Open(path, b.o)
		if err != nil {
			t.Errorf("seed %d: %v", seed, err)
			continue
		}
		if _, err := os.Stat(path + ".damaged"); err == nil {
			healed++
		}
		for i := range 6 {
			if _, err := f.Seen(t.Context(), node(fmt.Sprint("n", i))); err != nil && !errors.Is(err, fleet.ErrDamaged) {
				t.Errorf("seed %d: %v", seed, err)
			}
		}
		if _, err := f.Want(t.Context(), accel.Reference{Registry: "registry.test", Repository: "x", Tag: "v1"}, nil); err != nil && !errors.Is(err, fleet.ErrDamaged) {
			t.Errorf("seed %d: %v", seed, err)
		}
		must(t, f.Close())
	}
	t.Logf("%d of %d files were set aside", healed, runs)
	b.open()
}
