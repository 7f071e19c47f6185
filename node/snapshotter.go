package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"sync/atomic"
	"time"

	"accel"
	"accel/cache"
	"accel/lazy"
	"accel/mirror"
	"accel/snapshot"

	"github.com/opencontainers/go-digest"
)

// Snapshotter says how a node mounts images for containerd. Socket, RunDir and Holder are required; the
// rest is as in lazy.Options.
type Snapshotter struct {
	Socket                   string // containerd's way to it
	RunDir                   string
	Holder                   []string
	KeysFile                 string // public keys beside the server's; empty: none
	Off                      bool
	Except, Stargz           []string
	BackgroundBytesPerSecond int64
}

// mounts are a node's lazy mounts: what containerd asks, and what mounts.
type mounts struct {
	*snapshot.Snapshotter
	lazy  *lazy.Lazy
	log   *slog.Logger
	asked atomic.Bool // by containerd, for the snapshot of a layer or of a container
}

// used reports whether containerd takes snapshots from this node.
func (m *mounts) used() bool { return m.asked.Load() || len(m.Lazy()) > 0 }

func (m *mounts) observe(e snapshot.Event) {
	m.asked.Store(true)
	m.lazy.Observe(e)
}

// SnapshotsDir is where containerd's snapshots are in a node's folder.
func SnapshotsDir(dir string) string { return filepath.Join(dir, "snapshots") }

// openMounts makes the snapshotter and what it mounts with. Layers that are mounted are pinned and
// adopted before anything may evict them.
func (n *Node) openMounts(ctx context.Context) (_ *mounts, err error) {
	o := n.o.Snapshotter
	var ask func(context.Context) ([]byte, error)
	if n.o.Server != nil {
		ask = func(ctx context.Context) ([]byte, error) {
			set, err := n.o.Server.Keys(ctx)
			return []byte(set.PEM), err
		}
	}
	keys, err := lazy.OpenKeys(o.KeysFile, n.o.Dir, ask)
	if err != nil {
		return nil, err
	}
	m := &mounts{log: n.o.Log}
	m.lazy, err = lazy.New(lazy.Options{
		Dir: lazyDir(n.o.Dir), RunDir: o.RunDir, Version: n.o.Version, Node: n.o.Name, Holder: o.Holder,
		Store: n.store, Registry: n.o.Registry, Server: n.o.Server, Keys: keys,
		Own: mirror.OwnClient, GrantTTL: n.o.GrantTTL, GrantGrace: n.o.GrantGrace,
		Off: o.Off, Except: o.Except, Stargz: o.Stargz, BackgroundBytesPerSecond: o.BackgroundBytesPerSecond,
		SetAside: m.setAside, Remount: m.remount, Record: n.meter.Record, Registerer: n.o.Metrics, Log: n.o.Log,
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.close())
		}
	}()
	m.Snapshotter, err = snapshot.Open(ctx, snapshot.Options{
		Dir: SnapshotsDir(n.o.Dir), Images: m.lazy, Mounts: m.lazy, Pins: n.store, RemapIDs: snapshot.CanRemapIDs(), Observe: m.observe,
		Registerer: n.o.Metrics, Log: n.o.Log,
	})
	if err != nil {
		return nil, err
	}
	owners := m.Owners()
	if err := n.store.ReplacePins(snapshotPins, owners); err != nil {
		return nil, fmt.Errorf("pin what is mounted: %w", err)
	}
	var layers []digest.Digest
	for _, held := range owners {
		layers = append(layers, held...)
	}
	return m, m.lazy.Adopt(ctx, layers)
}

// lazyDir is where, in the node's folder, it is kept what is mounted.
func lazyDir(dir string) string { return filepath.Join(dir, "lazy") }

// snapshotPins is what the owners of the snapshots' pins begin with.
var snapshotPins = snapshot.Owner("")

// close gives back what was opened.
func (m *mounts) close() error {
	err := m.lazy.Close()
	if m.Snapshotter != nil {
		err = errors.Join(m.Close(), err)
	}
	return err
}

// ListenSnapshotter makes the socket for containerd; nil where this node mounts nothing. What containerd asks
// waits there until Run has mounted what was mounted.
func (n *Node) ListenSnapshotter(ctx context.Context) (net.Listener, error) {
	if n.mounts == nil {
		return nil, nil
	}
	return snapshot.Listen(ctx, n.o.Snapshotter.Socket)
}

// serve mounts what was mounted, and answers containerd until ctx ends.
func (m *mounts) serve(ctx context.Context, l net.Listener) error {
	if err := m.Restore(ctx); err != nil && ctx.Err() == nil {
		m.log.Error("not all is as it was before this node started; what containerd asks for is served all the same", "error", err)
	}
	return m.Serve(ctx, l)
}

// setAside ends the use of a layer whose image lied, by the chain ID that containerd has it under. Under the same one may be the
// layer of the image whose chain ID it is.
func (m *mounts) setAside(ctx context.Context, layer, chain digest.Digest, reason string) error {
	var errs []error
	for _, id := range liarsAmong(m.Lazy(), layer, chain) {
		err := m.SetAside(ctx, id, reason)
		if !errors.Is(err, accel.ErrNotFound) { // else its image was removed just now
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// liarsAmong are the IDs of the snapshots that have a layer under a chain ID.
func liarsAmong(all []snapshot.LazySnapshot, layer, chain digest.Digest) (ids []string) {
	for _, s := range all {
		if s.Request.Chain == chain && s.Layer == layer {
			ids = append(ids, s.ID)
		}
	}
	return ids
}

// remount mounts layers again whose holder has died, for containers to come.
func (m *mounts) remount(ctx context.Context, layers []digest.Digest) error {
	errs := make([]error, 0, len(layers))
	for _, d := range layers {
		errs = append(errs, m.Remount(ctx, d))
	}
	return errors.Join(errs...)
}

// verifyLayer is the store's way to check a layer's content.
func (n *Node) verifyLayer(ctx context.Context, d digest.Digest, f cache.LayerFiles, has func(int) bool, progress func(int64)) ([]int, error) {
	if n.mounts == nil {
		return lazy.VerifyLayer(ctx, d, f, has, progress)
	}
	return n.mounts.lazy.Verify(ctx, d, f, has, progress)
}

// MountedImage is an image that containerd has lazily mounted layers of.
type MountedImage struct {
	Image  string            `json:"image" doc:"as it was asked for"`
	Digest digest.Digest     `json:"digest" doc:"of the platform's manifest that was asked for"`
	Layers []lazy.LayerState `json:"layers"`
	Bad    map[string]string `json:"bad,omitempty" doc:"snapshots on which no container can start, and why"`
	// The sums of its layers.
	SizeBytes    int64         `json:"sizeBytes"`
	LocalPercent float64       `json:"localPercent"`
	BytesPerSec  float64       `json:"bytesPerSecond"`
	Ahead        *lazy.Ahead   `json:"ahead,omitempty" doc:"what was fetched ahead of its start, by a profile"`
	Misses       int64         `json:"misses" doc:"reads that had to wait, since the node started"`
	Waited       time.Duration `json:"waitedNs"`
}

// Mounted lists the images that are lazily mounted.
func (n *Node) mounted() []MountedImage {
	if n.mounts == nil {
		return []MountedImage{}
	}
	states := map[digest.Digest]lazy.LayerState{}
	for _, s := range n.mounts.lazy.Layers() {
		states[s.Digest] = s
	}
	bad := map[string]string{}
	for _, b := range n.mounts.Bad() {
		bad[b.ID] = b.Reason
	}
	type key struct {
		reference string
		manifest  digest.Digest
	}
	var order []key
	images := map[key]*MountedImage{}
	seen := map[key]map[digest.Digest]bool{}
	for _, s := range n.mounts.Lazy() {
		k := key{s.Request.Reference, s.Request.Manifest}
		m := images[k]
		if m == nil {
			m = &MountedImage{
				Image: k.reference, Digest: k.manifest, Layers: []lazy.LayerState{}, Bad: map[string]string{},
				Ahead: n.mounts.lazy.AheadOf(k.manifest),
			}
			images[k], seen[k] = m, map[digest.Digest]bool{}
			order = append(order, k)
		}
		if why, is := bad[s.ID]; is {
			m.Bad[s.ID] = why
		}
		if state, open := states[s.Layer]; open && !seen[k][s.Layer] {
			seen[k][s.Layer] = true
			m.add(state)
		}
	}
	all := make([]MountedImage, 0, len(order))
	for _, k := range order {
		m := images[k]
		if m.SizeBytes > 0 {
			m.LocalPercent /= float64(m.SizeBytes)
		}
		all = append(all, *m)
	}
	return all
}

// add adds a layer to an image; LocalPercent is weighed by size until all are in.
func (m *MountedImage) add(s lazy.LayerState) {
	m.Layers = append(m.Layers, s)
	m.SizeBytes += s.SizeBytes
	m.LocalPercent += s.LocalPercent * float64(s.SizeBytes)
	m.BytesPerSec += s.BytesPerSecond
	m.Misses += s.Misses
	m.Waited += s.Waited
}

// Answered names a container whose program answers.
type Answered struct {
	Container string `json:"container" minLength:"1" maxLength:"512" doc:"its ID"`
	Failed    bool   `json:"failed,omitempty" doc:"it did not come up: what it read is not kept"`
}

// starts are those that were recorded, or are being.
func (n *Node) starts() []lazy.Start {
	if n.mounts == nil {
		return []lazy.Start{}
	}
	return n.mounts.lazy.Starts()
}

func (n *Node) answered(a Answered) error {
	if n.mounts == nil {
		return fmt.Errorf("%w: this node mounts nothing", accel.ErrNotFound)
	}
	return n.mounts.lazy.Answered(a.Container, a.Failed)
}

// RecordNext names an image whose next start is to be recorded.
type RecordNext struct {
	Image string `json:"image" minLength:"1" maxLength:"1024" doc:"by the name that it is about to be pulled by"`
}

func (n *Node) recordNext(r RecordNext) error {
	if n.mounts == nil {
		return fmt.Errorf("%w: this node mounts nothing", accel.ErrNotFound)
	}
	return n.mounts.lazy.RecordNext(r.Image)
}

// FetchAhead says whether anything is fetched ahead of an image's starts.
type FetchAhead struct {
	Manifest digest.Digest `json:"manifest" doc:"digest of the platform's manifest"`
	On       bool          `json:"on"`
}

func (n *Node) fetchAhead(f FetchAhead) error {
	if err := f.Manifest.Validate(); err != nil {
		return fmt.Errorf("%w: manifest %.100q: %w", accel.ErrInvalid, f.Manifest, err)
	}
	if n.mounts == nil {
		return fmt.Errorf("%w: this node mounts nothing", accel.ErrNotFound)
	}
	n.mounts.lazy.FetchAhead(f.Manifest, f.On)
	return nil
}
