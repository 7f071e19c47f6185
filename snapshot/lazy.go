package snapshot

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// refusal is why containerd has to download a layer.
type refusal struct {
	cause string // one of the Cause constants
	err   error
}

func (r *refusal) Error() string { return r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

// prepareLayer answers containerd's question before it downloads a layer.
func (s *Snapshotter) prepareLayer(ctx context.Context, key, parent string, labels map[string]string) ([]mount.Mount, error) {
	e := Event{Began: time.Now(), Key: key, Request: Request{Namespace: namespaceOf(ctx)}}
	err := s.lazily(ctx, key, parent, labels, &e)
	e.Took = time.Since(e.Began)
	var no *refusal
	switch {
	case err == nil:
		s.tell(e)
		return nil, fmt.Errorf("the snapshot of layer %s is there: %w", e.Request.Layer, errdefs.ErrAlreadyExists)
	case ctx.Err() != nil:
		return nil, ctx.Err() // containerd gave up, and a snapshot would be nobody's
	case !errors.As(err, &no):
		return nil, err
	}
	e.Kind, e.Cause, e.Reason = KindDeclined, no.cause, shorten(no.Error())
	s.tell(e)
	m, _, err := s.prepare(ctx, snapshots.KindActive, key, parent, snapshots.WithLabels(labels))
	return m, err
}

// tell reports what became of a layer.
func (s *Snapshotter) tell(e Event) {
	s.metrics.answered(e)
	log := s.o.Log.With("image", e.Request.Reference, "layer", e.Request.Layer, "took", e.Took)
	if e.Kind == KindDeclined {
		log.Info("containerd downloads a layer", "cause", e.Cause, "reason", e.Reason)
	} else {
		log.Debug("a layer is there without a download", "how", string(e.Kind), "mounted", e.Layer)
	}
	s.o.Observe(e)
}

// lazily has a layer mounted and its snapshot committed, within Limit. The error is a *refusal where
// containerd has to download it; then nothing of the attempt is left.
func (s *Snapshotter) lazily(ctx context.Context, key, parent string, labels map[string]string, e *Event) error {
	limited, cancel := context.WithTimeout(ctx, s.o.Limit)
	defer cancel()
	var err error
	if e.Request, err = requestOf(e.Request.Namespace, parent, labels); err != nil {
		return &refusal{CauseLabels, err}
	}
	if e.Layer, err = s.resolve(limited, e.Request); err != nil {
		return err
	}
	name, err := s.nameFor(ctx, parent, e.Request.Chain)
	if err != nil {
		return err
	}
	e.Kind = KindShared
	if there, err := s.share(limited, name, e.Layer); there || err != nil {
		return err
	}
	e.Kind = KindMounted
	err = s.place(limited, key, parent, name, labels, e.Request, e.Layer)
	var no *refusal
	if errdefs.IsAlreadyExists(err) && !errors.As(err, &no) {
		// Another namespace or pull was quicker; of the same key nothing is shared.
		e.Kind = KindShared
		if there, err := s.share(limited, name, e.Layer); there || err != nil {
			return err
		}
	}
	return err
}

// resolve asks Images.
func (s *Snapshotter) resolve(ctx context.Context, request Request) (digest.Digest, error) {
	lazy, err := s.o.Images.Layer(ctx, request)
	if err == nil {
		if err = lazy.Layer.Validate(); err == nil {
			return lazy.Layer, nil
		}
		err = fmt.Errorf("the layer's digest %q: %w", lazy.Layer, err)
	}
	var declined *Declined
	switch {
	case errors.As(err, &declined):
		return "", &refusal{CauseImage, err}
	case ctx.Err() != nil:
		return "", &refusal{CauseTimeout, fmt.Errorf("not known within %v: %w", s.o.Limit, err)}
	}
	return "", &refusal{CauseError, err}
}

// nameFor is the name of a lazy snapshot: its chain where all below is lazy too, so that containerd's
// namespaces share it; a name of its own where it stands on a snapshot of one namespace. It follows from what
// the snapshot is, so that two pulls at once cannot make two of it.
func (s *Snapshotter) nameFor(ctx context.Context, parent string, chain digest.Digest) (string, error) {
	if parent == "" {
		return chain.String(), nil
	}
	below, err := s.Stat(ctx, parent)
	if err != nil {
		return "", err
	}
	if below.Labels[labelLayer] != "" && below.Name == below.Labels[snapshots.LabelSnapshotRef] {
		return chain.String(), nil
	}
	return chain.String() + " on " + parent, nil
}

// share takes a snapshot that is there already. One that was made from another layer is not shared, whatever its chain
// says: nobody has checked that both have the same content.
func (s *Snapshotter) share(ctx context.Context, name string, layer digest.Digest) (there bool, err error) {
	var id string
	err = s.store.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		id, _, _, err = storage.GetInfo(ctx, name)
		return err
	})
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	r := s.remote(id)
	if r == nil {
		return false, &refusal{CauseConflict, fmt.Errorf("snapshot %q is there and is not a lazy one", name)}
	}
	if has := s.layer(r); has != layer {
		return false, &refusal{CauseConflict, fmt.Errorf("the chain is mounted from layer %s already, and this image has %s", has, layer)}
	}
	if err := s.ensure(ctx, r); err != nil {
		return false, &refusal{CauseMount, err}
	}
	return true, nil
}

// place makes a lazy snapshot. errdefs.ErrAlreadyExists where there is one with that name or key.
func (s *Snapshotter) place(ctx context.Context, key, parent, name string, labels map[string]string, request Request, layer digest.Digest) (err error) {
	labels = lazyLabels(labels, request.Namespace, layer)
	sn, _, err := s.create(ctx, snapshots.KindActive, key, parent, snapshots.WithLabels(labels))
	if err != nil {
		return err
	}
	r := &remote{id: sn.ID, name: name, request: request, layer: layer}
	s.mu.Lock()
	s.remotes[sn.ID] = r
	s.mu.Unlock()
	defer func() {
		if err != nil {
			if e := s.Remove(context.WithoutCancel(ctx), key); e != nil {
				err = errors.Join(e, errors.New(err.Error())) // no refusal any more: the key is taken
			}
		}
	}()
	unlock, err := s.turns.Lock(ctx, r.id)
	if err != nil {
		return &refusal{CauseTimeout, err}
	}
	err = s.pinAndMount(ctx, r, layer)
	unlock()
	if err != nil {
		return &refusal{CauseMount, err}
	}
	return s.store.WithTransaction(ctx, true, func(ctx context.Context) error {
		_, err := storage.CommitActive(ctx, key, name, snapshots.Usage{}, snapshots.WithLabels(labels))
		return err
	})
}
