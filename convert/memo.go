package convert

import (
	"context"
	"fmt"
	"io"

	"accel"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
)

// Memo remembers what became of source layers. An error of a Memo is logged and
// costs one conversion; it never fails an image.
type Memo interface {
	// Lookup finds a layer by its source digest and Params.Fingerprint. It says
	// false where the target blob is not there any more: whoever implements it
	// looks, as nobody can bring the blob's content again but a new conversion.
	Lookup(ctx context.Context, source digest.Digest, params string) (LayerMemo, bool, error)
	// Remember is called after Options.LayerDone has returned for a layer that was
	// converted or kept. m.Repositories is empty: the implementer knows where the
	// layer went.
	Remember(ctx context.Context, source digest.Digest, params string, m LayerMemo) error
}

// LayerMemo is all that a manifest needs of a converted layer.
type LayerMemo struct {
	Target      digest.Digest `json:"target"` // equal to the source's for a layer that was eStargz already
	TargetBytes int64         `json:"targetBytes"`
	// SourceDiffID and DiffID are the uncompressed digests of source and target.
	SourceDiffID digest.Digest `json:"sourceDiffId"`
	DiffID       digest.Digest `json:"diffId"`
	TOCDigest    digest.Digest `json:"tocDigest"`
	TOCOffset    int64         `json:"tocOffset"`
	// UncompressedBytes is the target's, SourceUncompressedBytes what policy counts.
	UncompressedBytes       int64 `json:"uncompressedBytes"`
	SourceUncompressedBytes int64 `json:"sourceUncompressedBytes"`
	// Repositories ("host/path") are known to hold the target.
	Repositories []string `json:"repositories,omitempty"`
}

// remembered is a layer that was converted before: a descriptor without
// content, to be mounted from where it is. It has the method that package
// registry's Mountable asks for.
type remembered struct {
	digest, diffID v1.Hash
	sizeBytes      int64
	repositories   []string
}

func (l *remembered) Digest() (v1.Hash, error)            { return l.digest, nil }
func (l *remembered) DiffID() (v1.Hash, error)            { return l.diffID, nil }
func (l *remembered) Size() (int64, error)                { return l.sizeBytes, nil }
func (l *remembered) MediaType() (types.MediaType, error) { return types.OCILayer, nil }

// MountFrom names the repositories that hold the layer.
func (l *remembered) MountFrom() []string { return l.repositories }

// Compressed fails with an accel.ErrNotFound: the content is in the registry only.
func (l *remembered) Compressed() (io.ReadCloser, error) { return nil, l.absent() }

// Uncompressed fails as Compressed does.
func (l *remembered) Uncompressed() (io.ReadCloser, error) { return nil, l.absent() }

func (l *remembered) absent() error {
	return fmt.Errorf("%w: layer %s was converted earlier and is only in %v", accel.ErrNotFound, l.digest, l.repositories)
}
