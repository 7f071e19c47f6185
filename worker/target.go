package worker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"accel"
	"accel/internal/keylock"
	"accel/readiness"
	"accel/registry"

	"github.com/opencontainers/go-digest"
)

// Target says where the converted form of an image is pushed. Both templates
// may hold {registry}, {path} (the repository below the host), {repository}
// (both together) and, in Tag alone, {tag}.
type Target struct {
	Repository string // default "{repository}": beside the source
	Tag        string // default "{tag}-esgz"; must contain {tag}
}

const (
	defaultTargetRepository = "{repository}"
	defaultTargetTag        = "{tag}-esgz"
)

func (t Target) withDefaults() Target {
	if t.Repository == "" {
		t.Repository = defaultTargetRepository
	}
	if t.Tag == "" {
		t.Tag = defaultTargetTag
	}
	return t
}

func (t Target) validate() error {
	t = t.withDefaults()
	if !strings.Contains(t.Tag, "{tag}") {
		return fmt.Errorf("%w: target.tag %q: must contain {tag}, or every tag would become the same one", accel.ErrInvalid, t.Tag)
	}
	repository, tag := t.For("registry.example:5000/team/app", "v1")
	if _, err := accel.ParseReference(repository + ":" + tag); err != nil {
		return fmt.Errorf("target.repository %q with target.tag %q does not make a reference: %w", t.Repository, t.Tag, err)
	}
	if repository == "registry.example:5000/team/app" && tag == "v1" {
		return fmt.Errorf("%w: target.tag %q with target.repository %q would overwrite the source; add a suffix or another repository", accel.ErrInvalid, t.Tag, t.Repository)
	}
	return nil
}

// For returns the target repository ("host/path") and tag of a source
// repository and tag.
func (t Target) For(repository, tag string) (targetRepository, targetTag string) {
	t = t.withDefaults()
	host, path, _ := strings.Cut(repository, "/")
	targetRepository = strings.NewReplacer("{repository}", repository, "{registry}", host, "{path}", path).Replace(t.Repository)
	targetTag = strings.NewReplacer("{tag}", tag, "{registry}", host, "{path}", path).Replace(t.Tag)
	return targetRepository, targetTag
}

// maxTagBytes is the longest tag that the distribution spec allows.
const maxTagBytes = 128

// tagMover points target tags at converted images. Moves of one target tag are
// serialised, and the source is looked at again just before, so that an older
// image never takes the tag from a newer one.
type tagMover struct {
	source   sourceTags
	tracker  *readiness.Tracker
	registry *registry.Client
	target   Target
	locks    keylock.Mutex
}

// move points the target tag of every tag of rec at its target and returns the
// target tags that now stand. A tag that has moved on at the source is told to
// the tracker and left alone.
func (m *tagMover) move(ctx context.Context, rec accel.Record, target digest.Digest) ([]string, error) {
	if len(rec.Tags) == 0 {
		return m.moveUntagged(ctx, rec, target)
	}
	var done []string
	for _, tag := range rec.Tags {
		ok, targetTag, err := m.moveOne(ctx, rec, tag, target)
		if err != nil {
			return nil, err
		}
		if ok {
			done = append(done, targetTag)
		}
	}
	slices.Sort(done)
	return done, nil
}

// moveUntagged keeps an image that was pushed by digest alone from being swept
// away by registries that purge untagged manifests.
func (m *tagMover) moveUntagged(ctx context.Context, rec accel.Record, target digest.Digest) ([]string, error) {
	repository, _ := m.target.For(rec.Repository, "")
	tag := rec.Digest.Algorithm().String() + "-" + rec.Digest.Encoded() + ".esgz"
	if err := m.registry.Tag(ctx, repository, tag, target); err != nil {
		return nil, fmt.Errorf("tag %s:%s: %w", repository, tag, err)
	}
	return []string{tag}, nil
}

func (m *tagMover) moveOne(ctx context.Context, rec accel.Record, tag string, target digest.Digest) (bool, string, error) {
	repository, targetTag := m.target.For(rec.Repository, tag)
	if len(targetTag) > maxTagBytes {
		return false, "", &accel.Rejection{Rule: "target.tag", Detail: fmt.Sprintf("target tag %q of source tag %q is longer than %d characters", targetTag, tag, maxTagBytes)}
	}
	unlock, err := m.locks.Lock(ctx, repository+":"+targetTag)
	if err != nil {
		return false, "", err
	}
	defer unlock()

	current, err := m.source.observe(ctx, rec, tag)
	if errors.Is(err, accel.ErrNotFound) {
		return false, "", forgetTag(ctx, m.tracker, rec, tag)
	}
	if err != nil || !current {
		return false, "", err
	}
	holder, err := m.tracker.Holder(ctx, rec.Repository, tag)
	if errors.Is(err, accel.ErrNotFound) || (err == nil && holder.ID != rec.ID) {
		return false, "", nil
	}
	if err != nil {
		return false, "", err
	}
	standing, err := m.registry.Head(ctx, repository, targetTag)
	if err == nil && digest.Digest(standing.Digest.String()) == target {
		return true, targetTag, nil
	}
	if err != nil && !errors.Is(err, accel.ErrNotFound) {
		return false, "", fmt.Errorf("look at target tag %s:%s: %w", repository, targetTag, err)
	}
	if err := m.registry.Tag(ctx, repository, targetTag, target); err != nil {
		return false, "", fmt.Errorf("tag %s:%s: %w", repository, targetTag, err)
	}
	return true, targetTag, nil
}

const (
	tagSettle = 5 * time.Second
	// settlePause is between questions for a tag that is settling.
	settlePause = 200 * time.Millisecond
)

// sourceTags are the tags of source images, as the registry has them.
type sourceTags struct {
	tracker  *readiness.Tracker
	registry *registry.Client
	settle   time.Duration // see Options.TagSettle
}

// observe asks the registry whether tag still points at rec, and tells the
// tracker where it points to another digest, and not because it is about to be moved. The error is an accel.ErrNotFound
// where the tag is gone.
func (s sourceTags) observe(ctx context.Context, rec accel.Record, tag string) (current bool, err error) {
	for {
		asked := time.Now()
		desc, err := s.registry.Head(ctx, rec.Repository, tag)
		if err != nil {
			return false, fmt.Errorf("look at source tag %s:%s: %w", rec.Repository, tag, err)
		}
		d := digest.Digest(desc.Digest.String())
		if d == rec.Digest {
			return true, nil
		}
		pushed, err := s.tracker.PushedAt(ctx, rec.Repository, tag, rec.ID)
		if err != nil {
			return false, err
		}
		if time.Since(pushed) >= s.settle {
			_, err = s.tracker.ObserveAt(ctx, asked, rec.Repository, tag, d, string(desc.MediaType))
			return false, err
		}
		sleep(ctx, settlePause)
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
	}
}

// forgetTag tells the tracker that a tag is gone from the registry.
func forgetTag(ctx context.Context, tracker *readiness.Tracker, rec accel.Record, tag string) error {
	_, err := tracker.Observe(ctx, rec.Repository, tag, "", "")
	if errors.Is(err, accel.ErrNotFound) {
		return nil // known already
	}
	return err
}
