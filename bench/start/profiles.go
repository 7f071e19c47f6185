package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"accel"
	"accel/bundle"
	"accel/node"
	"accel/profile"
	"accel/profile/artifact"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
)

const (
	// recordingPatience is more than the longest that a node records a start.
	recordingPatience = 3 * time.Minute
	recordingPoll     = 100 * time.Millisecond
	// filesAtHand are kept whole while a prediction reads in them.
	filesAtHand = 16
	// maxBundleBytes is the service's default of profiles.bundle; maxBundleContentBytes are more than it unpacks to.
	maxBundleBytes, maxBundleContentBytes = 128 << 20, 1 << 30
)

// attachProfile publishes a profile beside an image, where nodes look for it. Package worker
// does the same with what its ledger says.
func (b *bed) attachProfile(ctx context.Context, repository string, p accel.Profile, layers []accel.LayerMapping, bundled bool) error {
	made, err := artifact.FormOf(p)
	if err != nil {
		return err
	}
	if bundled {
		source, err := b.client.Source(repository, "")
		if err != nil {
			return err
		}
		boot, err := bundle.Make(ctx, layers, p.Items, func(ctx context.Context, layer int, offset, bytes int64) ([]byte, error) {
			l := layers[layer]
			r, err := source.Range(ctx, l.Target, l.TargetBytes, offset, bytes)
			if err != nil {
				return nil, err
			}
			content, err := io.ReadAll(r)
			return content, errors.Join(err, r.Close())
		}, bundle.Bounds{ContentBytes: maxBundleContentBytes, SizeBytes: maxBundleBytes})
		if err != nil {
			return err
		}
		fmt.Fprintf(os.Stderr, "%s: a boot bundle of %.1f MB\n", repository, float64(boot.SizeBytes)/megabyte)
		if made, err = made.WithBundle(boot); err != nil {
			return err
		}
	}
	subject, err := b.client.Head(ctx, repository, p.Manifest.String())
	if err != nil {
		return err
	}
	subject = v1.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size}
	_, err = b.client.Attach(ctx, repository, subject, accel.MediaTypeProfile, made.Annotations, made.Blobs...)
	return err
}

// recordedProfile is what a node records of one cold start of an image that has no profile,
// over an unlimited link.
func (b *bed) recordedProfile(ctx context.Context, s startable, manifest digest.Digest) (p accel.Profile, err error) {
	h, err := b.startHost(ctx, accelNode)
	if err != nil {
		return p, err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	if err := dropCaches(); err != nil {
		return p, err
	}
	reference := b.reference(s.name, accelForm)
	if err := h.pull(ctx, reference); err != nil {
		return p, err
	}
	id, err := h.start(ctx, reference, s, false)
	if err != nil {
		return p, err
	}
	client := node.NewClient(filepath.Join(h.dir, "node.sock"))
	defer client.Close()
	if err := client.Answered(ctx, node.Answered{Container: id}); err != nil && !errors.Is(err, accel.ErrNotFound) { // it was quiet for long enough
		return p, err
	}
	if err := untilRecorded(ctx, client); err != nil {
		return p, fmt.Errorf("%w\nthe node's log ends with:\n%s", err, h.daemon.said())
	}
	if err := h.end(ctx, id, s.ends()); err != nil {
		return p, err
	}
	// A node without a server keeps what it records in its own folder.
	raw, err := os.ReadFile(filepath.Join(h.dir, "data", "lazy", "profiles", manifest.Algorithm().String()+"-"+manifest.Encoded()+".starts"))
	if err != nil {
		return p, err
	}
	summary, err := profile.DecodeSummary(raw)
	if err != nil {
		return p, err
	}
	if summary.Complete() != 1 {
		return p, fmt.Errorf("of %d recorded starts %d are complete, want one", summary.Reports(), summary.Complete())
	}
	return summary.Profile(profile.DefaultShare), nil
}

// untilRecorded waits until a node has made a profile of its only start.
func untilRecorded(ctx context.Context, client *node.Client) error {
	ctx, cancel := context.WithTimeout(ctx, recordingPatience)
	defer cancel()
	for {
		starts, err := client.Starts(ctx)
		if err != nil {
			return err
		}
		if len(starts) > 0 && starts[0].Problem != "" {
			return fmt.Errorf("the node has not recorded the start: %s", starts[0].Problem)
		}
		if len(starts) > 0 && starts[0].End != "" {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the node does not end its recording of the start: %w", ctx.Err())
		case <-time.After(recordingPoll):
		}
	}
}

// predictedProfile is what package profile tells of an image's start by the files of its
// converted form.
func predictedProfile(ctx context.Context, manifest digest.Digest, converted v1.Image) (accel.Profile, error) {
	p := accel.Profile{Manifest: manifest, Origin: accel.ProfilePredicted}
	layers, err := converted.Layers()
	if err != nil {
		return p, err
	}
	v := &filesView{kept: map[string][]byte{}}
	var tocs [][]byte
	for _, l := range layers {
		file, size, err := toFile(l, "")
		if err != nil {
			return p, err
		}
		defer file.Close() // read only
		blob := io.NewSectionReader(file, 0, size)
		toc, err := tocOf(blob)
		if err != nil {
			return p, err
		}
		r, err := estargz.Open(blob)
		if err != nil {
			return p, err
		}
		tocs, v.layers = append(tocs, toc), append(v.layers, r)
	}
	tree, err := profile.NewTree(ctx, tocs)
	if err != nil {
		return p, err
	}
	cfg, err := converted.ConfigFile()
	if err != nil {
		return p, err
	}
	c := cfg.Config
	listed, err := profile.Listed(ctx, tree, profile.ListOf(c.Labels[profile.LabelPrefetch]))
	if err != nil {
		return p, err
	}
	p.Items, err = profile.Predict(ctx, profile.View{Tree: tree, Read: v.read},
		profile.Start{Entrypoint: c.Entrypoint, Cmd: c.Cmd, Env: c.Env, WorkingDir: c.WorkingDir, Listed: listed.Items})
	return p, err
}

// tocOf is an eStargz blob's table of contents.
func tocOf(blob *io.SectionReader) ([]byte, error) {
	offset, footerBytes, err := estargz.OpenFooter(blob)
	if err != nil {
		return nil, err
	}
	z, err := gzip.NewReader(io.NewSectionReader(blob, offset, blob.Size()-offset-footerBytes))
	if err != nil {
		return nil, err
	}
	z.Multistream(false)
	t := tar.NewReader(z)
	if _, err := t.Next(); err != nil {
		return nil, err
	}
	return io.ReadAll(t)
}

// filesView reads files of converted layers. It is used by one goroutine.
type filesView struct {
	layers []*estargz.Reader
	kept   map[string][]byte
	order  []string
}

// read implements profile.View's Read.
func (v *filesView) read(_ context.Context, layer int, e *profile.Entry, offset, n int64) ([]byte, error) {
	key := fmt.Sprint(layer, ":", e.Path)
	content, ok := v.kept[key]
	if !ok {
		file, err := v.layers[layer].OpenFile(e.Path)
		if err != nil {
			return nil, err
		}
		if content, err = io.ReadAll(file); err != nil {
			return nil, err
		}
		if len(v.order) == filesAtHand {
			delete(v.kept, v.order[0])
			v.order = v.order[1:]
		}
		v.kept[key], v.order = content, append(v.order, key)
	}
	offset = min(max(offset, 0), int64(len(content)))
	return content[offset:min(offset+n, int64(len(content)))], nil
}
