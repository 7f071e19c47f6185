package lazy

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"time"

	"accel/cache"
	"accel/internal/deflate"
	"accel/lazyfs"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// checkAgain is how long a DiffID that could not be computed waits for another try.
const checkAgain = time.Minute

// wantCheck has a layer's DiffID computed when all of it is there and an image that nobody signed has made claims
// about it.
func (l *Lazy) wantCheck(y *openLayer) {
	l.mu.Lock()
	o := y.origin
	l.mu.Unlock()
	if len(o.Claims) == 0 || o.DiffID != "" || !y.Complete() {
		return
	}
	select {
	case l.checks <- y.Digest():
	default: // the next mount asks again
	}
}

// check computes DiffIDs, one at a time, until ctx ends.
func (l *Lazy) check(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case d := <-l.checks:
			if err := l.checkClaims(ctx, d); err != nil && ctx.Err() == nil {
				l.o.Log.Warn("what an image claims about a layer is not checked yet", "layer", d, "error", err)
				l.work.Go(func() {
					select {
					case <-ctx.Done():
					case <-time.After(checkAgain):
						select {
						case l.checks <- d:
						default:
						}
					}
				})
			}
		}
	}
}

// checkClaims reads a layer's blob once more, as a whole: only the tar that it inflates to has the DiffID that
// containerd goes by, and the mounts need a part of that alone.
func (l *Lazy) checkClaims(ctx context.Context, d digest.Digest) error {
	o, err := l.origins.get(d)
	if err != nil || o.DiffID != "" {
		return err
	}
	diffID, err := l.diffID(ctx, d, o)
	if err != nil {
		return err
	}
	unlock, err := l.locks.Lock(ctx, d.String())
	if err != nil {
		return err
	}
	defer unlock()
	if o, err = l.origins.get(d); err != nil {
		return err
	}
	liars := slices.Clone(o.Claims)
	o.Claims = slices.DeleteFunc(o.Claims, func(c claim) bool { return c.DiffID != diffID })
	o.DiffID = diffID
	liars = slices.DeleteFunc(liars, func(c claim) bool { return c.DiffID == diffID })
	var errs []error
	for _, c := range liars {
		l.metrics.liars.Inc()
		reason := fmt.Sprintf("an image claims that layer %s has DiffID %s; it is %s", d, c.DiffID, diffID)
		l.o.Log.Error("an image lies about its layers; the snapshot is set aside", "chain", c.Chain, "layer", d, "claimed", c.DiffID, "diffID", diffID)
		errs = append(errs, l.o.SetAside(ctx, c.Chain, reason))
	}
	if err := errors.Join(errs...); err != nil {
		return err // the claims stay, so that it is tried again
	}
	l.mu.Lock()
	if y := l.open[d]; y != nil {
		y.origin = o
	}
	l.mu.Unlock()
	return l.origins.put(d, o)
}

// diffID computes the digest of what the blob inflates to, and of the blob itself on the way.
func (l *Lazy) diffID(ctx context.Context, d digest.Digest, o origin) (digest.Digest, error) {
	var errs []error
	for _, repository := range o.Repositories {
		from, err := l.o.Registry.Source(repository, "")
		if err == nil {
			var r io.ReadCloser
			if r, err = l.blob(ctx, from, d, o.SizeBytes, 0, o.SizeBytes, true); err == nil {
				var got digest.Digest
				got, err = inflatedDigest(r, d)
				if err = errors.Join(err, r.Close()); err == nil {
					return got, nil
				}
			}
		}
		errs = append(errs, fmt.Errorf("%s: %w", repository, err))
	}
	return "", errors.Join(errs...)
}

func inflatedDigest(r io.Reader, want digest.Digest) (digest.Digest, error) {
	packed, inflated := want.Algorithm().Hash(), sha256.New()
	raw := bufio.NewReaderSize(io.TeeReader(r, packed), 1<<20)
	if _, err := io.Copy(inflated, deflate.NewReader(raw)); err != nil {
		return "", err
	}
	if _, err := io.Copy(io.Discard, raw); err != nil {
		return "", err
	}
	if got := digest.NewDigest(want.Algorithm(), packed); got != want {
		return "", fmt.Errorf("%w: it is %s", cache.ErrDigest, got)
	}
	return digest.NewDigest(digest.SHA256, inflated), nil
}

// Verify reads a layer of the store again; see VerifyLayer. Chunks that are wrong are taken from the mounts before
// it returns.
func (l *Lazy) Verify(ctx context.Context, d digest.Digest, f cache.LayerFiles, has func(int) bool, progress func(int64)) ([]int, error) {
	wrong, err := VerifyLayer(ctx, d, f, has, progress)
	if layer, open := l.host.Layer(d); open && len(wrong) > 0 {
		// One that was closed meanwhile has no mounts; the store would take an error for damage, and drop it.
		if err := layer.Forget(wrong...); err != nil && !errors.Is(err, lazyfs.ErrClosed) {
			return nil, err
		}
	}
	return wrong, err
}

// VerifyLayer reads the chunks that a layer is said to have and returns those whose content is not what
// the TOC says. An error means that it cannot be used. It is cache.Options.VerifyLayer.
func VerifyLayer(ctx context.Context, _ digest.Digest, f cache.LayerFiles, has func(int) bool, progress func(int64)) (wrong []int, err error) {
	table, err := lazyfs.OpenTable(f.Table)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, table.Close()) }()
	data, err := os.Open(f.Data)
	if err != nil {
		return nil, err
	}
	defer data.Close() // only read
	err = lazyfs.Guarded(func() error {
		wrong, err = wrongChunks(ctx, table, data, has, progress)
		return err
	})
	return wrong, err
}

func wrongChunks(ctx context.Context, table *lazyfs.Table, data *os.File, has func(int) bool, progress func(int64)) (wrong []int, err error) {
	var b []byte
	var data0 int64 // where content begins again; holes are not worth hashing
	for i := range table.Len() {
		if !has(i) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		c := table.At(i)
		if data0 <= c.DataOffset {
			if data0, err = unix.Seek(int(data.Fd()), c.DataOffset, unix.SEEK_DATA); err != nil {
				data0 = math.MaxInt64 // ENXIO: there is none any more
			}
		}
		if data0 >= c.DataOffset+c.Bytes {
			wrong = append(wrong, i)
			continue
		}
		b = slices.Grow(b[:0], int(c.Bytes))[:c.Bytes]
		if _, err := data.ReadAt(b, c.DataOffset); err != nil || sha256.Sum256(b) != c.Digest {
			wrong = append(wrong, i)
		}
		if progress != nil {
			progress(c.Bytes)
		}
	}
	return wrong, nil
}
