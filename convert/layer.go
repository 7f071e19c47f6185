package convert

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"accel"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// spilled is a layer in a temporary file: converted, or kept as it was.
type spilled struct {
	f              *os.File
	sizeBytes      int64
	digest, diffID digest.Digest
}

func (l *spilled) Digest() (v1.Hash, error)            { return v1.NewHash(l.digest.String()) }
func (l *spilled) DiffID() (v1.Hash, error)            { return v1.NewHash(l.diffID.String()) }
func (l *spilled) Size() (int64, error)                { return l.sizeBytes, nil }
func (l *spilled) MediaType() (types.MediaType, error) { return types.OCILayer, nil }

// Compressed may be read many times and side by side, until Result.Close.
func (l *spilled) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(io.NewSectionReader(l.f, 0, l.sizeBytes)), nil
}

// ReadAt reads the blob at any place, until Result.Close.
func (l *spilled) ReadAt(p []byte, offset int64) (int, error) {
	return io.NewSectionReader(l.f, 0, l.sizeBytes).ReadAt(p, offset)
}

func (l *spilled) Uncompressed() (io.ReadCloser, error) {
	return gzip.NewReader(bufio.NewReaderSize(io.NewSectionReader(l.f, 0, l.sizeBytes), sourceBufferBytes))
}

// convertLayer makes the eStargz form of j's layer, or finds that it is that
// already. The source is read once, in order, to its end.
func (r *run) convertLayer(ctx context.Context, j *job) (*LayerMemo, v1.Layer, error) {
	rc, err := j.layer.Compressed()
	if err != nil {
		return nil, nil, err
	}
	// A Read that hangs ends with ctx. Close may come twice, and while Read runs:
	// network bodies and files, which is what sources are, can stand both.
	stop := context.AfterFunc(ctx, func() { rc.Close() })
	defer func() { stop(); rc.Close() }()

	src := newSource(rc, j.progress)
	memo, layer, err := r.convertStream(ctx, j, src, rc)
	var bad formatError
	if errors.As(err, &bad) && src.err == nil {
		// Is it the source that is bad, or what the network made of it? Only the
		// digest knows, and so only the end of the blob.
		if rerr := src.drain(); rerr != nil {
			err = rerr
		} else {
			err = accel.Permanent(err)
		}
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return memo, layer, err
}

func (r *run) convertStream(ctx context.Context, j *job, src *source, rc io.Closer) (*LayerMemo, v1.Layer, error) {
	head, err := src.Peek(sourceBufferBytes)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	candidate := j.annotations[estargz.TOCJSONDigestAnnotation] != "" || looksLikeEstargz(head)
	if !candidate && len(r.priorities.paths) == 0 {
		return r.build(ctx, j, src, rc, nil)
	}
	f, err := r.files.create()
	if err != nil {
		return nil, nil, err
	}
	sizeBytes, err := io.Copy(f, src)
	if err != nil {
		return nil, nil, fmt.Errorf("spill a layer: %w", err)
	}
	if candidate {
		memo, err := r.keep(ctx, j, f, sizeBytes)
		if err != nil {
			return nil, nil, err
		}
		if memo != nil {
			return memo, &spilled{f: f, sizeBytes: sizeBytes, digest: memo.Target, diffID: memo.DiffID}, nil
		}
	}
	var order *ordering
	if len(r.priorities.paths) > 0 {
		if order, err = r.prioritize(ctx, f, sizeBytes); err != nil {
			return nil, nil, err
		}
	}
	return r.build(ctx, j, newSource(io.NewSectionReader(f, 0, sizeBytes), nil), nil, order)
}

// build runs the pipeline. rc is what src reads from, nil where that never
// hangs; without an order the layer's own stays.
func (r *run) build(ctx context.Context, j *job, src *source, rc io.Closer, order *ordering) (*LayerMemo, v1.Layer, error) {
	f, err := r.files.create()
	if err != nil {
		return nil, nil, err
	}
	group, gctx := errgroup.WithContext(ctx)
	// An error elsewhere ends a Read of the source that hangs. After one of the
	// format the source is still wanted, for its digest.
	stop := context.AfterFunc(gctx, func() {
		var bad formatError
		if err := context.Cause(gctx); rc != nil && !errors.As(err, &bad) && !errors.Is(err, context.Canceled) {
			rc.Close()
		}
	})
	defer stop()

	b := newBlob(f)
	out := newLayout(gctx, group, r.Converter, b)
	stream := newAhead(gctx)
	scan := newScan(stream, out, r.Params.ChunkBytes, j.count)
	if order != nil {
		if scan.rec.r, err = order.reader(stream); err != nil {
			return nil, nil, err
		}
		scan.stream = nil
		scan.landmark = estargz.PrefetchLandmark
	}
	var chunks []chunk
	var sourceDiffID sum
	group.Go(guarded("inflating", func() error { return stream.fill(src, j.count) }))
	group.Go(guarded("parsing", func() (err error) { sourceDiffID, err = scan.Run(); return err }))
	group.Go(func() (err error) { chunks, err = out.Run(); return err })
	if err := group.Wait(); err != nil {
		return nil, nil, err
	}
	if order != nil {
		sourceDiffID = order.diffID
	}
	if got := digestOf(sourceDiffID); got != j.diffID {
		return nil, nil, malformed("its uncompressed digest is %s, the image config says %s", got, j.diffID)
	}

	t := &toc{names: scan.tree.list(), chunks: chunks, chunkBytes: r.Params.ChunkBytes}
	w, err := t.write(b, r.Params.Level, out.diffID)
	if err != nil {
		return nil, nil, err
	}
	memo := &LayerMemo{
		Target:                  digestOf(sum(b.digest.Sum(nil))),
		TargetBytes:             b.n,
		SourceDiffID:            j.diffID,
		DiffID:                  digestOf(sum(out.diffID.Sum(nil))),
		TOCDigest:               w.digest,
		TOCOffset:               w.offset,
		UncompressedBytes:       out.n + w.tarSize,
		SourceUncompressedBytes: j.counted.Load(),
	}
	return memo, &spilled{f: f, sizeBytes: b.n, digest: memo.Target, diffID: memo.DiffID}, nil
}

// guarded turns a panic of a decoder, which is fed bytes from anywhere, into an
// error of those bytes.
func guarded(doing string, f func() error) func() error {
	return func() (err error) {
		defer func() {
			if p := recover(); p != nil {
				err = malformed("%s it makes the converter panic: %v", doing, p)
			}
		}()
		return f()
	}
}
