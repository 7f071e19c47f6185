package cache

import (
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/opencontainers/go-digest"
)

// passing serves a Reader without the cache: there is no room, the disk fails, or the size
// of the blob is disputed. Each such Reader has a stream of its own.
type passing struct {
	st      io.ReadCloser // nil: to be opened
	peer    bool
	at      int64 // of the stream's next byte
	brought int64 // by this stream
	hash    hash.Hash
	tail    []byte // the blob's last bytes, checked
}

// startPass makes r go on without the cache from where it is.
func (r *Reader) startPass() error {
	if r.fetcher == nil {
		return r.missing()
	}
	p := &passing{at: r.pos}
	if r.whole {
		p.hash = newHash(r.desc.Digest)
		if r.pos > 0 {
			if err := hashFrom(r.ctx, p.hash, r.file, 0, r.pos); err != nil {
				return fmt.Errorf("%w: blob %s: %w", ErrDamaged, r.desc.Digest, err)
			}
		}
	}
	r.passing = p
	r.s.m.passed.Inc()
	r.s.o.Log.Debug("a client is served without caching", "blob", r.desc.Digest, "err", r.passErr)
	return nil
}

func (r *Reader) readPassing(b []byte) (int, error) {
	r.streaming.Lock()
	defer r.streaming.Unlock()
	if r.passing == nil {
		if err := r.startPass(); err != nil {
			return 0, err
		}
	}
	p := r.passing
	for {
		if p.at >= r.end && len(p.tail) == 0 {
			return 0, io.EOF
		}
		if err := r.ended(); err != nil {
			return 0, err
		}
		if len(p.tail) > 0 {
			n := copy(b, p.tail)
			p.tail = p.tail[n:]
			r.passed(n)
			return n, nil
		}
		n, err := r.fetchPassing(b)
		if n > 0 {
			r.passed(n)
			return n, nil
		}
		if err == nil {
			continue
		}
		r.endStream()
		if p.brought < partBytes {
			return 0, err
		}
		p.brought = 0
	}
}

func (r *Reader) ended() error {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	if r.closed || r.ctx.Err() != nil {
		return r.closedError()
	}
	return nil
}

// fetchPassing reads once from the stream, into b, or the last bytes into p.tail.
func (r *Reader) fetchPassing(b []byte) (int, error) {
	p := r.passing
	if err := r.openStream(); err != nil {
		return 0, err
	}
	left := r.end - p.at
	if r.whole {
		if left <= heldBytes {
			return 0, r.fetchTail(left)
		}
		left -= heldBytes
	}
	n, err := p.st.Read(b[:min(int64(len(b)), left)])
	r.s.m.filled(n, p.peer)
	p.at += int64(n)
	p.brought += int64(n)
	if p.hash != nil {
		p.hash.Write(b[:n])
	}
	return n, p.streamError(r, err)
}

func (r *Reader) fetchTail(left int64) error {
	p := r.passing
	tail := make([]byte, left)
	n, err := io.ReadFull(p.st, tail)
	r.s.m.filled(n, p.peer)
	if err != nil {
		return p.streamError(r, err)
	}
	p.hash.Write(tail)
	if got := digest.NewDigest(r.desc.Digest.Algorithm(), p.hash); got != r.desc.Digest {
		p.brought = 0
		return fmt.Errorf("%w: blob %s has digest %s", ErrDigest, r.desc.Digest, got)
	}
	p.tail, p.at = tail, r.end
	return nil
}

func (p *passing) streamError(r *Reader, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("blob %s, at byte %d of %d: %w", r.desc.Digest, p.at, r.desc.SizeBytes, err)
}

// openStream opens a stream at p.at where there is none.
func (r *Reader) openStream() error {
	p := r.passing
	if p.st != nil {
		return nil
	}
	st, err := r.fetcher.Fetch(r.ctx, p.at, r.end-p.at)
	if err != nil {
		return fmt.Errorf("blob %s, bytes from %d: %w", r.desc.Digest, p.at, err)
	}
	if st.From > p.at || st.From < 0 {
		st.Close()
		return fmt.Errorf("blob %s: asked for bytes from %d, got them from %d", r.desc.Digest, p.at, st.From)
	}
	if over := p.at - st.From; over > 0 {
		if _, err := io.CopyN(io.Discard, st, over); err != nil {
			st.Close()
			return p.streamError(r, err)
		}
	}
	p.st, p.peer, p.brought = st.ReadCloser, st.Peer, 0
	return nil
}

func (r *Reader) endStream() {
	if p := r.passing; p != nil && p.st != nil {
		p.st.Close()
		p.st = nil
	}
}

// passed counts n bytes that the client got past the cache.
func (r *Reader) passed(n int) {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	r.pos += int64(n)
	if r.passing.peer {
		r.tally.PeerBytes += int64(n)
	} else {
		r.tally.RegistryBytes += int64(n)
	}
}

func (r *Reader) writePassing(w io.Writer) (total int64, err error) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for {
		n, err := r.readPassing(*buf)
		if n > 0 {
			k, err := w.Write((*buf)[:n])
			total += int64(k)
			if err != nil {
				return total, err
			}
		}
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}
