package lazy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"accel"
	"accel/cache"
	"accel/lazyfs"
	"accel/prefetch"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// prepare opens all layers of an image at once, so that mounting them takes no time, and
// filling them has begun.
func (l *Lazy) prepare(ctx context.Context, img *image, b *boot) error {
	img.layouts = make([]*lazyfs.Layout, len(img.layers))
	g, ctx := errgroup.WithContext(ctx)
	for n, y := range img.layers {
		g.Go(func() (err error) {
			img.layouts[n], err = l.openLayer(ctx, y.Digest, &y.origin, b)
			return err
		})
	}
	return g.Wait()
}

// openLayer makes a layer ready to be mounted. said is what an image says of it; nil: what is known
// already has to do. b may have its TOC. Where its files were made for it, what they hold is returned, as it is in memory.
func (l *Lazy) openLayer(ctx context.Context, d digest.Digest, said *origin, b *boot) (made *lazyfs.Layout, err error) {
	unlock, err := l.locks.Lock(ctx, d.String())
	if err != nil {
		return nil, err
	}
	defer unlock()
	o, err := l.knownOrigin(d, said)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	y := l.open[d]
	if y != nil {
		y.origin, y.at = o, time.Now()
	}
	l.mu.Unlock()
	if y != nil {
		err := y.stored.Use()
		if err == nil {
			l.wantCheck(y)
		}
		if !errors.Is(err, accel.ErrNotFound) {
			return nil, err
		}
		// The store has dropped it: its files are gone, whatever is still open of them.
		l.o.Log.Warn("a layer is not in the store any more; it is made anew", "layer", d, "error", err)
		if err := l.closeLayer(ctx, d); err != nil {
			return nil, fmt.Errorf("close layer %s, which is not in the store any more: %w", d, err)
		}
	}
	stored, err := l.o.Store.Layer(d)
	if errors.Is(err, accel.ErrNotFound) {
		stored, made, err = l.create(ctx, d, &o, b)
	}
	if err != nil {
		return nil, err
	}
	if err := stored.Use(); err != nil {
		return nil, err
	}
	return made, l.add(ctx, d, stored, o, said != nil)
}

// knownOrigin joins what is said of a layer with what is known, and keeps it.
func (l *Lazy) knownOrigin(d digest.Digest, said *origin) (origin, error) {
	known, err := l.origins.get(d)
	if said == nil || err != nil && !errors.Is(err, accel.ErrNotFound) {
		return known, err
	}
	o := *said
	if err == nil && known.contradicts(o) && (o.Signed || !known.Signed) && l.absent(d) {
		// What was said before was never found to be true: it must not keep those out who say something else.
		l.o.Log.Info("another image said something else of a layer, which is not here", "layer", d, "said", known.Repositories, "now", o.Repositories)
		o.DiffID, known, err = known.DiffID, origin{}, nil
	} else if err == nil {
		if o, err = known.join(*said); err != nil {
			return o, declined("%v", err)
		}
	}
	for _, c := range o.Claims {
		if o.DiffID != "" && c.DiffID != o.DiffID {
			return o, declined("layer %s has DiffID %s, not %s as the image says", d, o.DiffID, c.DiffID)
		}
	}
	if err != nil || !o.equal(known) {
		if err := l.origins.put(d, o); err != nil {
			return o, fmt.Errorf("keep where layer %s comes from: %w", d, err)
		}
	}
	return o, nil
}

// create makes a layer's files in the store from its TOC, which b may have. It completes o.
func (l *Lazy) create(ctx context.Context, d digest.Digest, o *origin, b *boot) (*cache.Layer, *lazyfs.Layout, error) {
	select {
	case l.slots <- struct{}{}:
		defer func() { <-l.slots }()
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	began := time.Now()
	memory := &tocMemory{all: l.tocs}
	defer memory.release()
	packed, json, offset, err := l.bundledTOC(ctx, b, d, *o, memory)
	if err != nil {
		return nil, nil, err
	}
	fetched := time.Since(began)
	o.TOCOffset = offset
	var packing errgroup.Group // of one that came in another form; a second processor does it
	if packed == nil {
		packing.Go(func() (err error) {
			packed, err = packTOC(json)
			return err
		})
	}
	layout, err := lazyfs.Build(json, offset)
	if err := packing.Wait(); err != nil {
		return nil, nil, fmt.Errorf("pack the table of contents of layer %s: %w", d, err)
	}
	if err != nil {
		return nil, nil, declined("layer %s: %v", d, err)
	}
	built := time.Since(began)
	defer func() {
		l.o.Log.Debug("a layer's files were made", "layer", d, "tocBytes", len(packed), "fetched", fetched, "built", built, "kept", time.Since(began))
	}()
	info := cache.LayerInfo{Chunks: layout.Chunks(), DataBytes: layout.DataBytes(), FilesBytes: layout.FilesBytes() - layout.DataBytes() + int64(len(packed))}
	stored, err := l.o.Store.CreateLayer(ctx, d, info, func(f cache.LayerFiles) error {
		if err := os.WriteFile(f.TOC, packed, 0o600); err != nil {
			return err
		}
		return layout.Store(lazyfs.Files{Meta: f.Meta, Table: f.Table, Data: f.Data})
	})
	return stored, layout, err
}

// fetchTOC tries the repositories that have the layer.
func (l *Lazy) fetchTOC(ctx context.Context, d digest.Digest, o origin, memory *tocMemory) (packed, json []byte, offset int64, err error) {
	for _, repository := range o.Repositories {
		source, sourceErr := l.o.Registry.Source(repository, "")
		if sourceErr != nil {
			err = errors.Join(err, sourceErr)
			continue
		}
		var tocErr error
		if packed, json, offset, tocErr = l.toc(ctx, source, d, o, memory); tocErr == nil {
			return packed, json, offset, nil
		}
		err = errors.Join(err, tocErr)
	}
	return nil, nil, 0, err
}

// add gives an open layer to the mounts and to what fills them, held until it is released. The caller holds the layer's lock.
// After an error it is not open. The error is *Declined where it is not one that can be
// filled.
func (l *Lazy) add(ctx context.Context, d digest.Digest, stored *cache.Layer, o origin, held bool) error {
	f, has := stored.Files(), stored.Has()
	layer, err := l.host.Add(d, lazyfs.Files{Meta: f.Meta, Table: f.Table, Data: f.Data}, has)
	if err != nil {
		return fmt.Errorf("open layer %s: %w", d, err)
	}
	y := &openLayer{Layer: layer, stored: stored, origin: o, at: time.Now()}
	l.mu.Lock()
	l.open[d] = y // the filler may call completed at once
	l.mu.Unlock()
	err = l.filler.Add(prefetch.Layer{
		Content: layer, Source: &source{l, y, d}, Host: o.host(),
		Held:      held,
		Persisted: has,
		Reserve:   stored.Reserve,
		Persist:   stored.Commit,
		Completed: func() { l.completed(y) },
		OnDemand: func(err error) {
			if err == nil {
				l.pulls.answered(d)
			}
		},
	})
	if err != nil {
		if errors.Is(err, accel.ErrInvalid) {
			err = declined("layer %s: %v", d, err)
		}
		l.mu.Lock()
		delete(l.open, d) // whoever asks next tries again
		l.mu.Unlock()
		return errors.Join(err, l.host.Remove(ctx, d, nil))
	}
	l.wantCheck(y)
	return nil
}

// completed turns new mounts to the plain file.
func (l *Lazy) completed(y *openLayer) {
	l.mu.Lock()
	ctx := l.running
	l.mu.Unlock()
	l.unhold(ctx, y.Digest())
	l.wantCheck(y)
}

// Mount implements snapshot.Mounts. The layer is pinned by then.
func (l *Lazy) Mount(ctx context.Context, d digest.Digest, target string) error {
	err := l.mount(ctx, d, target)
	if errors.Is(err, lazyfs.ErrDamaged) {
		l.o.Log.Error("a layer's files are damaged; they are made anew", "layer", d, "error", err)
		if err = l.lose(ctx, d, err); err == nil {
			err = l.mount(ctx, d, target)
		}
	}
	return err
}

func (l *Lazy) mount(ctx context.Context, d digest.Digest, target string) error {
	if _, err := l.openLayer(ctx, d, nil, nil); err != nil {
		return err
	}
	l.mu.Lock()
	y := l.open[d]
	l.mu.Unlock()
	// Lest the layer is turned to the plain file just after it was mounted to be watched.
	unlock, err := l.turns.Lock(ctx, d.String())
	if err != nil {
		return err
	}
	defer unlock()
	if y == nil || !l.starts.mounting(d) {
		return l.host.Mount(ctx, d, target)
	}
	if !l.starts.recorded(d) {
		y.ResetReads()
	}
	err = l.host.MountWatched(ctx, d, target)
	l.starts.mounted(d, err == nil && l.mountedLazily(target))
	return err
}

// mountedLazily reports whether reads at a place go through a holder: one that was there is left as it is.
func (l *Lazy) mountedLazily(target string) bool {
	mounts, err := l.host.Mounts()
	return err == nil && slices.ContainsFunc(mounts, func(m lazyfs.MountInfo) bool { return m.Target == target && m.Lazy })
}

// Unmount implements snapshot.Mounts.
func (l *Lazy) Unmount(ctx context.Context, target string) error { return l.host.Unmount(ctx, target) }

// sweep closes layers that are not mounted, so that the store may evict them.
func (l *Lazy) sweep(ctx context.Context) error {
	tick := time.NewTicker(idleTime / 8)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		for _, d := range l.starts.overdue() {
			l.unhold(ctx, d)
		}
		mounted := map[digest.Digest]bool{}
		mounts, err := l.host.Mounts()
		if err != nil {
			l.o.Log.Warn("mounts cannot be listed", "error", err)
			continue
		}
		for _, m := range mounts {
			mounted[m.Digest] = true
		}
		var idle []digest.Digest
		l.mu.Lock()
		for d, y := range l.open {
			if !mounted[d] && time.Since(y.at) > idleTime {
				idle = append(idle, d)
			}
		}
		l.mu.Unlock()
		for _, d := range idle {
			if err := l.closeIdle(ctx, d); err != nil && ctx.Err() == nil {
				l.o.Log.Warn("a layer that is not mounted stays open", "layer", d, "error", err)
			}
		}
	}
}

// closeIdle closes a layer unless it came into use meanwhile.
func (l *Lazy) closeIdle(ctx context.Context, d digest.Digest) error {
	unlock, err := l.locks.Lock(ctx, d.String())
	if err != nil {
		return err
	}
	defer unlock()
	l.mu.Lock()
	y := l.open[d]
	idle := y != nil && time.Since(y.at) > idleTime
	l.mu.Unlock()
	if !idle {
		return nil
	}
	return l.closeLayer(ctx, d)
}

// closeLayer takes a layer from the mounts and, when nobody can read it any more, from what fills it. The caller holds its
// lock. After an error, which is lazyfs.ErrInUse where somebody reads it, all is as it was.
func (l *Lazy) closeLayer(ctx context.Context, d digest.Digest) error {
	if err := l.host.Remove(ctx, d, func() { l.filler.Remove(d) }); err != nil {
		return err
	}
	l.starts.closed(d)
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.open, d)
	return nil
}

// lose gives a layer's files up, so that they are made anew.
func (l *Lazy) lose(ctx context.Context, d digest.Digest, why error) error {
	unlock, err := l.locks.Lock(ctx, d.String())
	if err != nil {
		return err
	}
	defer unlock()
	if err := l.closeLayer(ctx, d); err != nil {
		return err
	}
	stored, err := l.o.Store.Layer(d)
	if errors.Is(err, accel.ErrNotFound) {
		return nil
	}
	if err == nil {
		stored.Lose(why)
	}
	return err
}
