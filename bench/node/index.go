package main

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"

	"accel"
	"accel/bench/report"
	"accel/cache"

	"github.com/opencontainers/go-digest"
	"go.etcd.io/bbolt"
)

const (
	partBytes   = 1 << 20
	blobParts   = 128       // of each blob; the last of them is missing, so that the index has a bitmap
	wantedParts = 1_000_000 // present
	starts      = 5
	nodeStore   = "cache" // the store's folder in the node's
)

// index measures the start over a million parts, which nobody has fetched: one
// blob is filled, and its row and a sparse file are copied for the others.
func index(ctx context.Context, s setting, r *report.Report) (err error) {
	dir, err := os.MkdirTemp(s.dir, "indexed-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	store := filepath.Join(dir, "data", nodeStore)
	if err := fillOne(ctx, store); err != nil {
		return fmt.Errorf("fill a blob: %w", err)
	}
	blobs := (wantedParts + blobParts - 2) / (blobParts - 1)
	if err := multiply(store, blobs); err != nil {
		return fmt.Errorf("copy its row: %w", err)
	}
	info, err := os.Stat(filepath.Join(store, "index.db"))
	if err != nil {
		return err
	}
	parts := float64(blobs * (blobParts - 1))
	r.Add("index for each 1 MiB part", float64(info.Size())/parts, "B", fmt.Sprintf("%d blobs of %d MiB with a part missing in each", blobs, blobParts))
	var took []outcome
	for range starts {
		n, err := startNode(ctx, dir, "registry.invalid", false)
		if err != nil {
			return err
		}
		o := outcome{Seconds: n.started.Seconds()}
		o.memory, err = n.memory()
		if err := errors.Join(err, n.requireBlobs(ctx, blobs), n.stop()); err != nil {
			return err
		}
		took = append(took, o)
	}
	r.AtMost("start with 1 million parts indexed", median(took, func(o outcome) float64 { return o.Seconds }), startSeconds, "s", fmt.Sprintf("from exec to the first good /healthz; median of %d", starts))
	r.Add("anonymous memory after that start", most(took, func(o outcome) float64 { return o.memory.anonymous }), "MB", "")
	return nil
}

// zeros is a registry whose blobs are empty of meaning.
type zeros struct{}

func (zeros) Fetch(_ context.Context, offset, length int64) (cache.Stream, error) {
	return cache.Stream{ReadCloser: io.NopCloser(io.LimitReader(zeroReader{}, length)), From: offset}, nil
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// fillOne has a store with one blob that lacks its last part.
func fillOne(ctx context.Context, dir string) error {
	st, err := cache.Open(cache.Options{Dir: dir})
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	ran := make(chan error, 1)
	go func() { ran <- st.Run(ctx) }()
	b := accel.BlobDescriptor{Digest: digest.FromString("template"), SizeBytes: blobParts * partBytes}
	rd, err := st.OpenBlob(ctx, b, 0, (blobParts-1)*partBytes, zeros{})
	if err == nil {
		_, err = io.Copy(struct{ io.Writer }{io.Discard}, rd)
		err = errors.Join(err, rd.Close())
	}
	stop()
	return errors.Join(err, <-ran, st.Close())
}

// multiply copies the one blob's row under other digests. A row is a CRC over
// table, key and content, then the content; a key is a byte for the algorithm, then the hash.
func multiply(dir string, count int) (err error) {
	db, err := bbolt.Open(filepath.Join(dir, "index.db"), 0o600, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	const table, checksumBytes = "blobs", 4
	return db.Update(func(tx *bbolt.Tx) error {
		rows := tx.Bucket([]byte(table))
		first, row := rows.Cursor().First()
		if len(row) < checksumBytes {
			return errors.New("the index has no row of the blob")
		}
		algorithm, content := first[0], row[checksumBytes:]
		for i := 1; i < count; i++ {
			hash := sha256.Sum256(fmt.Append(nil, i))
			key := append([]byte{algorithm}, hash[:]...)
			sum := crc32.Checksum(append(append([]byte(table), key...), content...), crc32.MakeTable(crc32.Castagnoli))
			if err := rows.Put(key, append(binary.LittleEndian.AppendUint32(nil, sum), content...)); err != nil {
				return err
			}
			name := hex.EncodeToString(hash[:])
			folder := filepath.Join(dir, "blobs", "sha256", name[:2])
			if err := os.MkdirAll(folder, 0o700); err != nil {
				return err
			}
			if err := sparse(filepath.Join(folder, name)); err != nil {
				return err
			}
		}
		return nil
	})
}

func sparse(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(blobParts*partBytes), f.Close())
}
