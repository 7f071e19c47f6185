package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"accel"
	"accel/convert"
	"accel/profile"
	"accel/profile/ledger"
	"accel/registry"
	"accel/trust"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
)

const (
	// foretellGrace is for how long Ready waits for a prediction that goes on beside push and
	// read-back. It takes less than those, but where many layers are in the registry alone.
	foretellGrace = 2 * time.Second
	// foretellLimit bounds one that goes on after Ready, and one that a check begins.
	foretellLimit = 30 * time.Second
	// stopLimit is how long one that is stopped is waited for.
	stopLimit = 10 * time.Second
	// maxForetells bounds how many images are looked into at a time: each may take some 400 MB, where it has a million
	// files.
	maxForetells = 2
)

// errLate is why a prediction is stopped that takes too long.
var errLate = errors.New("what starts of an image read is not predicted in time")

// forecast is a prediction that goes on beside other work. A nil one is none.
type forecast struct {
	done   chan struct{}
	cancel context.CancelCauseFunc

	mu      sync.Mutex
	ended   bool
	release func() // to be called at its end; nil: nothing
}

// foretell begins to predict what starts of an image that was just converted read. It reads
// conv, which must not be closed but by stop. ctx must outlive the record's lease.
func (k *Worker) foretell(ctx context.Context, rec accel.Record, conv *convert.Result, repository string) *forecast {
	if k.Profiles == nil {
		return nil
	}
	if conv.Unchanged {
		repository = rec.Repository
	}
	ctx, cancel := context.WithCancelCause(ctx)
	f := &forecast{done: make(chan struct{}), cancel: cancel}
	go func() {
		defer f.end()
		for _, m := range conv.Mappings {
			m.TargetRepository = repository
			img, err := memberImage(conv.Image, conv.Index, m.TargetManifest)
			if err == nil {
				err = k.learn(ctx, rec, m, img)
			}
			k.foretold(ctx, rec, m.Platform, err)
		}
	}()
	return f
}

// wait waits for the prediction's end, but no longer than limit.
func (f *forecast) wait(ctx context.Context, limit time.Duration) (ended bool) {
	if f == nil {
		return true
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-f.done:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	return false
}

// stop ends it, because of why, and has release called as soon as it has ended: before stop returns, unless that takes
// longer than stopLimit.
func (f *forecast) stop(ctx context.Context, why error, release func()) {
	if f == nil {
		release()
		return
	}
	f.cancel(why)
	f.wait(context.WithoutCancel(ctx), stopLimit)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended {
		release()
		return
	}
	f.release = release
}

func (f *forecast) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = true
	if f.release != nil {
		f.release()
	}
	close(f.done)
}

// foretold says how a prediction ended. A profile is a hint: that there is none is no
// reason to fail anything.
func (k *Worker) foretold(ctx context.Context, rec accel.Record, platform string, err error) {
	switch {
	case err == nil:
		k.metrics.foretold.WithLabelValues("ok").Inc()
	case ctx.Err() != nil:
		k.metrics.foretold.WithLabelValues("late").Inc()
		k.Log.Info("what starts of an image read is not predicted in time; tried again when the target is checked", "image", rec.Image(), "platform", platform)
	default:
		k.metrics.foretold.WithLabelValues("error").Inc()
		k.Log.Warn("cannot predict what starts of an image read", "image", rec.Image(), "platform", platform, "error", err)
	}
}

// memberImage finds the image with that manifest.
func memberImage(img v1.Image, idx v1.ImageIndex, manifest digest.Digest) (v1.Image, error) {
	if img != nil {
		return img, nil
	}
	m, err := idx.IndexManifest()
	if err != nil {
		return nil, err
	}
	for _, d := range m.Manifests {
		switch {
		case d.Digest.String() == manifest.String():
			return idx.Image(d.Digest)
		case d.MediaType.IsIndex():
			sub, err := idx.ImageIndex(d.Digest)
			if err != nil {
				continue // one that was not converted
			}
			if found, err := memberImage(nil, sub, manifest); err == nil {
				return found, nil
			}
		}
	}
	return nil, fmt.Errorf("%w: manifest %s in its index", accel.ErrNotFound, manifest)
}

// learn tells the ledger of one platform of an image: the image's layers say what its
// maker lists, what a predecessor's starts read and what can be predicted. img is the converted
// image, or any with its config and, where they are at hand, its layers.
func (k *Worker) learn(ctx context.Context, rec accel.Record, m accel.Mapping, img v1.Image) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("internal error: %v", p)
		}
	}()
	at := ledger.Image{Repository: rec.Repository, Digest: rec.Digest, Platform: m.Platform, Target: m.TargetRepository}
	if known, err := k.Profiles.Knows(ctx, m.SourceManifest, at); known || err != nil {
		return err
	}
	var given ledger.Given
	started := time.Now()
	leave, err := k.enter(ctx)
	if err == nil {
		started = time.Now()
		given, err = k.given(ctx, rec, m, img)
		leave()
		// One that was not let go on is no failure of the image's.
		given.Failed = err != nil && (ctx.Err() == nil || errors.Is(context.Cause(ctx), errLate))
	}
	// What is known without the image's content, and that there is an image whose starts can be
	// reported, does not depend on time.
	keep, cancel := context.WithTimeout(context.WithoutCancel(ctx), foretellGrace)
	defer cancel()
	err = errors.Join(err, k.Profiles.Learn(keep, m.SourceManifest, at, len(m.Layers), given))
	if err == nil {
		k.metrics.foretellSeconds.Observe(time.Since(started).Seconds())
	}
	return err
}

// enter waits until an image may be looked into. The error is ctx's.
func (k *Worker) enter(ctx context.Context) (leave func(), err error) {
	select {
	case k.foretelling <- struct{}{}:
		return func() { <-k.foretelling }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (k *Worker) given(ctx context.Context, rec accel.Record, m accel.Mapping, img v1.Image) (g ledger.Given, err error) {
	local, err := img.Layers()
	if err != nil {
		return g, err
	}
	view, err := k.view(ctx, m, local)
	if err != nil {
		return g, err
	}
	start, list, err := startOf(img)
	if err != nil {
		return g, err
	}
	listing, err := profile.Listed(ctx, view.tree, profile.ListOf(list))
	if err != nil {
		return g, err
	}
	g.Listed = notNil(listing.Items)
	ancestor, err := k.Profiles.Ancestor(ctx, rec.Repository, m.Platform, m.SourceManifest, k.formerDigests(ctx, rec)...)
	if err != nil && !errors.Is(err, accel.ErrNotFound) {
		return g, err
	}
	inherits := err == nil
	if inherits {
		g.Inherited = profile.Inherit(ancestor.Profile, view.tree, m.SourceManifest).Items
	}
	if k.SkipPrediction {
		g.Predicted = []accel.ProfileItem{} // it will not be tried again
		return g, nil
	}
	start.Listed = g.Listed
	predicted, err := profile.Predict(ctx, profile.View{Tree: view.tree, Read: view.read}, start)
	if err != nil {
		return g, err
	}
	g.Predicted = notNil(predicted)
	if inherits {
		g.Inherited = profile.Union(accel.Profile{Items: g.Inherited}, accel.Profile{Items: newOnly(g.Predicted, ancestor, view.tree, m.SourceManifest)}).Items
	}
	return g, nil
}

func notNil(items []accel.ProfileItem) []accel.ProfileItem {
	if items == nil {
		return []accel.ProfileItem{}
	}
	return items
}

// newOnly is what is predicted of files that were not predicted for the ancestor as well: of
// those its recorded starts say more.
func newOnly(predicted []accel.ProfileItem, a ledger.Ancestor, tree *profile.Tree, manifest digest.Digest) []accel.ProfileItem {
	if !a.Prediction {
		return nil
	}
	type file struct {
		layer int
		path  string
	}
	old := map[file]bool{}
	for _, i := range profile.Inherit(a.Predicted, tree, manifest).Items {
		old[file{i.Layer, i.Path}] = true
	}
	return slices.DeleteFunc(slices.Clone(predicted), func(i accel.ProfileItem) bool { return old[file{i.Layer, i.Path}] })
}

// formerDigests are the images that rec's tags had before it.
func (k *Worker) formerDigests(ctx context.Context, rec accel.Record) (all []digest.Digest) {
	for _, tag := range rec.Tags {
		host, path, _ := strings.Cut(rec.Repository, "/")
		st, err := k.Tracker.Find(ctx, accel.Reference{Registry: host, Repository: path, Tag: tag})
		if err == nil && st.Previous != nil && st.Previous.Digest != rec.Digest {
			all = append(all, st.Previous.Digest)
		}
	}
	return all
}

// startOf reads an image's configuration, and what its maker lists. A manifest's annotation lists files as the label
// does.
func startOf(img v1.Image) (s profile.Start, list string, err error) {
	conf, err := img.ConfigFile()
	if err != nil {
		return s, "", err
	}
	c := conf.Config
	m, err := img.Manifest()
	if err != nil {
		return s, "", err
	}
	return profile.Start{Entrypoint: c.Entrypoint, Cmd: c.Cmd, Env: c.Env, WorkingDir: c.WorkingDir},
		c.Labels[profile.LabelPrefetch] + "\n" + m.Annotations[profile.LabelPrefetch], nil
}

// view opens the converted layers: those of local that were made just now from their files, others
// in the registry.
func (k *Worker) view(ctx context.Context, m accel.Mapping, local []v1.Layer) (*imageView, error) {
	source, err := k.Registry.Source(m.TargetRepository, "")
	if err != nil {
		return nil, err
	}
	v := &imageView{keep: map[inflatedKey][]byte{}, left: maxInflateBytes}
	cache := &blocks{keep: map[blockKey][]byte{}, left: maxFetchBytes}
	b := profile.NewBuilder()
	for n, l := range m.Layers {
		if l.TOCDigest == "" { // passed through
			v.layers = append(v.layers, nil)
			if err := b.Skip(); err != nil {
				return nil, err
			}
			continue
		}
		var blob io.ReaderAt = &remoteBlob{ctx: ctx, source: source, digest: l.Target, sizeBytes: l.TargetBytes, cache: cache}
		if n < len(local) {
			if at, ok := local[n].(io.ReaderAt); ok {
				blob = at
			}
		}
		layer, err := openLayer(ctx, b, blob, l)
		if err != nil {
			return nil, err
		}
		v.layers = append(v.layers, layer)
	}
	v.tree = b.Tree()
	return v, nil
}

// learnReady does what was left out when rec became Ready: a prediction that took too long,
// or the ledger was lost or is new.
func (k *Worker) learnReady(ctx context.Context, rec accel.Record) error {
	if k.Profiles == nil {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, foretellLimit, errLate)
	defer cancel()
	known, err := k.Profiles.OfImage(ctx, rec.Digest)
	if err != nil {
		return err
	}
	if len(known) >= len(rec.Result.Platforms) && !slices.ContainsFunc(known, func(s ledger.ManifestStatus) bool { return !s.Foretold }) {
		return nil
	}
	verifier, err := trust.NewVerifier(k.Keys.Export())
	if err != nil {
		return err
	}
	src, err := k.Registry.Pull(ctx, rec.Repository, rec.Digest)
	if err != nil {
		return err
	}
	for img, err := range k.images(ctx, rec.Repository, src, 0) {
		if err != nil {
			return err
		}
		d, err := img.Digest()
		if err != nil {
			return err
		}
		envelope, err := k.Tracker.Mapping(ctx, rec.Repository, digest.Digest(d.String()))
		if errors.Is(err, accel.ErrNotFound) {
			continue // no platform that was converted
		}
		if err != nil {
			return err
		}
		m, err := verifier.Verify(ctx, envelope)
		if err == nil {
			err = k.learn(ctx, rec, m, img)
		}
		k.foretold(ctx, rec, m.Platform, err)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // said; the others have their turn at the next check
		}
	}
	return nil
}

// maxIndexDepth bounds indexes in indexes.
const maxIndexDepth = 4

// images iterates over an image, or the images of an index.
func (k *Worker) images(ctx context.Context, repository string, src *registry.Manifest, depth int) func(yield func(v1.Image, error) bool) {
	return func(yield func(v1.Image, error) bool) {
		if src.Image != nil {
			yield(src.Image, nil)
			return
		}
		if src.Index == nil || depth == maxIndexDepth {
			return
		}
		m, err := src.Index.IndexManifest()
		if err != nil {
			yield(nil, err)
			return
		}
		for _, d := range m.Manifests {
			if !d.MediaType.IsImage() && !d.MediaType.IsIndex() {
				continue
			}
			if d.MediaType.IsImage() { // those that were not converted need not be looked at
				_, err := k.Tracker.Mapping(ctx, repository, digest.Digest(d.Digest.String()))
				if errors.Is(err, accel.ErrNotFound) {
					continue
				}
			}
			child, err := k.Registry.Pull(ctx, repository, digest.Digest(d.Digest.String()))
			if errors.Is(err, accel.ErrNotFound) {
				continue
			}
			if err != nil {
				yield(nil, err)
				return
			}
			for img, err := range k.images(ctx, repository, child, depth+1) {
				if !yield(img, err) {
					return
				}
			}
		}
	}
}
