package cache

import (
	"crypto/sha256"
	"crypto/sha512"
	"hash"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
)

// blob is one blob of which something is here, or on its way. Everything in it is
// guarded by Store.mu.
type blob struct {
	item
	size     int64
	parts    bitmap // those in the file; nil when complete
	missing  int64  // parts
	complete bool   // all is there and the digest was checked
	live     *live  // nil while nobody does anything with it
}

// newBlob is a blob with no part there.
func newBlob(d digest.Digest, size int64, seq uint64) *blob {
	parts := partsOf(size)
	b := &blob{item: item{digest: d, seq: seq}, size: size, parts: newBitmap(parts), missing: parts}
	b.blob = b
	return b
}

// live is what is known of a blob while it is read, filled, or not yet in the index.
type live struct {
	readers   int
	idleSince time.Time // when the last reader left
	fills     []*fill
	changed   chan struct{} // closed at the next change, made by who waits for it

	opening sync.Mutex // held while file is made
	file    *os.File   // for the fills
	isNew   bool       // the file's name is not synced yet
	dirty   bool       // not as in the index
	syncing bool       // a commit uses file
	// unranged: a stream began before what was asked for.
	unranged bool

	// hash has hashed bytes from the blob's start; they are as in the file. One fill
	// at a time is at that place.
	hash      hash.Hash
	hashed    int64
	verifying bool
	// torn is, for parts whose fill failed, up to where they were shown: whatever is written there
	// again must be the same.
	torn map[int64]int64
}

// busy: somebody reads or fills it, or it is being checked or written to disk.
func (b *blob) busy() bool {
	l := b.live
	return l != nil && (l.readers > 0 || len(l.fills) > 0 || l.verifying || l.syncing)
}

func (b *blob) has(part int64) bool { return b.complete || b.parts.has(part) }

func (b *blob) partEnd(part int64) int64 { return min((part+1)*partBytes, b.size) }

func (b *blob) presentBytes() int64 {
	if b.complete {
		return b.size
	}
	n := b.parts.count() * partBytes
	if last := partsOf(b.size) - 1; b.parts.has(last) {
		n -= (last+1)*partBytes - b.size
	}
	return n
}

// available is how many bytes from pos on can be read from the file, at most to limit.
func (b *blob) available(pos, limit int64) int64 {
	if b.complete {
		return max(limit-pos, 0)
	}
	at := pos
	for at < limit && b.parts.has(at/partBytes) {
		at = (at/partBytes + 1) * partBytes
	}
	if at < limit && b.live != nil {
		for _, f := range b.live.fills {
			if start := f.next * partBytes; f.writing && start <= at && at < f.shown {
				at = f.shown
				break
			}
		}
	}
	return max(min(at, limit)-pos, 0)
}

// owner is the fill that is going to bring a part.
func (b *blob) owner(part int64) *fill {
	for _, f := range b.live.fills {
		if part >= f.next && part < f.end {
			return f
		}
	}
	return nil
}

// firstMissing returns the first part from part on that is not there; the number of parts where none is.
func (b *blob) firstMissing(part int64) int64 {
	n := partsOf(b.size)
	for part < n && b.has(part) {
		part++
	}
	return part
}

// alive makes b.live where it is not.
func (b *blob) alive() *live {
	if b.live == nil {
		b.live = &live{}
	}
	return b.live
}

// wake tells all who wait for a change of b.
func (b *blob) wake() {
	if l := b.live; l != nil && l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

// change returns the channel that the next wake closes.
func (b *blob) change() <-chan struct{} {
	l := b.alive()
	if l.changed == nil {
		l.changed = make(chan struct{})
	}
	return l.changed
}

func (b *blob) row() blobRow {
	return blobRow{size: b.size, allocated: b.allocated, seq: b.seq, usedAt: b.usedAt, visited: b.visited, complete: b.complete, parts: b.parts}
}

func newHash(d digest.Digest) hash.Hash {
	if d.Algorithm() == digest.SHA512 {
		return sha512.New()
	}
	return sha256.New()
}

// path is where a blob's file is; d is one that keyOf let through.
func (s *Store) path(d digest.Digest) string {
	return filepath.Join(s.o.Dir, blobsDir, d.Algorithm().String(), d.Encoded()[:2], d.Encoded())
}

// allocatedOf is what a file takes on disk.
func allocatedOf(f *os.File) (int64, error) {
	var st syscall.Stat_t
	if err := syscall.Fstat(int(f.Fd()), &st); err != nil {
		return 0, err
	}
	return st.Blocks * 512, nil
}
