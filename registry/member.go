package registry

import (
	"fmt"
	"strings"

	"accel"

	"github.com/containerd/platforms"
	"github.com/google/go-containerregistry/pkg/v1/types"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// MaxIndexDepth bounds indexes within indexes.
const MaxIndexDepth = maxIndexDepth

// ThisMachine fits what this machine runs, the best first.
func ThisMachine() platforms.MatchComparer { return platforms.Only(platforms.DefaultSpec()) }

// Member is the member of an index that a machine takes: the best of those that say they fit, else an index within
// the index that does not say. What is no image (attestations, artifacts) is passed over. accel.ErrNotFound where nothing
// fits, with what there is.
func Member(members []ocispec.Descriptor, fits platforms.MatchComparer) (ocispec.Descriptor, error) {
	var best *ocispec.Descriptor
	var others []string
	for i, d := range members {
		kind := types.MediaType(d.MediaType)
		switch {
		case !kind.IsIndex() && !kind.IsImage():
			others = append(others, fmt.Sprintf("a %.100q", d.MediaType))
		case d.Platform == nil && !kind.IsIndex():
			others = append(others, "one without a platform")
		case d.Platform != nil && !fits.Match(*d.Platform):
			others = append(others, platforms.Format(*d.Platform))
		case best == nil || d.Platform != nil && (best.Platform == nil || fits.Less(*d.Platform, *best.Platform)):
			best = &members[i]
		}
	}
	if best == nil {
		return ocispec.Descriptor{}, fmt.Errorf("%w: no image for this machine, only %s", accel.ErrNotFound, strings.Join(others[:min(len(others), maxNamed)], ", "))
	}
	return *best, nil
}

// maxNamed members are in an error.
const maxNamed = 20
