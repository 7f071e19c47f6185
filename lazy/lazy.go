package lazy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"accel"
	"accel/api"
	"accel/cache"
	"accel/internal/keylock"
	"accel/lazyfs"
	"accel/prefetch"
	"accel/registry"
	"accel/snapshot"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"
)

// Declined is why an image is not mounted lazily; containerd pulls it as ever.
type Declined = snapshot.Declined

const (
	// resolveTime bounds finding an image's form and its TOCs. containerd is answered earlier; what comes
	// later is there for the next pull.
	resolveTime = time.Minute
	// knownTime is how long an image that can be mounted is known without asking again,
	// lackingTime one that has no form for it, and troubleTime one that could not be looked at.
	knownTime, lackingTime, troubleTime = 10 * time.Minute, time.Minute, 15 * time.Second
	// maxAnswers about images are remembered.
	maxAnswers = 1024
	// opening layers at a time: a TOC of 30,000 files takes some 40 MB while its files are made.
	openings = 4
	// plans at a time: each has its layers' files in memory, some 40 MB for 30,000 of them.
	plannings = 2
	// heldTime is how long the background waits for what is to be fetched ahead.
	heldTime = time.Second
	// idleTime is how long a layer that was prepared, and is not mounted, stays open.
	idleTime = 2 * time.Minute
)

// Options of Lazy. Dir, RunDir, Store, Registry, Keys and Holder are required.
type Options struct {
	Dir string // keeps what has to survive a boot
	// RunDir is a short path on tmpfs: the holder's socket and mounts.
	RunDir  string
	Version string
	Node    string // the node's name, for reports
	// Holder is the command that runs the holder process (lazyfs.Options.Holder).
	Holder   []string
	Store    *cache.Store
	Registry *registry.Client
	Server   *api.Client // nil: mappings come from registries alone
	Keys     *Keys
	// Off makes every new pull an ordinary one; what is mounted stays.
	Off bool
	// Own is what the store's grants have for the node's own credentials (mirror.OwnClient); empty: registries are asked
	// every time. GrantTTL and GrantGrace are for how long such a grant counts, as in mirror.Options: 0 is the default
	// of 5 min and 24 h, negative not at all.
	Own                  string
	GrantTTL, GrantGrace time.Duration
	// Except are globs of repositories ("host/path") that are never mounted lazily, Stargz those whose
	// images may be mounted as they are where they are eStargz themselves.
	Except, Stargz []string
	// BackgroundBytesPerSecond bounds what is fetched before it is read; 0: what is left of the
	// network; negative: nothing is (prefetch.Options).
	BackgroundBytesPerSecond int64
	// SetAside is told of a layer whose image lied about its DiffID, and of the chain ID that containerd
	// has it under by that lie. Nothing may use it there any more; another layer under that chain ID is somebody else's, and no
	// lie. It may be told of one several times; nil: nobody is.
	SetAside func(ctx context.Context, layer, chain digest.Digest, reason string) error
	// Remount mounts layers again whose holder has died, for the containers to come.
	Remount func(ctx context.Context, layers []digest.Digest) error
	// Record takes each lazy pull that was measured; nil: nobody wants to know.
	Record     func(accel.Pull)
	Registerer prometheus.Registerer // nil: no metrics
	Log        *slog.Logger          // nil: slog.Default
}

// Lazy mounts layers before their content is there. It is what package snapshot asks.
type Lazy struct {
	o       Options
	metrics *metrics
	host    *lazyfs.Host
	filler  *prefetch.Filler
	origins origins
	locks   keylock.Mutex       // one for each layer
	turns   keylock.Mutex       // one for each layer: how it is mounted, by the plain file or through the holder
	slots   chan struct{}       // as many as layers are opened at a time
	plans   chan struct{}       // as many as plans are made at a time
	tocs    *semaphore.Weighted // bytes of TOCs that are unpacked while layers are opened
	checks  chan digest.Digest  // layers whose DiffID is to be computed
	boots   chan struct{}       // as many as bundles come at a time
	liars   liars
	pulls   pulls
	rates   rates

	starts    *starts
	profiles  profiles
	images    mountables
	reports   reports
	reporting sync.Mutex // one report is made at a time

	mu      sync.Mutex
	running context.Context // Run's; nil: it does not run
	work    sync.WaitGroup  // what was begun under it
	answers *lru.Cache[imageKey, *answer]
	// expected images are likely to be asked for; see Expect.
	expected map[imageKey]*prospect
	open     map[digest.Digest]*openLayer
	diedAt   time.Time // see HolderDiedAt
}

// openLayer is a layer that the mounts have, or are about to.
type openLayer struct {
	*lazyfs.Layer
	stored *cache.Layer
	origin origin
	at     time.Time
}

type imageKey struct {
	repository string
	manifest   digest.Digest
}

// answer is what is known of an image. What is below done may be read when that is closed.
type answer struct {
	done chan struct{}
	img  *image
	err  error
	at   time.Time
	// refusedUntil: somebody did not wait for it, so that the image is pulled as ever; under Lazy.mu.
	refusedUntil time.Time
}

// New makes all parts; nothing runs yet.
func New(o Options) (*Lazy, error) {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.Dir == "" || o.RunDir == "" || o.Store == nil || o.Registry == nil || o.Keys == nil || len(o.Holder) == 0 {
		return nil, fmt.Errorf("%w: lazy mounts need folders, a store, registries, keys and a holder", accel.ErrInvalid)
	}
	l := &Lazy{o: o, origins: origins{filepath.Join(o.Dir, "origins")}, slots: make(chan struct{}, openings), plans: make(chan struct{}, plannings), tocs: semaphore.NewWeighted(accel.MaxTOCBytes), boots: make(chan struct{}, boots), checks: make(chan digest.Digest, 1024), open: map[digest.Digest]*openLayer{}, expected: map[imageKey]*prospect{}}
	l.pulls = pulls{record: o.Record, counts: l.counts}
	l.o.GrantTTL = cmp.Or(o.GrantTTL, defaultGrantTTL)
	l.o.GrantGrace = cmp.Or(o.GrantGrace, defaultGrantGrace)
	if o.SetAside == nil {
		l.o.SetAside = func(context.Context, digest.Digest, digest.Digest, string) error { return nil }
	}
	if o.Record == nil {
		l.pulls.record = func(accel.Pull) {}
	}
	l.liars.dir, l.images.dir = filepath.Join(o.Dir, "liars"), imagesIn(o.Dir)
	l.profiles.dir, l.reports = filepath.Join(o.Dir, "profiles"), reports{dir: filepath.Join(o.Dir, "starts"), wake: make(chan struct{}, 1)}
	for _, dir := range []string{l.origins.dir, l.liars.dir, l.images.dir, l.profiles.dir, l.reports.dir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	var err error
	if l.starts, err = newStarts(); err != nil {
		return nil, err
	}
	if l.metrics, err = newMetrics(o.Registerer, l); err != nil {
		return nil, err
	}
	if l.answers, err = lru.New[imageKey, *answer](maxAnswers); err != nil {
		return nil, err
	}
	l.filler, err = prefetch.New(prefetch.Options{BackgroundBytesPerSecond: o.BackgroundBytesPerSecond, Registerer: o.Registerer, Log: o.Log})
	if err != nil {
		return nil, err
	}
	l.host, err = lazyfs.NewHost(lazyfs.Options{
		Dir: o.RunDir, Version: lazyfs.VersionName(o.Version), Holder: o.Holder, Filler: filler{l.filler}, HolderDied: l.holderDied, Log: o.Log,
	})
	return l, err
}

// filler has the mounts' holes filled.
type filler struct{ *prefetch.Filler }

func (f filler) Fill(ctx context.Context, l *lazyfs.Layer, first, n int) error {
	return f.Filler.Fill(ctx, l.Digest(), first, n)
}

// Adopt opens the layers that are mounted, by an earlier daemon or before a boot, as far as they are in the
// store. It comes before Run.
func (l *Lazy) Adopt(ctx context.Context, layers []digest.Digest) error {
	for _, d := range layers {
		if err := l.adopt(ctx, d); err != nil && !errors.Is(err, accel.ErrNotFound) {
			l.o.Log.Error("a mounted layer cannot be opened; reads of what it lacks fail", "layer", d, "error", err)
		}
	}
	return errors.Join(l.images.sweep(0, l.absent), l.origins.sweep(func(d digest.Digest) bool {
		_, err := l.o.Store.Layer(d)
		return err == nil
	}))
}

func (l *Lazy) adopt(ctx context.Context, d digest.Digest) error {
	stored, err := l.o.Store.Layer(d)
	if err != nil {
		return err
	}
	unlock, err := l.locks.Lock(ctx, d.String())
	if err != nil {
		return err
	}
	defer unlock()
	o, err := l.origins.get(d)
	if err != nil {
		return err
	}
	return l.add(ctx, d, stored, o, false)
}

// Run serves mounts and fills them until ctx ends. Mounts and the holder stay.
func (l *Lazy) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	l.mu.Lock()
	l.running = ctx
	l.mu.Unlock()
	g.Go(func() error { return l.filler.Run(ctx) })
	g.Go(func() error {
		if err := l.host.Run(ctx); ctx.Err() == nil {
			return err
		}
		return nil
	})
	g.Go(func() error { return l.sweep(ctx) })
	g.Go(func() error { return l.check(ctx) })
	g.Go(func() error { return l.measure(ctx) })
	g.Go(func() error { return l.report(ctx) })
	g.Go(func() error {
		if err := l.host.Retire(ctx); err != nil && ctx.Err() == nil {
			l.o.Log.Warn("holders of older versions stay", "error", err)
		}
		return nil
	})
	err := g.Wait()
	l.mu.Lock()   // whoever has looked whether it runs has begun its work
	l.mu.Unlock() //nolint:staticcheck // a barrier
	l.work.Wait()
	return err
}

// Close gives the mounts' files back; the mounts stay.
func (l *Lazy) Close() error { return l.host.Close() }

// Layer implements snapshot.Images: which layer is to be mounted for one of an image.
func (l *Lazy) Layer(ctx context.Context, r snapshot.Request) (snapshot.Lazy, error) {
	began := time.Now()
	ref, err := l.reference(r.Reference)
	if err != nil {
		return snapshot.Lazy{}, err
	}
	if r.Manifest.Validate() != nil {
		return snapshot.Lazy{}, declined("containerd does not say which manifest of %s it pulls: are annotations for snapshotters disabled?", r.Reference)
	}
	img, err := l.image(ctx, imageKey{ref.Name(), r.Manifest}, r.Reference)
	if err == nil {
		err = l.honest(img) // the answer may be older than what is known of a layer
	}
	if err != nil {
		return snapshot.Lazy{}, err
	}
	i, known := img.chains[r.Chain]
	if !known || img.layers[i].source != r.Layer {
		return snapshot.Lazy{}, declined("layer %s is not one of image %s under chain ID %s", r.Layer, r.Reference, r.Chain)
	}
	l.pulls.asked(img, r, began)
	l.starts.askedAs(nameIn(ref.Name(), ref), img)
	return snapshot.Lazy{Layer: img.layers[i].Digest}, nil
}

// reference reads an image's name, whose registry is canonical then, where its images may be mounted lazily.
func (l *Lazy) reference(name string) (accel.Reference, error) {
	if l.o.Off {
		return accel.Reference{}, declined("lazy mounts are turned off on this node")
	}
	ref, err := accel.ParseReference(name)
	if err != nil {
		return ref, declined("image: %v", err)
	}
	if ref.Registry, err = l.o.Registry.Canonical(ref.Registry); err != nil {
		return ref, declined("image %s: %v", name, err)
	}
	if l.allows(l.o.Except, ref.Name()) {
		return ref, declined("lazy mounts are turned off for repository %s", ref.Name())
	}
	return ref, nil
}

// image answers once for all layers of an image. Who does not wait until the answer is there makes it a no.
func (l *Lazy) image(ctx context.Context, key imageKey, name string) (*image, error) {
	a, err := l.ask(key, name)
	if err != nil {
		return nil, err
	}
	select {
	case <-a.done:
		return a.img, a.err
	case <-ctx.Done():
		l.mu.Lock()
		a.refusedUntil = time.Now().Add(lackingTime)
		l.mu.Unlock()
		return nil, declined("%s could not be looked at in time; what comes late is for the next pull", name)
	}
}

// ask returns the answer that there is, or begins to find one.
func (l *Lazy) ask(key imageKey, name string) (*answer, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.running == nil || l.running.Err() != nil {
		return nil, declined("the node is starting or stopping")
	}
	now := time.Now()
	var known *image // whose layers were closed: nothing but they is asked for again
	at := now
	if a, ok := l.answers.Get(key); ok {
		if now.Before(a.refusedUntil) {
			return nil, declined("%s is being pulled as ever", name)
		}
		if a.fresh(now) {
			if known = l.shut(a); known == nil {
				return a, nil
			}
			at = a.at
		}
	}
	a := &answer{done: make(chan struct{})}
	l.answers.Add(key, a)
	running := l.running
	l.work.Go(func() {
		defer close(a.done)
		ctx, cancel := context.WithTimeout(running, resolveTime)
		defer cancel()
		began := time.Now()
		a.img, a.err = l.lookAt(ctx, running, name, key, known)
		if a.at = at; known == nil {
			a.at = time.Now()
		}
		l.o.Log.Debug("an image was looked at", "image", name, "took", time.Since(began))
		l.metrics.count(a.img, a.err)
		l.tell(name, key.manifest, a.err)
	})
	return a, nil
}

// shut is the image of an answer that is there, where some of its layers are open no more. l.mu is held.
func (l *Lazy) shut(a *answer) *image {
	select {
	case <-a.done:
	default:
		return nil
	}
	if a.err != nil {
		return nil
	}
	for _, y := range a.img.layers {
		if l.open[y.Digest] == nil {
			return a.img
		}
	}
	return nil
}

// lookAt resolves an image, unless it is known, and opens its layers. What is fetched ahead of its start is looked for
// meanwhile, and not waited for; running is for what goes on then.
func (l *Lazy) lookAt(ctx, running context.Context, name string, key imageKey, known *image) (*image, error) {
	source, err := l.o.Registry.Source(key.repository, "")
	if err != nil {
		return nil, declined("registry of %s: %v", key.repository, err)
	}
	p := l.prospect(running, source, key)
	cancel := p.cancel
	var img *image
	if known != nil {
		img = &image{name: name, repository: known.repository, manifest: known.manifest, layers: known.layers, chains: known.chains}
	} else {
		img, err = l.resolve(ctx, name, p)
	}
	if err == nil {
		err = l.recall(img)
	}
	if err != nil {
		cancel()
		return img, err
	}
	// Until the hot set is known, or is late, nothing else is fetched that nobody waits for.
	release := func() {
		for _, y := range img.layers {
			l.filler.Release(y.Digest)
		}
	}
	img.planned = make(chan struct{})
	boot := l.boot(running, img, p)
	noted := make(chan struct{})
	go func() { // while the layers' tables come
		defer close(noted)
		l.note(img)
	}()
	err = l.prepare(ctx, img, boot)
	<-noted
	if err != nil {
		boot.end(false)
		cancel()
		release()
		return img, err
	}
	late := time.AfterFunc(heldTime, release)
	if boot != nil {
		late.Stop() // it ends by itself, and nothing else is as urgent
		close(boot.opened)
	}
	l.mu.Lock()
	for _, y := range img.layers {
		open := l.open[y.Digest]
		img.cold = img.cold || open == nil || !open.Complete()
	}
	l.mu.Unlock()
	l.work.Go(func() {
		defer cancel()
		defer close(img.planned)
		planning := p.ctx
		if boot != nil {
			boot.end(true)
			var done context.CancelFunc
			planning, done = context.WithTimeout(running, resolveTime)
			defer done()
		}
		l.fetchAhead(planning, img, p, boot)
		late.Stop()
		release()
	})
	return img, nil
}

// tell says once for each look at an image why it is not mounted lazily.
func (l *Lazy) tell(name string, manifest digest.Digest, err error) {
	var no *Declined
	switch {
	case errors.As(err, &no):
		l.o.Log.Info("an image is not mounted lazily", "image", name, "manifest", manifest, "reason", no.Reason)
	case err != nil:
		l.o.Log.Warn("an image cannot be mounted lazily", "image", name, "manifest", manifest, "error", err)
	default:
		l.o.Log.Debug("an image can be mounted lazily", "image", name, "manifest", manifest)
	}
}

// fresh reports whether the answer still counts, or is being looked for.
func (a *answer) fresh(now time.Time) bool {
	select {
	case <-a.done:
	default:
		return true
	}
	var no *Declined
	switch {
	case a.err == nil:
		return now.Sub(a.at) < knownTime
	case errors.As(a.err, &no):
		return now.Sub(a.at) < lackingTime
	default:
		return now.Sub(a.at) < troubleTime
	}
}
