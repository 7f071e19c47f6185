package convert

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"accel"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// TestCancelled ends conversions at every so many bytes of the source, and in
// LayerDone. TestMain looks for goroutines, newConverter for files.
func TestCancelled(t *testing.T) {
	src := tarOf(append(manyFiles(100, 8000), file("big", noise(2<<20, 3)))...)
	blob := gz(src)
	why := errors.New("enough")
	for at := 0; at < len(blob); at += len(blob)/20 + 1 {
		ctx, cancel := context.WithCancelCause(context.Background())
		l, other := layerOf(blob, src), gzLayer(file("o", text(100_000, uint64(at))))
		l.open = func(b []byte) io.ReadCloser {
			return &cutter{r: bytes.NewReader(b), left: at, cut: func() error { cancel(why); return nil }}
		}
		_, err := newConverter(t, 2).Convert(ctx, Source{Image: imageOf(t, l, other)}, Options{})
		if !errors.Is(err, why) {
			t.Errorf("cancelled at byte %d: %v", at, err)
		}
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	_, err := newConverter(t, 2).Convert(ctx, Source{Image: imageOf(t, layerOf(blob, src))}, Options{
		LayerDone: func(ctx context.Context, _ v1.Layer, _ accel.LayerMapping) error {
			cancel(why)
			<-ctx.Done()
			return context.Cause(ctx)
		},
	})
	if !errors.Is(err, why) {
		t.Error(err)
	}
	broken := errors.New("push failed")
	_, err = newConverter(t, 2).Convert(context.Background(), Source{Image: imageOf(t, layerOf(blob, src))}, Options{
		LayerDone: func(context.Context, v1.Layer, accel.LayerMapping) error { return broken },
	})
	if !errors.Is(err, broken) {
		t.Error(err)
	}
}

// cutter calls cut after so many bytes, and goes on.
type cutter struct {
	r    io.Reader
	left int
	cut  func() error
	done bool
}

func (c *cutter) Read(p []byte) (int, error) {
	if c.left <= 0 && !c.done {
		c.done = true
		if err := c.cut(); err != nil {
			return 0, err
		}
	}
	n, err := c.r.Read(p[:min(len(p), max(1, c.left))])
	c.left -= n
	return n, err
}

func (c *cutter) Close() error { return nil }

// TestHangingSource: a source that never answers ends with its context, and
// with the failure of another layer.
func TestHangingSource(t *testing.T) {
	src := tarOf(manyFiles(100, 8000)...)
	for name, test := range map[string]func(cancel context.CancelFunc) []v1.Layer{
		"cancelled": func(cancel context.CancelFunc) []v1.Layer {
			l := layerOf(gz(src), src)
			l.open = func(b []byte) io.ReadCloser {
				h := newHanging(b[:len(b)/2])
				h.reached = cancel
				return h
			}
			return []v1.Layer{l}
		},
		"another fails": func(context.CancelFunc) []v1.Layer {
			l, bad := layerOf(gz(src), src), gzLayer(link("to", "nowhere"))
			l.open = func(b []byte) io.ReadCloser { return newHanging(b[:len(b)/2]) }
			return []v1.Layer{l, bad}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				c := &Converter{TempDir: dir, Workers: 2}
				if _, err := c.Convert(ctx, Source{Image: imageOf(t, test(cancel)...)}, Options{}); err == nil {
					t.Error("no error")
				}
			})
		})
	}
}

// hanging gives some bytes, then nothing until it is closed.
type hanging struct {
	*bytes.Reader
	closed  chan struct{}
	once    atomic.Bool
	reached func()
}

func newHanging(b []byte) *hanging {
	return &hanging{Reader: bytes.NewReader(b), closed: make(chan struct{})}
}

func (h *hanging) Read(p []byte) (int, error) {
	if n, err := h.Reader.Read(p); n > 0 {
		return n, err
	}
	if h.reached != nil {
		h.reached()
	}
	<-h.closed
	return 0, errors.New("closed")
}

func (h *hanging) Close() error {
	if h.once.CompareAndSwap(false, true) {
		close(h.closed)
	}
	return nil
}
