package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"accel/bench/report"
	"accel/cache"

	"github.com/opencontainers/go-digest"
)

const (
	partBytes   = 1 << 20
	blobParts   = 128       // of each blob; the last of them is missing, so that the index has a bitmap
	wantedParts = 1_000_000 // present
	starts      = 5
	nodeStore   = "cache" // the store's folder in the node's
)

// index measures the start over a million parts, which nobody has fetched.
func index(ctx context.Context, s setting, r *report.Report) (err error) {
	dir, err := os.MkdirTemp(s.dir, "indexed-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	store := filepath.Join(dir, "data", nodeStore)
	if err := os.MkdirAll(store, 0o700); err != nil {
		return err
	}
	blobs := (wantedParts + blobParts - 2) / (blobParts - 1)
	if err := seed(store, blobs); err != nil {
		return fmt.Errorf("make the store: %w", err)
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

// seed makes a store of count blobs, sparse files each of which lacks its last part.
func seed(dir string, count int) error {
	var failed error
	err := cache.Seed(dir, func(yield func(cache.Entry) bool) {
		for i := range count {
			d := digest.FromString(fmt.Sprint(i))
			folder := filepath.Join(dir, "blobs", d.Algorithm().String(), d.Encoded()[:2])
			if failed = os.MkdirAll(folder, 0o700); failed != nil {
				return
			}
			if failed = sparse(filepath.Join(folder, d.Encoded())); failed != nil {
				return
			}
			if !yield(cache.Entry{Digest: d, SizeBytes: blobParts * partBytes, PresentBytes: (blobParts - 1) * partBytes, UsedAt: time.Now()}) {
				return
			}
		}
	})
	return errors.Join(failed, err)
}

func sparse(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(blobParts*partBytes), f.Close())
}
