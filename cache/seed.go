package cache

import (
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"os"
	"path/filepath"

	"accel"
)

// seedRows are committed at a time.
const seedRows = 20_000

// Seed writes an index for content that was put into dir/blobs by other means (a machine
// image with its cache baked in; a benchmark), and takes the word of entries for it that is
// Complete, or how much of it is there from the beginning: nothing is read, so Check it where
// the source is not trusted. dir must not be in use and must have no index yet. Whatever
// Seed is not told of, Run hashes and takes in by itself.
func Seed(dir string, entries iter.Seq[Entry]) error {
	lock, err := lockDir(filepath.Join(dir, "lock"))
	if err != nil {
		return err
	}
	defer lock.Close()
	if _, err := os.Stat(filepath.Join(dir, "index.db")); !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: the cache in %s has an index already", accel.ErrConflict, dir)
	}
	none := func(string, string, []byte) error { return nil } // it is new
	x, err := openIndex(filepath.Join(dir, "index.db"), slog.New(slog.DiscardHandler), func() {}, none)
	if err != nil {
		return fmt.Errorf("seed the cache in %s: %w", dir, err)
	}
	seq := uint64(0)
	rows := map[rowKey][]byte{}
	for e := range entries {
		key, err := keyOf(e.Digest)
		if err != nil {
			return errors.Join(err, x.close())
		}
		seq++
		r := blobRow{size: e.SizeBytes, allocated: e.AllocatedBytes, seq: seq, usedAt: e.UsedAt.UnixNano(), complete: e.Complete}
		if !r.complete {
			r.parts = newBitmap(partsOf(e.SizeBytes))
			for part := range e.PresentBytes / partBytes {
				r.parts.set(part)
			}
		}
		rows[rowKey{tableBlobs, key}] = sealRow(tableBlobs, key, r.encode())
		if len(rows) == seedRows {
			if err := x.commit(rows); err != nil {
				return errors.Join(err, x.close())
			}
			clear(rows)
		}
	}
	return errors.Join(x.commit(rows), x.close())
}
