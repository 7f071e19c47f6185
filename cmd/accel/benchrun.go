package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"accel"
	"accel/node"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

const (
	benchNamespace = "accel-bench"
	// plainSnapshotter is what containerd unpacks with by itself.
	plainSnapshotter = "overlayfs"
	// letGoTime is how long containerd may take to let go of what was removed.
	letGoTime = time.Minute
)

// bench starts images one after the other.
type bench struct {
	live     *node.Client
	all      *containers
	past     remotes.Resolver // asks the registry itself, not the node's mirror
	port     int
	limit    time.Duration
	img      containerd.Image // that is there now; nil: none is
	manifest digest.Digest    // of the platform's, of the image that was there last
	layers   int64            // bytes, compressed
	plain    digest.Digest    // the manifest of which the node was told to fetch nothing ahead; empty: none
}

func (c *nodeConfig) bench(ctx context.Context, port int, limit time.Duration, say func(string)) (*bench, context.Context, error) {
	b := &bench{live: node.NewClient(c.Socket), port: port, limit: limit}
	if _, err := b.live.Starts(ctx); err != nil {
		b.live.Close()
		return nil, ctx, fmt.Errorf("the comparison is with this machine's node: %w (--socket)", err)
	}
	all, named, err := c.containers(ctx, benchNamespace, b.live, say)
	if err == nil {
		b.all = all
		b.past, err = c.resolver(ctx, "")
	}
	if err == nil {
		err = free(ctx, port)
	}
	if err != nil {
		return nil, ctx, errors.Join(err, b.close())
	}
	return b, named, nil
}

// close leaves nothing of the images behind in containerd, and has the node fetch ahead again. It has a time of its own: it comes
// after an interruption too.
func (b *bench) close() error {
	defer b.live.Close()
	if b.all == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(context.Background(), benchNamespace), endTime)
	defer cancel()
	err := b.fetchAhead(ctx, true)
	if b.img != nil {
		err = errors.Join(err, b.all.remove(ctx, b.img))
	}
	return errors.Join(err, b.all.close())
}

// fetchAhead has the node fetch ahead of the image's starts, or not, which is to be taken back.
func (b *bench) fetchAhead(ctx context.Context, on bool) error {
	if on && b.plain == "" {
		return nil
	}
	of := b.plain
	if !on {
		of = b.manifest
		b.plain = of // first: who knows how far a request that is broken off came
	}
	if err := b.live.FetchAhead(ctx, node.FetchAhead{Manifest: of, On: on}); err != nil {
		return fmt.Errorf("whether the node fetches ahead of the image's starts: %w", err)
	}
	if on {
		b.plain = ""
	}
	return nil
}

// run starts an image one way.
func (b *bench) run(ctx context.Context, image, way string) (r benchRun, err error) {
	snapshotter := accelSnapshotter
	if way == benchFull {
		snapshotter = plainSnapshotter
	}
	if way != benchWarm {
		if err := b.wipe(ctx); err != nil {
			return r, err
		}
		if way != benchFull {
			if err := b.fetchAhead(ctx, way == benchProfile); err != nil {
				return r, err
			}
		}
		pulling := *b.all
		if way == benchFull {
			pulling.resolver = b.past
		}
		began := time.Now()
		if b.img, err = pulling.pull(ctx, image, snapshotter); err != nil {
			return r, err
		}
		r.PullSeconds = time.Since(began).Seconds()
		if way == benchFull {
			if err := b.know(ctx); err != nil {
				return r, err
			}
		}
	}
	return r, b.start(ctx, snapshotter, way, &r)
}

// know finds out what was pulled, and refuses what is not this verb's alone.
func (b *bench) know(ctx context.Context) error {
	m, err := b.all.manifestOf(ctx, b.img)
	if err != nil {
		return err
	}
	if b.manifest, err = b.all.manifestDigest(ctx, b.img); err != nil {
		return err
	}
	b.layers = 0
	parts := []digest.Digest{b.manifest} // which is all that containerd has of an image that is mounted lazily
	for _, l := range m.Layers {
		b.layers += l.Size
		parts = append(parts, l.Digest)
	}
	others, err := b.all.client.NamespaceService().List(ctx)
	if err != nil {
		return err
	}
	for _, name := range others {
		if name == benchNamespace {
			continue
		}
		for _, d := range parts {
			_, err := b.all.client.ContentStore().Info(namespaces.WithNamespace(ctx, name), d)
			if err == nil {
				return fmt.Errorf("%w: containerd's namespace %q has %s of it too, so it is not brought anew each time; measure an image that nothing on this machine uses", accel.ErrConflict, name, d)
			}
			if !errdefs.IsNotFound(err) {
				return err
			}
		}
	}
	return nil
}

// wipe takes the image that is there from containerd and from the node's cache.
func (b *bench) wipe(ctx context.Context) error {
	if b.img == nil {
		return nil
	}
	if err := b.all.remove(ctx, b.img); err != nil {
		return err
	}
	b.img = nil
	ctx, cancel := context.WithTimeout(ctx, letGoTime)
	defer cancel()
	for {
		_, err := b.live.Remove(ctx, b.manifest.String())
		if err == nil || errors.Is(err, accel.ErrNotFound) {
			return nil
		}
		if !errors.Is(err, accel.ErrConflict) {
			return err
		}
		select { // containerd removes snapshots a moment after their image
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("the node's cache cannot be emptied of the image: %w", err)
		}
	}
}

// came is what has come of the image by the node, and how many reads had to wait.
func (b *bench) came(ctx context.Context) (fetched, misses int64, mounted bool, err error) {
	images, err := b.live.Mounted(ctx)
	for _, m := range images {
		if m.Digest != b.manifest {
			continue
		}
		mounted = true
		for _, l := range m.Layers {
			fetched, misses = fetched+l.FetchedBytes, misses+l.Misses
		}
		break // another name of it has the same layers
	}
	return fetched, misses, mounted, err
}

// start starts a container of the image that is there, until it answers.
func (b *bench) start(ctx context.Context, snapshotter, way string, r *benchRun) (err error) {
	fetched, misses, mounted, err := b.came(ctx)
	if err != nil {
		return err
	}
	if snapshotter == accelSnapshotter && !mounted {
		return errors.New("the image is not mounted lazily; the node's log says why")
	}
	if way != benchWarm {
		fetched, misses = 0, 0 // what came since the pull began
	}
	id := "bench-" + rand.Text()
	s, err := b.all.start(ctx, b.img, snapshotter, id, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.end(ctx)) }()
	took, err := s.answers(ctx, b.port, b.limit)
	if err != nil {
		return err
	}
	r.StartSeconds = took.Seconds()
	if way == benchFull {
		r.FetchedBytes = b.layers
		return nil
	}
	now, waited, _, err := b.came(ctx)
	if err != nil {
		return err
	}
	r.FetchedBytes, r.Misses = now-fetched, waited-misses
	// The recording is what the next starts are fetched ahead by.
	if err := b.live.Answered(ctx, node.Answered{Container: id}); errors.Is(err, accel.ErrNotFound) {
		return nil
	} else if err != nil {
		return err
	}
	_, err = awaitStart(ctx, b.live, id)
	return err
}
