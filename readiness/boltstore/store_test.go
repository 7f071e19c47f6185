package boltstore_test

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"accel"
	"accel/readiness"
	"accel/readiness/boltstore"
	"accel/readiness/storetest"

	"github.com/opencontainers/go-digest"
)

func open(t testing.TB, path string) *boltstore.Store {
	t.Helper()
	s, err := boltstore.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestConformance(t *testing.T) {
	storetest.Run(t, func(t *testing.T) readiness.Store { return open(t, filepath.Join(t.TempDir(), "records.db")) })
}

func pushEvent(tag string, d digest.Digest) accel.PushEvent {
	return accel.PushEvent{Source: "hook", Registry: "registry.example", Repository: "team/app", Tag: tag, Digest: d}
}

func TestReopen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "made", "records.db")
	d := digest.FromString("a")
	s := open(t, path)
	recs, err := readiness.New(s, readiness.Options{}).Push(t.Context(), pushEvent("v1", d))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.Close(); err != nil {
			t.Fatalf("close: %v", err)
		}
	}
	if err := s.Update(t.Context(), func(readiness.Tx) error { return nil }); !errors.Is(err, boltstore.ErrClosed) {
		t.Errorf("update after Close: %v", err)
	}
	if err := s.View(t.Context(), func(readiness.Tx) error { return nil }); !errors.Is(err, boltstore.ErrClosed) {
		t.Errorf("view after Close: %v", err)
	}
	s = open(t, path)
	got, err := readiness.New(s, readiness.Options{}).Holder(t.Context(), "registry.example/team/app", "v1")
	if err != nil || got.ID != recs[0].ID || !got.DueAt.Equal(recs[0].DueAt) {
		t.Errorf("after reopening: %+v, %v; want %+v", got, err, recs[0])
	}
}

func TestLocked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "records.db")
	s := open(t, path)
	_, err := boltstore.Open(path)
	if !errors.Is(err, boltstore.ErrLocked) || !strings.Contains(err.Error(), path) {
		t.Fatalf("second open: %v, want ErrLocked with the file's name", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, path)
}
