package boltstore_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"accel"
	"accel/readiness"
	"accel/readiness/boltstore"

	"github.com/opencontainers/go-digest"
	"go.etcd.io/bbolt"
)

const pageBytes = 4096

// filled is the content of a store with some hundred records.
func filled(t *testing.T) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "whole.db")
	s, err := boltstore.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	tr := readiness.New(s, readiness.Options{})
	for range 3 {
		var evs []accel.PushEvent
		for i := range 150 {
			evs = append(evs, pushEvent(fmt.Sprint("t", i), digest.FromString(fmt.Sprint(i))))
		}
		if _, err := tr.Push(t.Context(), evs...); err != nil {
			t.Fatal(err)
		}
		w, err := tr.Claim(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := tr.Finish(t.Context(), w, accel.Target{Repository: w.Repository, Digest: w.Digest}, accel.Result{}, map[digest.Digest][]byte{w.Digest: make([]byte, 9000)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// The file grows by large steps; what lies behind the last page in use is of no interest.
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	used := int64(0)
	err = db.View(func(bt *bbolt.Tx) error { used = bt.Size(); return nil })
	if err != nil {
		t.Fatal(err)
	}
	return b[:used]
}

// use opens the file and does a bit of everything. It returns the first error.
func use(t *testing.T, path string) (opened bool, err error) {
	s, err := boltstore.Open(path)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	tr := readiness.New(s, readiness.Options{})
	ctx := t.Context()
	_, err = tr.List(ctx, readiness.Filter{Limit: 500})
	_, err2 := tr.Counts(ctx)
	_, _, err3 := tr.Events(ctx, 0, 0)
	_, err4 := tr.Push(ctx, pushEvent("t1", digest.FromString("new")), pushEvent("new", digest.FromString("1")))
	claim, cancel := context.WithCancel(ctx)
	defer cancel()
	w, err5 := tr.Claim(claim)
	if err5 == nil {
		err5 = tr.Fail(ctx, w, errors.New("x"))
	}
	err = errors.Join(err, err2, err3, err4, err5)
	if err == nil {
		err = s.Check(ctx)
	}
	return true, err
}

func TestDamagedFile(t *testing.T) {
	whole := filled(t)
	path := filepath.Join(t.TempDir(), "records.db")
	write := func(b []byte) {
		t.Helper()
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err) // an old mapping of the file must not see the new content
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(whole)
	if _, err := use(t, path); err != nil {
		t.Fatalf("the whole file: %v", err)
	}
	// What cannot be a store is refused when it is opened.
	for name, b := range map[string][]byte{
		"text": []byte("not a store\n"), "zeros": make([]byte, len(whole)), "half": whole[:len(whole)/2/pageBytes*pageBytes],
		"one page": whole[:pageBytes], "a few bytes": whole[:100], "odd": whole[:len(whole)/3+7],
		"all but a page": whole[:len(whole)-pageBytes],
	} {
		write(b)
		if opened, err := use(t, path); opened || !errors.Is(err, boltstore.ErrDamaged) {
			t.Errorf("%s: opened %v, error %v, want ErrDamaged from Open", name, opened, err)
		}
	}
	// Damage inside may be met later or (in a free page or a value) never, but it is an error, no panic.
	rng := rand.New(rand.NewPCG(1, 2))
	damaged := func(name string, change func(page []byte)) {
		found := 0
		for at := 0; at+pageBytes <= len(whole); at += pageBytes {
			b := append([]byte(nil), whole...)
			change(b[at : at+pageBytes])
			write(b)
			if _, err := use(t, path); err != nil {
				found++
			}
		}
		t.Logf("%s: %d of %d damaged pages were noticed", name, found, len(whole)/pageBytes)
	}
	damaged("zeroed", func(p []byte) { clear(p) })
	damaged("noise", func(p []byte) {
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
	})
	damaged("a header of noise", func(p []byte) {
		for i := 8; i < 64; i++ { // after the page's own number
			p[i] = byte(rng.Uint32())
		}
	})
	damaged("a flipped byte", func(p []byte) { p[rng.IntN(256)] ^= 1 << rng.IntN(8) })
}

// TestCutWhileOpen: the file is cut under the running service; what is lost is an error.
func TestCutWhileOpen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "records.db")
	if err := os.WriteFile(path, filled(t), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := boltstore.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := os.Truncate(path, 2*pageBytes); err != nil {
		t.Fatal(err)
	}
	tr := readiness.New(s, readiness.Options{})
	if _, err := tr.List(t.Context(), readiness.Filter{}); !errors.Is(err, boltstore.ErrDamaged) {
		t.Errorf("read: %v, want ErrDamaged", err)
	}
	if _, err := tr.Push(t.Context(), pushEvent("t1", digest.FromString("x"))); err == nil {
		t.Error("a push into a file that was cut is no error")
	}
}
