package convert

import (
	"context"
	"errors"
	"log/slog"

	"accel"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
)

// Params decide the output's bytes: equal source, Params and version give equal digests.
type Params struct {
	ChunkBytes int64  // uncompressed bytes per chunk of a file; default by measurement
	Level      int    // klauspost/compress gzip level 1..9
	Format     string // "estargz"
}

func DefaultParams() Params { return Params{} }

// Fingerprint is the canonical text of p with the converter's version, such as "estargz/1;chunk=1048576;level=6".
func (p Params) Fingerprint() string { return "" }

// Policy says what may be converted. A violation is an *accel.Rejection with the rule and the figure.
type Policy struct {
	Platforms            []string // "linux/amd64"; empty: all
	MaxUncompressedBytes int64    // per platform; default 10 GB
}

// Source is the input: exactly one of Image and Index.
type Source struct {
	Repository string // for the annotation; "host/path"
	Image      v1.Image
	Index      v1.ImageIndex
}

// Converter holds what all conversions of a process share. It starts no goroutine by itself.
type Converter struct {
	Params  Params
	Policy  Policy
	TempDir string // spill of compressed output; must exist
	Workers int    // compressing goroutines over all running conversions; default GOMAXPROCS
	Log     *slog.Logger
}

// Options of one conversion.
type Options struct {
	// LayerDone is called as each converted layer is complete, concurrently with the conversion of others (upload
	// overlaps). An error ends the conversion. May be nil.
	LayerDone func(ctx context.Context, l v1.Layer, m accel.LayerMapping) error
	// Progress is called often, from any goroutine; it must be quick. May be nil.
	Progress func(Progress)
}

// Progress of one layer.
type Progress struct {
	Platform              string
	Layer                 digest.Digest // source
	Index                 int           // position in the image
	ReadBytes, TotalBytes int64         // compressed source bytes
	Done                  bool
}

// Result is the converted image or index, in the shape of the source. Close removes its temporary files.
type Result struct {
	Image    v1.Image
	Index    v1.ImageIndex
	Mappings []accel.Mapping // one per platform; repositories of the target are left empty for the caller
	Stats    accel.Result    // sizes, platforms, notes; times left zero
	// Unchanged: every layer was eStargz already; the source itself is the target and nothing needs pushing.
	Unchanged bool
}

func (r *Result) Close() error { return nil }

// Convert makes the eStargz form of src.
func (c *Converter) Convert(ctx context.Context, src Source, o Options) (*Result, error) {
	return nil, errors.New("not written yet")
}
