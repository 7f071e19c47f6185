package readiness

import (
	"context"
	"errors"
	"fmt"
	"time"

	"accel"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// maxPush bounds the events of one Push; webhook bodies are bounded far below.
	maxPush = 1000
	// maxNameBytes bounds a source's name and a media type (RFC 6838: 127 + 1 + 127).
	maxNameBytes = 255
)

// push is a PushEvent that was checked.
type push struct {
	source, repository, tag, mediaType string
	digest                             digest.Digest
	at                                 time.Time
}

func (p *push) byAPI() bool { return p.source == accel.OriginAPI }

func checkPush(ev accel.PushEvent) (push, error) {
	p := push{source: ev.Source, repository: ev.Registry + "/" + ev.Repository, tag: ev.Tag, mediaType: ev.MediaType, digest: ev.Digest, at: stamp(ev.OccurredAt)}
	if ev.Tag == "" && ev.Digest == "" {
		return push{}, fmt.Errorf("%w: push of %q names neither a tag nor a digest", accel.ErrInvalid, p.repository)
	}
	if len(ev.Source) > maxNameBytes || len(ev.MediaType) > maxNameBytes {
		return push{}, fmt.Errorf("%w: push of %q: source or media type is longer than %d bytes", accel.ErrInvalid, p.repository, maxNameBytes)
	}
	return p, checkName(p.repository, ev.Tag, ev.Digest)
}

// checkName checks what becomes part of a record's identity.
func checkName(repository, tag string, d digest.Digest) error {
	named, err := reference.WithName(repository)
	if err != nil {
		return fmt.Errorf("%w: repository %q: %w (want HOST[:PORT]/PATH)", accel.ErrInvalid, repository, err)
	}
	if tag != "" {
		if _, err := reference.WithTag(named, tag); err != nil {
			return fmt.Errorf("%w: tag %q of %s: %w", accel.ErrInvalid, tag, repository, err)
		}
	}
	if d != "" {
		if err := d.Validate(); err != nil {
			return fmt.Errorf("%w: digest %q of %s: %w", accel.ErrInvalid, d, repository, err)
		}
	}
	return nil
}

// Push takes events in durably (one transaction for the slice) and returns one record each, in order.
// The record of an untagged manifest may be that of the index which has it. An
// event that is malformed is ErrInvalid, and none of the slice is taken in.
//
// A push of a record that Failed or was Superseded makes it Pending with all its
// attempts; a Rejected one only when the API pushed. An untagged manifest that is
// no index falls due after ChildHold, so that its index can come first; one from
// the API at once.
func (t *Tracker) Push(ctx context.Context, evs ...accel.PushEvent) ([]accel.Record, error) {
	if len(evs) > maxPush {
		return nil, fmt.Errorf("%w: %d events in one push, at most %d", accel.ErrInvalid, len(evs), maxPush)
	}
	pushes := make([]push, len(evs))
	for i, ev := range evs {
		p, err := checkPush(ev)
		if err != nil {
			return nil, fmt.Errorf("event %d: %w", i, err)
		}
		pushes[i] = p
	}
	var records []accel.Record
	err := t.update(ctx, func(c *change) error {
		records = make([]accel.Record, len(pushes))
		for i := range pushes {
			e, err := c.push(pushes[i])
			if err != nil {
				return err
			}
			records[i] = e.Record
		}
		if len(pushes) == 1 {
			return nil
		}
		for i := range records { // a later event may have changed an earlier one's record
			e, err := follow(c.Tx, records[i].ID)
			if err != nil {
				return err
			}
			records[i] = e.Record
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return records, nil
}

func (c *change) push(p push) (Entry, error) {
	if p.at.After(c.now) {
		p.at = c.now // a registry's clock that is ahead must not freeze the tag
	}
	if p.digest == "" {
		return c.intake(p)
	}
	id := recordID(p.repository, p.digest.String(), c.o.Params)
	e, known, err := c.find(id)
	if err != nil {
		return Entry{}, err
	}
	asked := p.byAPI() && p.tag == ""
	if !known && p.tag == "" {
		if index, ok, err := c.holdingIndex(p.repository, p.digest); err != nil || ok {
			return index, err
		}
	}
	was := e
	if !known {
		e, err = c.create(accel.Record{ID: id, Repository: p.repository, Digest: p.digest, Origin: p.source})
		if err != nil {
			return Entry{}, err
		}
	}
	if e.MediaType == "" {
		e.MediaType = p.mediaType
	}
	e.Asked = e.Asked || asked

	var ptr TagPointer
	if p.tag != "" {
		if ptr, err = pointer(c.Tx, p.repository, p.tag); err != nil {
			return Entry{}, err
		}
	}
	if p.tag != "" && ptr.older(id, p.at) {
		err = c.late(was, &e, p, ptr)
		return e, err
	}

	due := c.now
	if p.tag == "" && !p.byAPI() && !isIndex(e.MediaType) {
		due = c.now.Add(c.o.ChildHold)
	}
	if known {
		err = c.want(&e, p.byAPI(), due)
	} else {
		if p.tag != "" {
			e.Tags = []string{p.tag}
		}
		err = c.move(&e, accel.Pending, "")
		e.DueAt = due
	}
	if err == nil && p.tag != "" {
		err = c.point(&e, p.tag, p.at, false)
	}
	if err != nil {
		return Entry{}, err
	}
	return e, c.save(was, e)
}

// late takes in an event whose tag has moved on since.
func (c *change) late(was Entry, e *Entry, p push, ptr TagPointer) error {
	fresh := e.State == none
	if fresh || (len(e.Tags) == 0 && e.supersedable()) {
		if err := c.move(e, accel.Superseded, "tag "+p.tag+" had moved on when the event came"); err != nil {
			return err
		}
		e.SuccessorID = ptr.ID
		if e.SuccessorID == "" {
			e.SuccessorID = ptr.IntakeID
		}
	}
	return c.save(was, *e)
}

// intake takes in a push that names only a tag. The tag's record stays what it is until
// a worker has asked the registry: most such pushes are repeats.
func (c *change) intake(p push) (Entry, error) {
	id := recordID(p.repository, ":"+p.tag, c.o.Params)
	e, known, err := c.find(id)
	if err != nil {
		return Entry{}, err
	}
	was := e
	switch {
	case !known:
		if e, err = c.create(accel.Record{ID: id, Repository: p.repository, Tags: []string{p.tag}, Origin: p.source}); err == nil {
			err = c.move(&e, accel.Pending, "")
		}
	case e.State == accel.Converting:
		e.Again = true // what the worker is being told may be older than this push
	default:
		err = c.want(&e, p.byAPI(), c.now)
	}
	if err != nil {
		return Entry{}, err
	}
	e.Asked = e.Asked || p.byAPI()
	if err := c.save(was, e); err != nil {
		return Entry{}, err
	}
	ptr, err := pointer(c.Tx, p.repository, p.tag)
	if err != nil {
		return Entry{}, err
	}
	if ptr.IntakeID == id && !p.at.After(ptr.At) {
		return e, nil
	}
	ptr.IntakeID = id
	if p.at.After(ptr.At) {
		ptr.At, ptr.Observed = p.at, false
	}
	return e, c.PutTag(p.repository, p.tag, ptr)
}

// holdingIndex finds the record of an index that has d as a child and takes care of it.
func (c *change) holdingIndex(repository string, d digest.Digest) (Entry, bool, error) {
	es, err := c.ByDigest(repository, d, maxSameDigest)
	if err != nil {
		return Entry{}, false, err
	}
	for _, e := range es {
		if e.Digest != d && e.Params == c.o.Params && rank(&e) > 0 {
			return e, true, nil
		}
	}
	return Entry{}, false, nil
}

// Observe says what the registry itself answers for a tag: the tag moves to d whatever the order of events was.
// Empty d: the tag is gone from the registry. It returns the record that holds the tag
// now, or that lost it when d is empty (ErrNotFound: the tag was not known).
func (t *Tracker) Observe(ctx context.Context, repository, tag string, d digest.Digest, mediaType string) (accel.Record, error) {
	return t.ObserveAt(ctx, zeroTime, repository, tag, d, mediaType)
}

// ObserveAt is Observe for an answer to a question asked at the time asked (by Options.Now's
// clock): when an event has moved the tag since, the answer is out of date and
// changes nothing.
func (t *Tracker) ObserveAt(ctx context.Context, asked time.Time, repository, tag string, d digest.Digest, mediaType string) (accel.Record, error) {
	if tag == "" || len(mediaType) > maxNameBytes {
		return accel.Record{}, fmt.Errorf("%w: observation of %q with tag %q and a media type of %d bytes", accel.ErrInvalid, repository, tag, len(mediaType))
	}
	if err := checkName(repository, tag, d); err != nil {
		return accel.Record{}, err
	}
	var rec accel.Record
	err := t.update(ctx, func(c *change) error {
		ptr, err := pointer(c.Tx, repository, tag)
		if err != nil {
			return err
		}
		var e Entry
		switch {
		case !asked.IsZero() && ptr.ID != "" && ptr.MovedAt.After(asked):
			e, err = c.Get(ptr.ID)
		case d == "":
			e, err = c.observeGone(ptr, repository, tag)
		default:
			e, err = c.observe(ptr, repository, tag, d, mediaType)
		}
		rec = e.Record
		return err
	})
	if err != nil {
		return accel.Record{}, err
	}
	return rec, nil
}

func (c *change) observe(ptr TagPointer, repository, tag string, d digest.Digest, mediaType string) (Entry, error) {
	id := recordID(repository, d.String(), c.o.Params)
	e, known, err := c.find(id)
	if err != nil {
		return Entry{}, err
	}
	was := e
	switch {
	case !known:
		e, err = c.create(accel.Record{ID: id, Repository: repository, Digest: d, Tags: []string{tag}, MediaType: mediaType, Origin: accel.OriginReconcile})
		if err == nil {
			err = c.move(&e, accel.Pending, "")
		}
	case ptr.ID != id: // where the tag points to it already, a look is no push
		err = c.want(&e, false, c.now)
	}
	if err != nil {
		return Entry{}, err
	}
	if e.MediaType == "" {
		e.MediaType = mediaType
	}
	if err := c.point(&e, tag, zeroTime, true); err != nil {
		return Entry{}, err
	}
	return e, c.save(was, e)
}

func (c *change) observeGone(ptr TagPointer, repository, tag string) (Entry, error) {
	if ptr.ID == "" {
		return Entry{}, fmt.Errorf("%w: tag %s:%s", accel.ErrNotFound, repository, tag)
	}
	id := ptr.ID
	if err := c.untag(&ptr, repository, tag, nil); err != nil {
		return Entry{}, err
	}
	c.touch(repository)
	var err error
	if ptr.IntakeID == "" {
		err = c.DeleteTag(repository, tag)
	} else {
		err = c.PutTag(repository, tag, TagPointer{At: ptr.At, MovedAt: c.now, IntakeID: ptr.IntakeID})
	}
	if err != nil {
		return Entry{}, err
	}
	return c.Get(id)
}

// Ours reports whether d is a manifest that accel itself has pushed or is about to push
// (see Announce), so that the webhook of our own push is ignored. It does not depend on
// the repository: a copy of our output is our output.
func (t *Tracker) Ours(ctx context.Context, repository string, d digest.Digest) (bool, error) {
	if d == "" {
		return false, nil
	}
	var ours bool
	err := t.store.View(ctx, func(tx Tx) (err error) {
		ours, err = tx.Announced(d)
		return err
	})
	return ours, err
}

// Announce records digests that are about to be pushed, before they are. ErrLeaseLost as with Renew.
func (t *Tracker) Announce(ctx context.Context, w Work, ds ...digest.Digest) error {
	return t.update(ctx, func(c *change) error {
		if _, err := c.held(w); err != nil {
			return err
		}
		var errs []error
		for _, d := range ds {
			errs = append(errs, c.Announce(d))
		}
		return errors.Join(errs...)
	})
}

// AnnounceArtifact is Announce for what is pushed about an image and is none itself, so that no
// lease is needed.
func (t *Tracker) AnnounceArtifact(ctx context.Context, d digest.Digest) error {
	return t.update(ctx, func(c *change) error { return c.Announce(d) })
}

func isIndex(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageIndex || mediaType == "application/vnd.docker.distribution.manifest.list.v2+json"
}
