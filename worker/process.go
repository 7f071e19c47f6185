package worker

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"accel"
	"accel/convert"
	"accel/readiness"
	"accel/registry"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
)

// childRetry is how long an untagged manifest waits again while an index of
// its repository, which may name it, has not been looked into.
const childRetry = time.Second

// resolve gives a record that has only a tag its digest, as the registry
// answers now. ok is false where nothing is left to do.
func (k *Worker) resolve(ctx context.Context, w readiness.Work) (next readiness.Work, ok bool, err error) {
	if err := k.Repositories.check(w.Repository); err != nil {
		return w, false, err
	}
	if len(w.Tags) == 0 {
		return w, false, accel.Permanent(fmt.Errorf("record %s has neither a tag nor a digest", w.ID))
	}
	desc, err := k.Registry.Head(ctx, w.Repository, w.Tags[0])
	if err != nil {
		return w, false, fmt.Errorf("resolve %s: %w", w.Image(), err)
	}
	return k.Tracker.Resolve(ctx, w, digest.Digest(desc.Digest.String()), string(desc.MediaType))
}

// process converts one leased record. It returns nil when the record has been
// moved to its next state, and an error for settle to report otherwise. What it adds to after is
// to be done in both cases.
func (k *Worker) process(ctx context.Context, w readiness.Work, after *afterwork) (err error) {
	if err := k.Repositories.check(w.Repository); err != nil {
		return err
	}
	for _, tag := range w.Tags {
		// A registry may answer "not found" for a moment after a push. Whether a tag is
		// gone is decided later, when the target tag is to be moved.
		if _, err := k.tags.source.observe(ctx, w.Record, tag); err != nil && !errors.Is(err, accel.ErrNotFound) {
			return err
		}
	}
	if err := k.Tracker.Renew(ctx, w); err != nil {
		return err // superseded by what the registry just said
	}
	src, err := k.Registry.Pull(ctx, w.Repository, w.Digest)
	if err != nil {
		return fmt.Errorf("pull %s: %w", w.Image(), err)
	}
	if done, err := k.sift(ctx, w, src); done || err != nil {
		return err
	}
	started := time.Now()
	repository, _ := k.Target.For(w.Repository, "")
	options := convert.Options{
		LayerDone: func(ctx context.Context, l v1.Layer, m accel.LayerMapping) error {
			if m.Target == m.Source && repository == w.Repository {
				return nil // passed through, and there already
			}
			return k.Registry.PushLayer(ctx, repository, l)
		},
	}
	if w.Attempts == 1 { // a memo that misled the first attempt does not mislead the next
		options.Memo = layerMemo{tracker: k.Tracker, registry: k.Registry, repository: repository}
	}
	conv, err := k.Converter.Convert(ctx, convert.Source{Repository: w.Repository, Image: src.Image, Index: src.Index}, options)
	if err != nil {
		return fmt.Errorf("convert %s: %w", w.Image(), err)
	}
	res := conv.Stats
	res.Queued = started.Sub(w.CreatedAt)
	res.Convert = time.Since(started)

	foretold := k.foretell(after.run, w.Record, conv, repository)
	after.add(func(ctx context.Context) {
		why := context.Canceled // it will be converted once more
		if err == nil {
			foretold.wait(ctx, foretellLimit)
			why = errLate
		}
		foretold.stop(ctx, why, func() {
			if cerr := conv.Close(); cerr != nil {
				k.Log.Warn("cannot remove a conversion's temporary files", "image", w.Image(), "error", cerr)
			}
		})
	})

	out, err := k.publish(ctx, w, conv, repository, &res)
	if err != nil {
		return err
	}
	// Tags that came while the image was converted are the record's too.
	rec, err := k.Tracker.Get(ctx, w.ID)
	if err != nil {
		return err
	}
	target := accel.Target{Repository: repository, Digest: out.digest}
	if conv.Unchanged {
		target = accel.Target{Repository: w.Repository, Digest: w.Digest, Tags: rec.Tags}
	} else if target.Tags, err = k.tags.move(ctx, rec, out.digest); err != nil {
		return err
	}
	foretold.wait(ctx, foretellGrace)
	res.Total = time.Since(w.CreatedAt)
	if err := k.Tracker.Finish(ctx, w, target, res, out.mappings); err != nil {
		return err
	}
	for m := range out.mappings {
		if err := k.Profiles.Hasten(ctx, m); err != nil && ctx.Err() == nil { // it is published later
			k.Log.Warn("cannot hasten the publication of an image's profile", "image", w.Image(), "manifest", m, "error", err)
		}
	}
	k.metrics.finished(res)
	return nil
}

// sift sorts out what is not to be converted: our own output, artifacts, and
// children that their index takes along. done means that the record has been
// dealt with.
func (k *Worker) sift(ctx context.Context, w readiness.Work, src *registry.Manifest) (done bool, err error) {
	annotations, configType, children, err := look(src)
	if err != nil {
		return false, accel.Permanent(fmt.Errorf("read manifest of %s: %w", w.Image(), err))
	}
	if of := annotations[accel.AnnotationSourceDigest]; of != "" {
		return true, k.Tracker.Drop(ctx, w, "accel's own output, made from "+of)
	}
	if why := notAnImage(src, configType); why != "" {
		if w.Origin == accel.OriginAPI {
			return false, &accel.Rejection{Rule: "format.image", Detail: why}
		}
		return true, k.Tracker.Drop(ctx, w, "no image: "+why)
	}
	// For an image this says that it is no index that others should wait for.
	if err := k.Tracker.Fold(ctx, w, string(src.Descriptor.MediaType), children); err != nil {
		return false, err
	}
	if src.Image != nil && len(w.Tags) == 0 && w.Origin != accel.OriginAPI {
		wait, err := k.Tracker.IndexInWork(ctx, w.Repository)
		if err != nil {
			return false, err
		}
		if wait {
			return true, k.Tracker.Defer(ctx, w, childRetry, "waits for an index that may name it")
		}
	}
	return false, nil
}

// look reads what sift decides by out of a manifest.
func look(src *registry.Manifest) (annotations map[string]string, configType types.MediaType, children []digest.Digest, err error) {
	switch {
	case src.Index != nil:
		m, err := src.Index.IndexManifest()
		if err != nil {
			return nil, "", nil, err
		}
		for _, d := range m.Manifests {
			children = append(children, digest.Digest(d.Digest.String()))
		}
		return m.Annotations, "", children, nil
	case src.Image != nil:
		m, err := src.Image.Manifest()
		if err != nil {
			return nil, "", nil, err
		}
		return m.Annotations, m.Config.MediaType, nil, nil
	default:
		return nil, "", nil, nil
	}
}

// notAnImage says in words why src is no runnable image, or "" where it is one.
func notAnImage(src *registry.Manifest, configType types.MediaType) string {
	switch {
	case src.Image == nil && src.Index == nil:
		return fmt.Sprintf("the manifest's media type is %q", src.Descriptor.MediaType)
	case src.Image != nil && !configType.IsConfig():
		return fmt.Sprintf("an artifact whose config has media type %q", configType)
	default:
		return ""
	}
}

// published is what publish pushed.
type published struct {
	digest   digest.Digest
	mappings map[digest.Digest][]byte // signed envelopes by source platform manifest
}

// publish signs the mappings, announces every digest that is about to be
// pushed (so that the webhooks of our own pushes are known), pushes, and reads
// it all back.
func (k *Worker) publish(ctx context.Context, w readiness.Work, conv *convert.Result, repository string, res *accel.Result) (published, error) {
	out := published{digest: w.Digest, mappings: map[digest.Digest][]byte{}}
	if conv.Unchanged {
		repository = w.Repository
	}
	own, err := manifestDigests(conv)
	if err != nil {
		return out, fmt.Errorf("converted form of %s: %w", w.Image(), err)
	}
	if !conv.Unchanged {
		out.digest = own[0]
	} else {
		own = nil
	}
	attachments, err := k.sign(ctx, conv.Mappings, repository, out.mappings)
	if err != nil {
		return out, err
	}
	for _, a := range attachments {
		own = append(own, a.digest)
	}
	if err := k.Tracker.Announce(ctx, w, own...); err != nil {
		return out, err
	}

	pushing := time.Now()
	if !conv.Unchanged {
		if err := k.push(ctx, repository, conv); err != nil {
			return out, fmt.Errorf("push the converted form of %s to %s: %w", w.Image(), repository, err)
		}
	}
	for _, a := range attachments {
		if _, err := k.Registry.Attach(ctx, repository, a.subject, accel.MediaTypeMapping, a.annotations); err != nil {
			return out, fmt.Errorf("attach the mapping of %s to %s@%s: %w", w.Image(), repository, a.subject.Digest, err)
		}
	}
	res.Push = time.Since(pushing)

	reading := time.Now()
	if err := k.verify(ctx, conv.Mappings, repository, out.digest); err != nil {
		return out, fmt.Errorf("read back %s@%s: %w", repository, out.digest, err)
	}
	res.Verify = time.Since(reading)
	return out, nil
}

func (k *Worker) push(ctx context.Context, repository string, conv *convert.Result) error {
	if conv.Index != nil {
		return k.Registry.PushIndex(ctx, repository, conv.Index)
	}
	return k.Registry.PushImage(ctx, repository, conv.Image)
}

// attachment is one mapping artifact, ready to be pushed.
type attachment struct {
	subject     v1.Descriptor
	annotations map[string]string
	digest      digest.Digest
}

// sign makes a mapping artifact for each platform and notes its envelope.
func (k *Worker) sign(ctx context.Context, mappings []accel.Mapping, repository string, envelopes map[digest.Digest][]byte) ([]attachment, error) {
	var out []attachment
	for _, m := range mappings {
		m.TargetRepository = repository
		envelope, err := k.Keys.Sign(ctx, m)
		if err != nil {
			return nil, fmt.Errorf("sign the mapping of %s: %w", m.SourceManifest, err)
		}
		envelopes[m.SourceManifest] = envelope
		subject, err := k.Registry.Head(ctx, m.SourceRepository, m.SourceManifest.String())
		if err != nil {
			return nil, fmt.Errorf("look at %s@%s: %w", m.SourceRepository, m.SourceManifest, err)
		}
		a := attachment{
			subject:     v1.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size},
			annotations: map[string]string{accel.AnnotationMapping: string(envelope)},
		}
		_, desc, err := registry.BuildAttachment(a.subject, accel.MediaTypeMapping, a.annotations)
		if err != nil {
			return nil, err
		}
		a.digest = digest.Digest(desc.Digest.String())
		out = append(out, a)
	}
	return out, nil
}

// manifestDigests lists the digests of conv's manifests, the top one first.
func manifestDigests(conv *convert.Result) ([]digest.Digest, error) {
	if conv.Index == nil {
		d, err := conv.Image.Digest()
		return []digest.Digest{digest.Digest(d.String())}, err
	}
	top, err := conv.Index.Digest()
	if err != nil {
		return nil, err
	}
	m, err := conv.Index.IndexManifest()
	if err != nil {
		return nil, err
	}
	ds := []digest.Digest{digest.Digest(top.String())}
	for _, d := range m.Manifests {
		ds = append(ds, digest.Digest(d.Digest.String()))
	}
	return ds, nil
}

// isTag reports whether a tag names an image, not a referrers fallback index,
// a signature or a digest-named target of ours (sha256-...).
func isTag(tag string) bool { return !strings.HasPrefix(tag, "sha256-") }
