package trust

import (
	"fmt"

	"accel"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

const (
	// maxLayers is far above the 127 that overlay-based runtimes can mount.
	maxLayers = 1024
	// maxWordBytes bounds platform and parameters.
	maxWordBytes = 256
)

// validate reports, as an accel.ErrInvalid, what a node could not act on: a
// malformed digest or repository, or sizes that cannot be.
func validate(m accel.Mapping) error {
	for _, f := range []struct{ name, repository string }{
		{"sourceRepository", m.SourceRepository},
		{"targetRepository", m.TargetRepository},
	} {
		if _, err := reference.WithName(f.repository); err != nil {
			return fmt.Errorf("%w: mapping: %s %q: %w", accel.ErrInvalid, f.name, f.repository, err)
		}
	}
	if err := validDigest("sourceManifest", m.SourceManifest); err != nil {
		return err
	}
	if err := validDigest("targetManifest", m.TargetManifest); err != nil {
		return err
	}
	if m.SourceIndex != "" {
		if err := validDigest("sourceIndex", m.SourceIndex); err != nil {
			return err
		}
	}
	if len(m.Platform) > maxWordBytes || len(m.Params) > maxWordBytes {
		return fmt.Errorf("%w: mapping of %s: platform or params is longer than %d bytes", accel.ErrInvalid, m.SourceManifest, maxWordBytes)
	}
	if len(m.Layers) > maxLayers {
		return fmt.Errorf("%w: mapping of %s: %d layers are more than %d", accel.ErrInvalid, m.SourceManifest, len(m.Layers), maxLayers)
	}
	for i, l := range m.Layers {
		if err := validateLayer(fmt.Sprintf("layers[%d]", i), l); err != nil {
			return err
		}
	}
	return nil
}

func validateLayer(where string, l accel.LayerMapping) error {
	if err := validDigest(where+".source", l.Source); err != nil {
		return err
	}
	if err := validDigest(where+".diffId", l.DiffID); err != nil {
		return err
	}
	if err := validDigest(where+".target", l.Target); err != nil {
		return err
	}
	if l.TargetBytes < 0 {
		return fmt.Errorf("%w: mapping: %s.targetBytes is %d", accel.ErrInvalid, where, l.TargetBytes)
	}
	if l.TOCDigest == "" {
		if l.TOCOffset != 0 {
			return fmt.Errorf("%w: mapping: %s.tocOffset is %d without a tocDigest", accel.ErrInvalid, where, l.TOCOffset)
		}
		return nil
	}
	if err := validDigest(where+".tocDigest", l.TOCDigest); err != nil {
		return err
	}
	if l.TOCOffset < 0 || l.TOCOffset >= l.TargetBytes {
		return fmt.Errorf("%w: mapping: %s.tocOffset %d is outside the layer's %d bytes", accel.ErrInvalid, where, l.TOCOffset, l.TargetBytes)
	}
	return nil
}

func validDigest(where string, d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("%w: mapping: %s %q: %w", accel.ErrInvalid, where, d, err)
	}
	return nil
}
