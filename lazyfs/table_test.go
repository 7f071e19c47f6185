package lazyfs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"accel"
)

// chunks are two files: one of two chunks, one of one.
var chunks = []accel.Chunk{
	{BlobOffset: 100, BlobBytes: 50, DataOffset: 0, Bytes: 4096, Digest: [32]byte{1}},
	{BlobOffset: 150, BlobBytes: 1 << 40, InnerOffset: 1 << 27, DataOffset: 4096, Bytes: 1000, Digest: [32]byte{2}},
	{BlobOffset: 1 << 47, BlobBytes: 7, DataOffset: 8192, Bytes: 10, Digest: [32]byte{3}},
}

func tableBytes(dataBytes int64, chunks []accel.Chunk) []byte {
	var b bytes.Buffer
	must(writeTable(&b, dataBytes, len(chunks), func(i int) accel.Chunk { return chunks[i] }))
	return b.Bytes()
}

func openBytes(t *testing.T, b []byte) (*Table, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "table")
	must(os.WriteFile(path, b, 0o600))
	return OpenTable(path)
}

func TestTable(t *testing.T) {
	table, err := openBytes(t, tableBytes(12288, chunks))
	if err != nil {
		t.Fatal(err)
	}
	if table.Len() != len(chunks) || table.DataBytes() != 12288 {
		t.Errorf("%d chunks of %d bytes", table.Len(), table.DataBytes())
	}
	for i, want := range chunks {
		if got := table.At(i); got != want {
			t.Errorf("%d: %+v, want %+v", i, got, want)
		}
	}
	for at, want := range map[int64]int{-1: -1, 0: 0, 4095: 0, 4096: 1, 5095: 1, 5096: -1, 8191: -1, 8192: 2, 8201: 2, 8202: -1, 12288: -1, 1 << 62: -1} {
		if got := table.Find(at); got != want {
			t.Errorf("byte %d is in chunk %d, want %d", at, got, want)
		}
	}
	must(table.Close())
	must(table.Close())
}

func TestEmptyTable(t *testing.T) {
	table, err := openBytes(t, tableBytes(0, nil))
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	if table.Len() != 0 || table.Find(0) != -1 {
		t.Error("not empty")
	}
}

// TestDamagedTable: whichever bit is wrong, and wherever the file ends.
func TestDamagedTable(t *testing.T) {
	good := tableBytes(12288, chunks)
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 1 << (i % 8)
		if table, err := openBytes(t, bad); !errors.Is(err, ErrDamaged) {
			t.Errorf("byte %d: %v, %v", i, table, err)
		}
		if table, err := openBytes(t, good[:i]); !errors.Is(err, ErrDamaged) {
			t.Errorf("%d bytes: %v, %v", i, table, err)
		}
	}
	if _, err := openBytes(t, append(bytes.Clone(good), 0)); !errors.Is(err, ErrDamaged) {
		t.Error(err)
	}
	for name, bad := range map[string]accel.Chunk{
		"overlaps":     {BlobBytes: 1, DataOffset: 8200, Bytes: 10},
		"outside":      {BlobBytes: 1, DataOffset: 12280, Bytes: 10},
		"is nowhere":   {BlobBytes: 1, DataOffset: -4096, Bytes: 10},
		"is empty":     {BlobBytes: 1, DataOffset: 10000},
		"has no blob":  {DataOffset: 10000, Bytes: 10},
		"is before it": {BlobOffset: -1, BlobBytes: 1, DataOffset: 10000, Bytes: 10},
	} {
		if _, err := openBytes(t, tableBytes(12288, append(chunks[:len(chunks):len(chunks)], bad))); !errors.Is(err, ErrDamaged) {
			t.Errorf("a chunk that %s: %v", name, err)
		}
	}
	if _, err := OpenTable(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// A file that is cut short under a table is an error; a mistake of ours stays a panic.
func TestGuarded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "table")
	if err := os.WriteFile(path, tableBytes(12288, chunks), 0o600); err != nil {
		t.Fatal(err)
	}
	table, err := OpenTable(path)
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	mapped := table.mapped
	for name, use := range map[string]func() error{
		"read":  func() error { return fmt.Errorf("read %v", table.At(0)) },
		"check": func() error { _, err := parseTable(mapped); return err },
	} {
		if err := Guarded(use); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
	defer func() {
		if recover() == nil {
			t.Error("a mistake was taken for damage")
		}
	}()
	_ = Guarded(func() error { panic("a mistake") })
}
