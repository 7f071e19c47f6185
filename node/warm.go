package node

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

const (
	// pollTime is one long poll for warms; under the minute after which many proxies cut.
	pollTime = 50 * time.Second
	// tellEvery is how often the server is told how far a warm has come.
	tellEvery = 15 * time.Second
	// warmAttempts are made before a warm has Failed; the registry's own retries come
	// under each of them.
	warmAttempts = 3
)

// warms brings the images ahead that the server asks for, until ctx ends.
func (n *Node) warms(ctx context.Context) error {
	var pause pauses
	wait := pollTime
	for ctx.Err() == nil {
		var wanted []accel.Warm
		err := within(ctx, pollTime+answerTime, func(ctx context.Context) (err error) {
			wanted, err = n.server.NextWarms(ctx, n.o.Name, wait)
			return err
		})
		if ctx.Err() != nil {
			return nil //nolint:nilerr // asked to stop
		}
		n.server.tried("warms", err)
		if err != nil {
			wait = 0 // so that it is known at once when the server is back
			pause.wait(ctx)
			continue
		}
		wait = pollTime
		pause.reset()
		var g errgroup.Group
		g.SetLimit(n.o.Warms)
		for _, w := range wanted {
			g.Go(func() error {
				n.warm(ctx, w)
				return nil
			})
		}
		if err := g.Wait(); err != nil {
			return err
		}
	}
	return nil
}

// errUnwanted: the server does not want the warm any more.
var errUnwanted = errors.New("no longer wanted")

// warm brings one image and tells the server how that went. When ctx ends before, the server
// hears nothing: it asks the next daemon again.
func (n *Node) warm(ctx context.Context, w accel.Warm) {
	log := n.o.Log.With("image", w.Image, "warm", w.ID)
	w.State, w.Reason = accel.WarmFetching, ""
	if err := n.tell(ctx, w); err != nil {
		log.Debug("a warm is not begun", "error", err)
		return
	}
	fetching, cancel := context.WithCancelCause(ctx)
	var fetched, total atomic.Int64
	told := make(chan struct{})
	go func() {
		defer close(told)
		for sleep(fetching, tellEvery); fetching.Err() == nil; sleep(fetching, tellEvery) {
			now := w
			now.FetchedBytes, now.TotalBytes = fetched.Load(), total.Load()
			if err := n.tell(fetching, now); errors.Is(err, errUnwanted) {
				cancel(err)
			}
		}
	}()
	d, err := n.fetchTried(fetching, w.Image, func(f, t int64) {
		fetched.Store(f)
		total.Store(t)
	})
	unwanted := errors.Is(context.Cause(fetching), errUnwanted)
	cancel(context.Canceled)
	<-told
	if unwanted || ctx.Err() != nil {
		return
	}
	w.State = accel.WarmDone
	if err != nil {
		w.State, w.Reason = accel.WarmFailed, err.Error()
	}
	if d != "" {
		w.Digest = d
	}
	w.FetchedBytes, w.TotalBytes = fetched.Load(), total.Load()
	n.server.ended.WithLabelValues(string(w.State)).Inc()
	log.Info("brought ahead", "state", w.State, "fetchedBytes", w.FetchedBytes, "reason", w.Reason)
	if err := n.tell(ctx, w); err != nil {
		log.Warn("the server does not know how a warm ended; it will ask again", "error", err)
	}
}

// tell reports a warm; errUnwanted when the server has dropped it. A server that does not
// answer is asked a few times more.
func (n *Node) tell(ctx context.Context, w accel.Warm) error {
	var pause pauses
	var err error
	for range warmAttempts {
		err = within(ctx, answerTime, func(ctx context.Context) error { return n.server.ReportWarm(ctx, w) })
		switch {
		case err == nil:
			return nil
		case errors.Is(err, accel.ErrNotFound), errors.Is(err, accel.ErrConflict):
			return fmt.Errorf("%w: %w", errUnwanted, err)
		case ctx.Err() != nil:
			return err
		}
		pause.wait(ctx)
	}
	return err
}

// fetchTried brings an image, several times where another try may help.
func (n *Node) fetchTried(ctx context.Context, image string, progress func(fetched, total int64)) (d digest.Digest, err error) {
	var pause pauses
	for attempt := 1; ; attempt++ {
		if d, err = n.bring(ctx, image, progress); err == nil || attempt == warmAttempts || ctx.Err() != nil || hopeless(err) {
			return d, err
		}
		n.o.Log.Debug("an image could not be brought ahead; trying again", "image", image, "error", err)
		if after := accel.RetryAfter(err); after > 0 {
			sleep(ctx, min(after, maxPause))
		}
		pause.wait(ctx)
	}
}

// What a warm brings.
const (
	WarmAuto  = "auto"  // as WarmLazy where containerd has asked this node for snapshots, else as WarmBlobs
	WarmLazy  = "lazy"  // what a lazy mount's start reads; blobs where an image cannot be mounted lazily
	WarmBlobs = "blobs" // an image's blobs, for clients of the mirror
)

// bring fetches an image in the form that it will be started from.
func (n *Node) bring(ctx context.Context, image string, progress func(fetched, total int64)) (digest.Digest, error) {
	if n.mounts != nil && (n.o.WarmForm == WarmLazy || n.o.WarmForm != WarmBlobs && n.mounts.used()) {
		d, err := n.mounts.lazy.Warm(ctx, image, n.o.WarmAll, progress)
		if err == nil || ctx.Err() != nil {
			return d, err
		}
		// Then containerd will pull it as ever, through the mirror.
		n.o.Log.Info("an image is brought ahead as blobs", "image", image, "reason", err)
	}
	return n.fetch(ctx, image, progress)
}

// hopeless reports whether a person has to mend err.
func hopeless(err error) bool {
	if accel.IsPermanent(err) {
		return true
	}
	for _, final := range []error{accel.ErrNotFound, accel.ErrInvalid, accel.ErrUnauthenticated, accel.ErrForbidden, accel.ErrRegistryNotAllowed} {
		if errors.Is(err, final) {
			return true
		}
	}
	return false
}
