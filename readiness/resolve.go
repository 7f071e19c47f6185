package readiness

import (
	"context"
	"fmt"
	"slices"

	"accel"

	"github.com/opencontainers/go-digest"
)

// maxChildren bounds the members of an index: a manifest of 4 MiB holds no more.
const maxChildren = 20_000

// Resolve turns a claimed record without a digest into the record of d (merged into an existing
// one where there is one), moving its tag. The returned Work goes on under a lease of its own; ok is false when
// the existing record needs no work (Ready, or in another worker's hands), and when an event moved the tag
// while the registry was asked: then the intake row is due again. For a record that has
// the digest d already, only the media type is noted. ErrLeaseLost as with Renew.
func (t *Tracker) Resolve(ctx context.Context, w Work, d digest.Digest, mediaType string) (next Work, ok bool, err error) {
	if d.Validate() != nil || len(mediaType) > maxNameBytes {
		return Work{}, false, fmt.Errorf("%w: resolve %s to %q with a media type of %d bytes", accel.ErrInvalid, w.Image(), d, len(mediaType))
	}
	err = t.update(ctx, func(c *change) error {
		var e Entry
		e, ok, err = c.resolve(w, d, mediaType)
		next = Work{e.Record}
		return err
	})
	if err != nil || !ok {
		return Work{}, false, err
	}
	return next, true, nil
}

func (c *change) resolve(w Work, d digest.Digest, mediaType string) (Entry, bool, error) {
	in, err := c.held(w)
	if err != nil {
		return Entry{}, false, err
	}
	if in.Digest != "" {
		if in.Digest != d {
			return Entry{}, false, fmt.Errorf("%w: record %s is %s, not %s", accel.ErrInvalid, in.ID, in.Image(), d)
		}
		in.MediaType = mediaType
		return in, true, c.put(in)
	}
	tag := in.Tags[0]
	ptr, err := pointer(c.Tx, in.Repository, tag)
	if err != nil {
		return Entry{}, false, err
	}
	id := recordID(in.Repository, d.String(), c.o.Params)
	if ptr.ID != "" && ptr.ID != id && ptr.MovedAt.After(in.UpdatedAt) {
		return Entry{}, false, c.askAgain(in)
	}
	e, known, err := c.find(id)
	if err != nil {
		return Entry{}, false, err
	}
	if known {
		err = c.want(&e, in.Asked, c.now)
	} else {
		e, err = c.create(accel.Record{ID: id, Repository: in.Repository, Digest: d, Tags: []string{tag}, Origin: in.Origin})
		if err == nil {
			e.CreatedAt = in.CreatedAt // the wait began with the intake row
			err = c.move(&e, accel.Pending, "")
		}
	}
	if err != nil {
		return Entry{}, false, err
	}
	if e.MediaType == "" {
		e.MediaType = mediaType
	}
	if in.Again {
		err = c.askAgain(in)
	} else {
		err = c.remove(&in, "resolved to "+d.String(), &e)
	}
	if err == nil {
		err = c.point(&e, tag, ptr.At, true)
	}
	if err != nil {
		return Entry{}, false, err
	}
	ok := e.State == accel.Pending
	if ok {
		if err := c.move(&e, accel.Converting, ""); err != nil {
			return Entry{}, false, err
		}
	}
	return e, ok, c.put(e)
}

// askAgain gives a claimed intake row back, for the tag moved while its worker
// was asking the registry.
func (c *change) askAgain(in Entry) error {
	if err := c.move(&in, accel.Pending, "the tag was pushed again while it was looked up"); err != nil {
		return err
	}
	in.Again = false
	in.Attempts = 0
	return c.put(in)
}

// Fold merges the untagged records of an index's children into the index's record: each child record that has no
// tag and was not asked for by the API is removed, and its id and digest lead to the index from then on; a worker
// that holds one has lost its lease. For an image, call it with its media type and no
// children, so that IndexInWork no longer takes it for a possible index. ErrLeaseLost as with Renew.
func (t *Tracker) Fold(ctx context.Context, w Work, mediaType string, children []digest.Digest) error {
	if len(children) > maxChildren || len(mediaType) > maxNameBytes {
		return fmt.Errorf("%w: fold %s: %d children, at most %d", accel.ErrInvalid, w.Image(), len(children), maxChildren)
	}
	for _, d := range children {
		if d.Validate() != nil {
			return fmt.Errorf("%w: fold %s: child digest %q", accel.ErrInvalid, w.Image(), d)
		}
	}
	return t.withHeld(ctx, w, func(c *change, e *Entry) error {
		if mediaType != "" {
			e.MediaType = mediaType
		}
		e.Folded = true
		members := slices.Clone(children)
		for _, d := range children {
			nested, err := c.foldChild(e, d)
			if err != nil {
				return err
			}
			members = append(members, nested...)
		}
		slices.Sort(members)
		members = slices.Compact(members)
		e.Children = slices.DeleteFunc(members, func(d digest.Digest) bool { return d == e.Digest })
		if len(e.Children) == 0 {
			e.Children = nil
		}
		return nil
	})
}

// foldChild removes the record of d in favour of e, and returns the children that it had itself.
func (c *change) foldChild(e *Entry, d digest.Digest) ([]digest.Digest, error) {
	child, ok, err := c.find(recordID(e.Repository, d.String(), e.Params))
	if err != nil || !ok || child.ID == e.ID || len(child.Tags) > 0 || child.Asked {
		return nil, err
	}
	// What a Ready child's target is good for stays so while the index is in work.
	if err := c.MoveMappings(child.ID, e.ID); err != nil {
		return nil, err
	}
	return child.Children, c.remove(&child, "folded into index "+e.Digest.String(), e)
}

// IndexInWork reports whether an index (or a tagged manifest of unknown kind) of the repository is Pending or Converting that has not been
// folded yet, so that an untagged child should wait a little longer.
func (t *Tracker) IndexInWork(ctx context.Context, repository string) (bool, error) {
	var found bool
	err := t.store.View(ctx, func(tx Tx) (err error) {
		found, err = tx.Unfolded(repository)
		return err
	})
	return found, err
}
