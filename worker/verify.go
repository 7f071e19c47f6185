package worker

import (
	"context"
	"fmt"
	"strings"

	"accel"
	"accel/convert"
	"accel/registry"

	"github.com/opencontainers/go-digest"
)

// sampleBytes is how much of each layer VerifySampled compares: enough to meet
// every kind of entry of a usual base layer, little against the conversion.
const sampleBytes = 8 << 20

// verify reads the pushed image back from the registry, every manifest and every
// layer byte by byte against its digest, and compares file trees as the mode
// asks.
func (k *Worker) verify(ctx context.Context, mappings []accel.Mapping, repository string, d digest.Digest) error {
	if err := k.Registry.Verify(ctx, repository, d, true); err != nil {
		return err
	}
	if k.Verify == VerifyDigest {
		return nil
	}
	o := convert.DiffOptions{MaxDifferences: 3}
	if k.Verify == VerifySampled {
		o.SampleBytes = sampleBytes
	}
	for _, m := range mappings {
		if err := k.compare(ctx, m, repository, o); err != nil {
			return fmt.Errorf("platform %s: %w", m.Platform, err)
		}
	}
	return nil
}

func (k *Worker) compare(ctx context.Context, m accel.Mapping, repository string, o convert.DiffOptions) error {
	var pair [2]*registry.Manifest
	for i, at := range []struct {
		repository string
		digest     digest.Digest
	}{{m.SourceRepository, m.SourceManifest}, {repository, m.TargetManifest}} {
		var err error
		if pair[i], err = k.Registry.Pull(ctx, at.repository, at.digest); err != nil {
			return err
		}
		if pair[i].Image == nil {
			return fmt.Errorf("%s@%s is no image", at.repository, at.digest)
		}
	}
	diffs, err := convert.Diff(ctx, pair[0].Image, pair[1].Image, o)
	if err != nil {
		return fmt.Errorf("compare with the source: %w", err)
	}
	if len(diffs) == 0 {
		return nil
	}
	var words []string
	for _, d := range diffs {
		words = append(words, d.String())
	}
	// A converter that is wrong once is wrong again.
	return accel.Permanent(fmt.Errorf("the converted image differs from its source: %s", strings.Join(words, "; ")))
}
