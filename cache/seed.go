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

// Seed writes an index for content that was put into dir/blobs and dir/layers by other means (a machine
// image with its cache baked in; a benchmark), and takes the word of entries for it that is
// Complete, or how much of it (of a layer: how many chunks) is there from the beginning: no content is read, so Check it where
// the source is not trusted. A layer's folder is one that another store made. An entry without a Form is a blob. dir must not be in use and must have no index yet. Whatever
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
		if e.Form == FormLayer {
			if err := seedLayer(dir, e, key, seq, rows); err != nil {
				return errors.Join(fmt.Errorf("seed the cache in %s: %w", dir, err), x.close())
			}
		} else {
			seedBlob(e, key, seq, rows)
		}
		if len(rows) >= seedRows {
			if err := x.commit(rows); err != nil {
				return errors.Join(err, x.close())
			}
			clear(rows)
		}
	}
	return errors.Join(x.commit(rows), x.close())
}

func seedBlob(e Entry, key string, seq uint64, rows map[rowKey][]byte) {
	r := blobRow{size: e.SizeBytes, allocated: e.AllocatedBytes, seq: seq, usedAt: e.UsedAt.UnixNano(), complete: e.Complete}
	if !r.complete {
		r.parts = newBitmap(partsOf(e.SizeBytes))
		for part := range e.PresentBytes / partBytes {
			r.parts.set(part)
		}
	}
	rows[rowKey{tableBlobs, key}] = sealRow(tableBlobs, key, r.encode())
}

func seedLayer(dir string, e Entry, key string, seq uint64, rows map[rowKey][]byte) error {
	info, err := readInfo((&Store{o: Options{Dir: dir}}).layerDir(e.Digest), e.Digest)
	if err != nil {
		return fmt.Errorf("layer %s: %w", e.Digest, err)
	}
	r := layerRow{info: info, allocated: e.AllocatedBytes, seq: seq, usedAt: e.UsedAt.UnixNano(), complete: e.Complete || info.chunks == 0}
	rows[rowKey{tableLayers, key}] = sealRow(tableLayers, key, r.encode())
	if r.complete {
		return nil
	}
	marks := newBitmap(info.chunks)
	for chunk := range min(int64(e.PresentChunks), info.chunks-1) {
		marks.set(chunk)
	}
	for n := range segmentsOf(info.chunks) {
		key := marksKey(key, n)
		if content := encodeMarks(marks.segment(n, info.chunks)); content != nil {
			rows[rowKey{tableMarks, key}] = sealRow(tableMarks, key, content)
		}
	}
	return nil
}
