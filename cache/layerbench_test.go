package cache

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
)

// BenchmarkOpenLayers opens a store of 20 layers with 30,000 chunks each, every other one of them there.
func BenchmarkOpenLayers(b *testing.B) {
	dir := filepath.Join(b.TempDir(), "layers")
	s := open(b, Options{Dir: dir})
	const chunks = 30_000
	half := make([]int, 0, chunks/2)
	for i := 0; i < chunks; i += 2 {
		half = append(half, i)
	}
	for i := range 20 {
		kept := emptyLayer(b, s, i, chunks)
		if err := kept.Commit(half); err != nil {
			b.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		s, err := Open(Options{Dir: dir, Log: quiet()})
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if len(s.layers) != 20 || s.List()[0].PresentChunks != chunks/2 {
			b.Errorf("%+v", s.List()[0])
		}
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkLayerCommit marks 64 chunks of a layer of 300,000 at a time, in order.
func BenchmarkLayerCommit(b *testing.B) {
	s := open(b, Options{})
	const chunks, step = 300_000, 64
	kept := emptyLayer(b, s, 0, chunks)
	some := make([]int, step)
	for n := 0; b.Loop(); n++ {
		for i := range some {
			some[i] = (n*step + i) % chunks
		}
		if err := kept.Commit(some); err != nil {
			b.Fatal(err)
		}
	}
}

// emptyLayer is a layer with chunks of a byte that nobody reads.
func emptyLayer(b *testing.B, s *Store, i, chunks int) *Layer {
	b.Helper()
	var name [8]byte
	binary.LittleEndian.PutUint64(name[:], uint64(i))
	kept, err := s.CreateLayer(b.Context(), digest.FromBytes(name[:]), LayerInfo{Chunks: chunks, DataBytes: int64(chunks)}, func(f LayerFiles) error {
		return errors.Join(os.WriteFile(f.Meta, nil, 0o600), os.WriteFile(f.Table, nil, 0o600), os.WriteFile(f.TOC, nil, 0o600),
			os.WriteFile(f.Data, nil, 0o600), os.Truncate(f.Data, int64(chunks)))
	})
	if err != nil {
		b.Fatal(err)
	}
	return kept
}
