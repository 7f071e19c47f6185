package convert

import (
	"context"
	"fmt"
	"sync/atomic"

	"accel"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
)

// job is the conversion of one distinct layer, whoever shares it.
type job struct {
	source      digest.Digest
	sizeBytes   int64 // compressed
	diffID      digest.Digest
	layer       v1.Layer
	annotations map[string]string // of its first descriptor
	platform    string            // of the first image
	index       int               // in the first image
	images      []*imagePlan      // one for each place that it has
	limit       int64             // Policy.MaxUncompressedBytes
	tell        func(Progress)    // may be nil

	counted atomic.Int64 // uncompressed bytes

	// The result.
	memo *LayerMemo
	out  v1.Layer
	hit  bool // memo was remembered
}

// kept says that the source layer stays as it is.
func (j *job) kept() bool { return j.memo.Target == j.source }

// count adds uncompressed bytes to each platform that has the layer.
func (j *job) count(n int64) error {
	j.counted.Add(n)
	for _, p := range j.images {
		if total := p.uncompressed.Add(n); total > j.limit {
			return &accel.Rejection{
				Rule:   "policy.max_uncompressed_size",
				Detail: fmt.Sprintf("%s has more than %d bytes of uncompressed layers", p.name, j.limit),
			}
		}
	}
	return nil
}

func (j *job) progress(readBytes int64) {
	if j.tell != nil {
		j.tell(Progress{Platform: j.platform, Layer: j.source, Index: j.index, ReadBytes: readBytes, TotalBytes: j.sizeBytes})
	}
}

func (j *job) mapping() accel.LayerMapping {
	return accel.LayerMapping{
		Source: j.source, DiffID: j.diffID,
		Target: j.memo.Target, TargetBytes: j.memo.TargetBytes,
		TOCDigest: j.memo.TOCDigest, TOCOffset: j.memo.TOCOffset,
	}
}

// convertJob finds the layer's result in the memo, or makes it.
func (r *run) convertJob(ctx context.Context, j *job) (err error) {
	if j.memo = r.recall(ctx, j); j.memo != nil {
		j.hit = true
		if j.out, err = r.rememberedLayer(j); err != nil {
			return err
		}
		return j.count(j.memo.SourceUncompressedBytes)
	}
	j.memo, j.out, err = r.convertLayer(ctx, j)
	return err
}

// recall asks the memo. What it says about a DiffID that is not the config's is
// no use: one of the two is wrong, and conversion will tell which.
func (r *run) recall(ctx context.Context, j *job) *LayerMemo {
	if r.options.Memo == nil {
		return nil
	}
	m, ok, err := r.options.Memo.Lookup(ctx, j.source, r.fingerprint())
	if err != nil {
		r.Log.Warn("the layer memo does not answer; the layer is converted again", "layer", j.source, "error", err)
		return nil
	}
	if !ok || m.SourceDiffID != j.diffID {
		return nil
	}
	return &m
}

func (r *run) rememberedLayer(j *job) (v1.Layer, error) {
	if j.kept() {
		return j.layer, nil
	}
	target, err := v1.NewHash(j.memo.Target.String())
	if err != nil {
		return nil, fmt.Errorf("the layer memo's target: %w", err)
	}
	diffID, err := v1.NewHash(j.memo.DiffID.String())
	if err != nil {
		return nil, fmt.Errorf("the layer memo's diff ID: %w", err)
	}
	return &remembered{digest: target, diffID: diffID, sizeBytes: j.memo.TargetBytes, repositories: j.memo.Repositories}, nil
}

// layerDone tells whoever waits for the layer.
func (r *run) layerDone(ctx context.Context, j *job) error {
	if j.tell != nil {
		j.tell(Progress{Platform: j.platform, Layer: j.source, Index: j.index, ReadBytes: j.sizeBytes, TotalBytes: j.sizeBytes, Done: true})
	}
	if r.options.LayerDone != nil {
		if err := r.options.LayerDone(ctx, j.out, j.mapping()); err != nil {
			return err
		}
	}
	if r.options.Memo == nil || j.hit {
		return nil
	}
	if err := r.options.Memo.Remember(ctx, j.source, r.fingerprint(), *j.memo); err != nil {
		r.Log.Warn("cannot remember a converted layer; it will be converted again", "layer", j.source, "error", err)
	}
	return nil
}
