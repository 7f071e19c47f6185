// Package convert is the step between a pushed image and a fast start: one
// image or index in, its eStargz form out. It knows no network and no database:
// package worker hands it the images that package registry pulled, and pushes
// what comes back.
//
// The way of one layer (each line runs in goroutines of its own):
//
//	inflate.go   source blob -> tar stream, read ahead
//	layer.go     tar stream -> entries and chunks, every byte kept as it is
//	pipeline.go  chunks -> gzip members on all cores -> one file, in order
//	toc.go       entries and chunks -> table of contents, footer
//
// tree.go says which of a tar's entries are there after containerd has applied
// them all, plan.go and assemble.go deal with manifests, and diff.go is the
// proof: it compares two images as file trees.
package convert

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"sync"

	"accel"
	"accel/internal/deflate"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/semaphore"
)

// formatVersion changes whenever equal sources and Params give other bytes than
// before; it is part of the fingerprint.
const formatVersion = 2

// The format that Params.Format names.
const formatEstargz = "estargz"

// Bounds of Params.ChunkBytes. Below the lower one a gzip member's own 18 bytes
// and its cold window begin to show; the upper one bounds memory, of which each
// layer in work takes a small multiple.
const (
	minChunkBytes = 16 << 10
	maxChunkBytes = 16 << 20
)

// layersAtOnce bounds the layers in work over all conversions of a Converter,
// and so its memory. One layer keeps about three cores busy (one inflates at
// some 450 MB/s, as the others parse, hash and write members), and four layers any
// machine that we have met.
const layersAtOnce = 4

// Params decide the output's bytes: equal source, Params and version give equal
// digests. Zero fields mean DefaultParams.
type Params struct {
	ChunkBytes int64  // uncompressed bytes per chunk of a file, 16 KiB to 16 MiB
	Level      int    // klauspost/compress gzip level 1..9, for what the source's matches cannot be used
	Format     string // "estargz"
}

// DefaultParams are chosen by BenchmarkParams, here on a Python layer of 850 MB in
// 28,500 files, a gzip of klauspost's level 6, on two cores:
//
//	level 6, chunks of   128 KiB  256 KiB  512 KiB  1 MiB  4 MiB
//	output, of stock's    104.4 %  103.8 %  103.5 %  103.4 %  103.3 %
//	CPU seconds             10.5     10.1      9.8   10.0    9.8
//
//	chunks of 256 KiB    level 3  level 5  level 6
//	output, of stock's    106.2 %  104.2 %  103.8 %
//	CPU seconds              9.2      9.9     10.1
//
// Stock is the stock library at its own defaults, level 9 and 4 MiB, which takes more
// than ten times as long. The level counts only for what is compressed anew: level 3 saves
// a tenth of the time for bytes that every start pays for. A miss inflates half a chunk on
// average before it finds its byte, and fetches all of it: 256 KiB cost 1.2 ms of inflating
// against 19 ms for stock's 4 MiB, for half a percent more output; below that the output
// grows faster than the misses shrink.
func DefaultParams() Params {
	return Params{ChunkBytes: 256 << 10, Level: 6, Format: formatEstargz}
}

func (p Params) withDefaults() Params {
	d := DefaultParams()
	if p.ChunkBytes == 0 {
		p.ChunkBytes = d.ChunkBytes
	}
	if p.Level == 0 {
		p.Level = d.Level
	}
	if p.Format == "" {
		p.Format = d.Format
	}
	return p
}

func (p Params) validate() error {
	switch {
	case p.ChunkBytes < minChunkBytes || p.ChunkBytes > maxChunkBytes:
		return fmt.Errorf("%w: chunk size of %d bytes is not between %d and %d", accel.ErrInvalid, p.ChunkBytes, minChunkBytes, maxChunkBytes)
	case p.Level < gzip.BestSpeed || p.Level > gzip.BestCompression:
		return fmt.Errorf("%w: compression level %d is not between %d and %d", accel.ErrInvalid, p.Level, gzip.BestSpeed, gzip.BestCompression)
	case p.Format != formatEstargz:
		return fmt.Errorf("%w: format %q (want %q)", accel.ErrInvalid, p.Format, formatEstargz)
	}
	return nil
}

// Fingerprint is the canonical text of p with the converter's version, such as
// "estargz/1;chunk=262144;level=6".
func (p Params) Fingerprint() string {
	p = p.withDefaults()
	return fmt.Sprintf("%s/%d;chunk=%d;level=%d", p.Format, formatVersion, p.ChunkBytes, p.Level)
}

// DefaultMaxUncompressedBytes is Policy.MaxUncompressedBytes where it is zero.
const DefaultMaxUncompressedBytes = 10_000_000_000

// Policy says what may be converted. A violation is an *accel.Rejection with
// the rule and the figure.
type Policy struct {
	// Platforms to convert, "linux/amd64"; one without a variant stands for all
	// variants. Empty: all.
	Platforms []string
	// MaxUncompressedBytes is counted for each platform while its layers are
	// inflated, holes of sparse files included. Zero: DefaultMaxUncompressedBytes.
	MaxUncompressedBytes int64
}

// Source is the input: exactly one of Image and Index. Their layers' Compressed
// must fail at the end of a blob that does not have its digest, as package
// registry's and go-containerregistry's remote layers do.
type Source struct {
	Repository string // for the annotation; "host/path"
	Image      v1.Image
	Index      v1.ImageIndex
}

// Converter holds what all conversions of a process share. It starts no
// goroutine by itself. Its fields must not change after the first Convert.
type Converter struct {
	Params  Params
	Policy  Policy
	TempDir string // spill of compressed output; must exist
	Workers int    // compressing goroutines over all running conversions; default GOMAXPROCS
	Log     *slog.Logger

	once sync.Once
	// slots has one place for each compressing goroutine. A compressor, a
	// megabyte of tables, is made when its place is first taken (nil till then).
	slots  chan *deflate.Writer
	layers *semaphore.Weighted
}

func (c *Converter) init() {
	c.once.Do(func() {
		c.Params = c.Params.withDefaults()
		if c.Policy.MaxUncompressedBytes == 0 {
			c.Policy.MaxUncompressedBytes = DefaultMaxUncompressedBytes
		}
		if c.Workers <= 0 {
			c.Workers = runtime.GOMAXPROCS(0)
		}
		if c.Log == nil {
			c.Log = slog.New(slog.DiscardHandler)
		}
		c.slots = make(chan *deflate.Writer, c.Workers)
		for range c.Workers {
			c.slots <- nil
		}
		c.layers = semaphore.NewWeighted(layersAtOnce)
	})
}

// Options of one conversion.
type Options struct {
	// LayerDone is called once for each distinct layer of the result that a push
	// would have to bring along, as soon as it is complete and concurrently with
	// the conversion of others (upload overlaps). Foreign layers are not told. An
	// error ends the conversion. May be nil.
	LayerDone func(ctx context.Context, l v1.Layer, m accel.LayerMapping) error
	// Progress is called often, from any goroutine; it must be quick. May be nil.
	Progress func(Progress)
	// Memo spares the conversion of layers that were converted before. May be nil.
	Memo Memo
	// Prioritized are paths in the image, at most 100,000, whose entries come first
	// in their layers, in this order and followed by the prefetch landmark: a stock
	// stargz-snapshotter fetches them before it lets a container start. Layers with
	// such entries are no longer shared with conversions of another list. Empty: the
	// source's order stays.
	Prioritized []string
}

// Progress of one layer.
type Progress struct {
	Platform              string        // the first of those that share the layer
	Layer                 digest.Digest // source
	Index                 int           // position in the image
	ReadBytes, TotalBytes int64         // compressed source bytes
	Done                  bool
}

// Result is the converted image or index, in the shape of the source. Close
// removes its temporary files; its layers cannot be read after that. Until then, those
// that were converted now are io.ReaderAts of their blobs.
type Result struct {
	Image    v1.Image
	Index    v1.ImageIndex
	Mappings []accel.Mapping // one per platform; repositories of the target are left empty for the caller
	Stats    accel.Result    // sizes, platforms, notes; times left zero
	// Unchanged: every layer was eStargz already; the source itself is the target and nothing needs pushing.
	Unchanged bool

	files *files
}

// Close gives the temporary files back. It may be called more than once.
func (r *Result) Close() error { return r.files.Close() }

// Convert makes the eStargz form of src. The caller closes the Result.
//
// Errors: an *accel.Rejection where a rule says no; one that accel.IsPermanent
// where the source is bad though its bytes are what its digest says; the error
// of LayerDone; those of reading the source and of the temporary directory.
func (c *Converter) Convert(ctx context.Context, src Source, o Options) (_ *Result, err error) {
	c.init()
	if err := c.Params.validate(); err != nil {
		return nil, accel.Permanent(err)
	}
	if (src.Image == nil) == (src.Index == nil) {
		return nil, accel.Permanent(fmt.Errorf("%w: want exactly one of image and index", accel.ErrInvalid))
	}
	first, err := newPriorities(o.Prioritized)
	if err != nil {
		return nil, accel.Permanent(err)
	}
	r := &run{Converter: c, source: src, options: o, priorities: first, files: &files{dir: c.TempDir}, jobs: map[v1.Hash]*job{}}
	defer func() {
		if err != nil {
			err = joinClose(err, r.files)
		}
	}()
	top, err := r.plan(ctx)
	if err != nil {
		return nil, err
	}
	if err := r.convertLayers(ctx); err != nil {
		return nil, err
	}
	return r.assemble(top)
}
