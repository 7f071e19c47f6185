package registry

import (
	"errors"
	"testing"

	"accel"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestMember(t *testing.T) {
	of := func(kind, platform, name string) ocispec.Descriptor {
		d := ocispec.Descriptor{MediaType: kind, Annotations: map[string]string{"name": name}}
		if platform != "" {
			p := platforms.MustParse(platform)
			d.Platform = &p
		}
		return d
	}
	const image, index = ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex
	fits := platforms.Only(platforms.MustParse("linux/arm/v7"))
	for name, c := range map[string]struct {
		members []ocispec.Descriptor
		want    string // empty: none
	}{
		"nothing":              {nil, ""},
		"others":               {[]ocispec.Descriptor{of(image, "linux/amd64", "a"), of(image, "unknown/unknown", "attestation")}, ""},
		"the best":             {[]ocispec.Descriptor{of(image, "linux/arm/v6", "six"), of(image, "linux/arm/v7", "seven"), of(image, "linux/arm/v5", "five")}, "seven"},
		"one that runs":        {[]ocispec.Descriptor{of(image, "linux/arm/v6", "six"), of(image, "linux/arm/v8", "eight")}, "six"},
		"an index inside":      {[]ocispec.Descriptor{of(image, "linux/amd64", "a"), of(index, "", "inner")}, "inner"},
		"rather an image":      {[]ocispec.Descriptor{of(index, "", "inner"), of(image, "linux/arm/v7", "seven")}, "seven"},
		"no platform, a guess": {[]ocispec.Descriptor{of(image, "", "what")}, ""},
		"another kind":         {[]ocispec.Descriptor{of("application/x", "linux/arm/v7", "what")}, ""},
	} {
		got, err := Member(c.members, fits)
		if got.Annotations["name"] != c.want || (c.want == "") != errors.Is(err, accel.ErrNotFound) {
			t.Errorf("%s: %q, %v; want %q", name, got.Annotations["name"], err, c.want)
		}
	}
}
