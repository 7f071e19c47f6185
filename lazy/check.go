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

	"accel"
	"accel/cache"
	"accel/internal/deflate"
	"accel/lazyfs"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

const (
	// checkAgain is how long a DiffID that could not be computed waits for another try, doubled each time up to
	// checkAgainMost: a try may read all of the blob.
	checkAgain, checkAgainMost = time.Minute, time.Hour
	// claimTime is how long a layer with claims may be open until they are checked though it is not complete. A
	// registry that keeps one chunk back, or a node that fetches nothing in the background, would have lies never found.
	claimTime = 10 * time.Minute
	// sweepTime is how often what is known of evicted layers is removed.
	sweepTime = time.Hour
	// maxInflatedBytes is what a layer may inflate to; gzip packs up to 1032:1.
	maxInflatedBytes = 128 << 30
)

// wantCheck has a layer's DiffID computed when all of it is there and an image that nobody signed has made claims
// about it.
func (l *Lazy) wantCheck(y *openLayer) {
	if !y.Complete() || !l.unchecked(y) {
		return
	}
	select {
	case l.checks <- y.Digest():
	default: // overdue comes to it
	}
}

// unchecked reports whether there are claims about a layer that nobody has compared.
func (l *Lazy) unchecked(y *openLayer) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(y.origin.Claims) > 0 && y.origin.DiffID == ""
}

// check computes DiffIDs, one at a time, until ctx ends.
func (l *Lazy) check(ctx context.Context) error {
	tick := time.NewTicker(checkAgain)
	defer tick.Stop()
	due := dues{}
	swept := time.Now()
	for {
		var these []digest.Digest
		select {
		case <-ctx.Done():
			return nil
		case d := <-l.checks:
			if !due.putOff(d, time.Now()) {
				these = append(these, d)
			}
		case now := <-tick.C:
			these = due.now(now, l.claimed())
			if now.Sub(swept) > sweepTime {
				swept = now
				if err := errors.Join(l.sweepOrigins(ctx), l.images.sweep(2*resolveTime, l.absent)); err != nil && ctx.Err() == nil {
					l.o.Log.Warn("what is known of layers that are gone stays", "error", err)
				}
			}
		}
		for _, d := range these {
			err := l.checkClaims(ctx, d)
			if ctx.Err() != nil {
				return nil //nolint:nilerr // asked to stop
			}
			if err != nil && !errors.Is(err, accel.ErrNotFound) { // else it was forgotten meanwhile
				again := due.failed(d, time.Now())
				l.o.Log.Warn("what an image claims about a layer is not checked yet", "layer", d, "error", err, "again", again)
			}
		}
	}
}

// claimed are the open layers whose claims are to be compared; true: all of the layer is there.
func (l *Lazy) claimed() map[digest.Digest]bool {
	l.mu.Lock()
	all := make([]*openLayer, 0, len(l.open))
	for _, y := range l.open {
		all = append(all, y)
	}
	l.mu.Unlock()
	claimed := map[digest.Digest]bool{}
	for _, y := range all {
		if l.unchecked(y) {
			claimed[y.Digest()] = y.Complete()
		}
	}
	return claimed
}

// dues say when claims about layers are compared that were not when their layers were complete.
type dues map[digest.Digest]*due

type due struct {
	at    time.Time
	pause time.Duration // after the last failure; zero: it was not tried
}

// now gives those that are due, of the layers with claims that are open, and forgets the others.
func (q dues) now(now time.Time, claimed map[digest.Digest]bool) (these []digest.Digest) {
	for d := range q {
		if _, still := claimed[d]; !still {
			delete(q, d)
		}
	}
	for d, complete := range claimed {
		if q[d] == nil {
			q[d] = &due{at: now.Add(claimTime)}
		}
		if complete && q[d].pause == 0 || !now.Before(q[d].at) {
			these = append(these, d)
		}
	}
	return these
}

// putOff reports whether a layer's last try failed, and not long ago.
func (q dues) putOff(d digest.Digest, now time.Time) bool {
	return q[d] != nil && q[d].pause > 0 && now.Before(q[d].at)
}

// failed puts a layer off, and says for how long.
func (q dues) failed(d digest.Digest, now time.Time) time.Duration {
	if q[d] == nil {
		q[d] = &due{}
	}
	q[d].pause = min(max(2*q[d].pause, checkAgain), checkAgainMost)
	q[d].at = now.Add(q[d].pause)
	return q[d].pause
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
	lies := slices.DeleteFunc(o.Claims, func(c claim) bool { return c.DiffID == diffID })
	o.Claims, o.DiffID = nil, diffID
	if len(lies) > 0 {
		// First, so that it is known whatever becomes of the rest, and of the layer.
		if err := l.liars.put(d, diffID); err != nil {
			return fmt.Errorf("remember the DiffID of layer %s: %w", d, err)
		}
	}
	l.mu.Lock()
	if y := l.open[d]; y != nil {
		y.origin = o // from now on nobody gets the layer under a false claim, and who has it is told to Observe
	}
	if len(lies) > 0 {
		l.dropAnswers(d)
	}
	l.mu.Unlock()
	var errs []error
	for _, c := range lies {
		l.metrics.liars.Inc()
		l.o.Log.Error("an image lies about its layers; the snapshot is set aside", "chain", c.Chain, "layer", d, "claimed", c.DiffID, "diffID", diffID)
		errs = append(errs, l.o.SetAside(ctx, d, c.Chain, lieOf(d, c.DiffID, diffID)))
	}
	if err := errors.Join(errs...); err != nil {
		l.mu.Lock()
		if y := l.open[d]; y != nil {
			y.origin.Claims, y.origin.DiffID = append(slices.Clone(y.origin.Claims), lies...), "" // so that it is tried again
		}
		l.mu.Unlock()
		return err
	}
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
	n, err := io.Copy(inflated, io.LimitReader(deflate.NewReader(raw), maxInflatedBytes+1))
	if err != nil {
		return "", err
	}
	if n > maxInflatedBytes {
		return "", fmt.Errorf("%w: it inflates to more than %d bytes", accel.ErrInvalid, int64(maxInflatedBytes))
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
