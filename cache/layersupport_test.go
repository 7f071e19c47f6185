package cache

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/opencontainers/go-digest"
)

// testChunk is the size of a chunk of a testLayer. The real ones differ in size, which the store does not see.
const testChunk = 64 << 10

// testLayer is a layer whose table is the SHA-256 sums of its chunks, one after the other.
type testLayer struct {
	digest digest.Digest
	data   []byte
}

func layerOf(seed, chunks int) testLayer {
	data := content(seed, chunks*testChunk)
	return testLayer{digest.FromString(fmt.Sprint("layer ", seed)), data}
}

func (l testLayer) chunks() int { return len(l.data) / testChunk }

func (l testLayer) chunk(i int) []byte { return l.data[i*testChunk : (i+1)*testChunk] }

func (l testLayer) info() LayerInfo {
	return LayerInfo{Chunks: l.chunks(), DataBytes: int64(len(l.data)), FilesBytes: int64(l.chunks()*sha256.Size + 20_000)}
}

func (l testLayer) write(f LayerFiles) error {
	var table []byte
	for i := range l.chunks() {
		sum := sha256.Sum256(l.chunk(i))
		table = append(table, sum[:]...)
	}
	return errors.Join(
		os.WriteFile(f.Meta, bytes.Repeat([]byte("meta"), 2500), 0o600),
		os.WriteFile(f.Table, table, 0o600),
		os.WriteFile(f.TOC, bytes.Repeat([]byte("toc."), 2500), 0o600),
		os.WriteFile(f.Data, nil, 0o600),
		os.Truncate(f.Data, int64(len(l.data))),
	)
}

// verifyLayer is Options.VerifyLayer for testLayers.
func verifyLayer(ctx context.Context, _ digest.Digest, f LayerFiles, has func(int) bool, progress func(int64)) (wrong []int, err error) {
	table, err := os.ReadFile(f.Table)
	if err != nil {
		return nil, err
	}
	data, err := os.Open(f.Data)
	if err != nil {
		return nil, err
	}
	defer data.Close()
	chunk := make([]byte, testChunk)
	for i := range len(table) / sha256.Size {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if !has(i) {
			continue
		}
		_, err := data.ReadAt(chunk, int64(i*testChunk))
		if sum := sha256.Sum256(chunk); err != nil || !bytes.Equal(sum[:], table[i*sha256.Size:(i+1)*sha256.Size]) {
			wrong = append(wrong, i)
		}
		progress(testChunk)
	}
	return wrong, nil
}

// mustCreate makes a layer, which has to work.
func mustCreate(t testing.TB, s *Store, l testLayer) *Layer {
	t.Helper()
	kept, err := s.CreateLayer(t.Context(), l.digest, l.info(), l.write)
	if err != nil {
		t.Fatal(err)
	}
	return kept
}

// put writes chunks as a mount's filler does: room, data, fsync, marks.
func (l testLayer) put(kept *Layer, chunks ...int) error {
	release, err := kept.Reserve(int64(len(chunks)) * testChunk)
	if err != nil {
		return err
	}
	defer release()
	f, err := os.OpenFile(kept.Files().Data, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, i := range chunks {
		if _, err := f.WriteAt(l.chunk(i), int64(i*testChunk)); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return kept.Commit(chunks)
}

// right compares every marked chunk with what it has to be, and returns how many there are.
func (l testLayer) right(t testing.TB, kept *Layer) (n int) {
	t.Helper()
	f, err := os.Open(kept.Files().Data)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	has := kept.Has()
	got := make([]byte, testChunk)
	for i := range l.chunks() {
		if !has(i) {
			continue
		}
		n++
		if _, err := f.ReadAt(got, int64(i*testChunk)); err != nil || !bytes.Equal(got, l.chunk(i)) {
			t.Fatalf("chunk %d of %s is marked and not what it has to be, %v", i, l.digest, err)
		}
	}
	return n
}

func upTo(n int) []int {
	all := make([]int, n)
	for i := range all {
		all[i] = i
	}
	return all
}

func flipAt(path string, at int64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		return err
	}
	b[0] ^= 4
	_, err = f.WriteAt(b[:], at)
	return err
}
