package lazy

import (
	"context"
	"errors"
	"time"

	"accel"
	"accel/registry"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
)

const (
	// expectedTime is how long an image that is expected is waited for, and maxExpected how many are at a time.
	expectedTime = 15 * time.Second
	maxExpected  = 16
	// warmConnections are made ready for the layers' TOCs and what the start reads first.
	warmConnections = 8
)

// prospect is what is known of an image beside its manifest, or is being asked for: all questions go out at once.
type prospect struct {
	there   *attached
	profile <-chan found
	mapped  chan struct{} // closed when there is an answer:
	m       accel.Mapping
	err     error
	beside  *attached // there, or where the converted image is, if that is another repository: the service publishes profiles beside it

	ctx    context.Context // of the questions
	cancel context.CancelFunc
}

// mapping waits for the image's mapping; accel.ErrNotFound where there is none.
func (p *prospect) mapping(ctx context.Context) (accel.Mapping, error) {
	select {
	case <-p.mapped:
		return p.m, p.err
	case <-ctx.Done():
		return accel.Mapping{}, ctx.Err()
	}
}

// profiles lists those beside the converted image, and says where that is.
func (p *prospect) profiles(ctx context.Context) (beside *attached, list []v1.Descriptor, err error) {
	select {
	case <-p.mapped:
	case <-ctx.Done():
		return p.there, nil, ctx.Err()
	}
	list, err = p.beside.of(ctx, accel.MediaTypeProfile)
	return p.beside, list, err
}

// failed reports whether it is known already that the question went wrong.
func (p *prospect) failed() bool {
	select {
	case <-p.mapped:
		return p.err != nil && !errors.Is(p.err, accel.ErrNotFound)
	default:
		return false
	}
}

// prospect takes what was asked for since the image is expected, or asks now. The caller cancels.
func (l *Lazy) prospect(running context.Context, source *registry.Source, key imageKey) *prospect {
	l.mu.Lock()
	p := l.expected[key]
	delete(l.expected, key)
	l.mu.Unlock()
	if p != nil && p.failed() {
		p.cancel()
		p = nil
	}
	if p == nil {
		p = l.look(running, source, key.manifest)
	}
	return p
}

// look asks the registry and the server. It is work of l that ends with running.
func (l *Lazy) look(running context.Context, source *registry.Source, manifest digest.Digest) *prospect {
	p := &prospect{mapped: make(chan struct{})}
	p.ctx, p.cancel = context.WithTimeout(running, resolveTime)
	p.there = l.attachedTo(p.ctx, source, manifest)
	p.profile = l.lookForProfile(p.ctx, p.there)
	l.work.Go(func() {
		defer close(p.mapped)
		p.m, p.err = l.mapping(p.ctx, p.there)
		p.beside = p.there
		if p.err != nil || p.m.TargetRepository == source.Repository() {
			return
		}
		if target, err := l.o.Registry.Source(p.m.TargetRepository, ""); err == nil {
			p.beside = l.attachedTo(p.ctx, target, manifest)
		}
	})
	return p
}

// Expect says that an image is likely to be asked for: a client has just got its manifest. What the server and the registry
// tell of it is asked for meanwhile, and connections are made; nothing is opened or fetched yet. It returns at once.
func (l *Lazy) Expect(repository string, manifest digest.Digest) {
	if _, err := l.reference(repository + "@" + manifest.String()); err != nil {
		return
	}
	source, err := l.o.Registry.Source(repository, "")
	if err != nil {
		return
	}
	key := imageKey{source.Repository(), manifest}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.running == nil || l.running.Err() != nil || l.answers.Contains(key) || l.expected[key] != nil || len(l.expected) == maxExpected {
		return
	}
	p := l.look(l.running, source, manifest)
	l.expected[key] = p
	l.work.Go(func() { source.Warm(p.ctx, warmConnections) })
	running := l.running
	l.work.Go(func() {
		select {
		case <-running.Done():
		case <-time.After(expectedTime):
		}
		l.mu.Lock()
		unused := l.expected[key] == p
		if unused {
			delete(l.expected, key)
		}
		l.mu.Unlock()
		if unused {
			p.cancel()
		}
	})
}
