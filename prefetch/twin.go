package prefetch

import (
	"context"
	"encoding/binary"
	"slices"

	"accel"
)

// twins finds chunks by digest: four bytes of the digest and four of the number for each, sorted. Eight
// bytes a chunk, so that 20 layers of 30,000 files take 5 MB; the whole digest is in Content.
type twins []uint64

// maxTwins bounds how many chunks of one digest are looked at: the content of a layer could be one chunk 30,000 times.
const maxTwins = 8

func newTwins(c Content, n int) twins {
	t := make(twins, n)
	for i := range t {
		d := c.Chunk(i).Digest
		t[i] = uint64(binary.BigEndian.Uint32(d[:]))<<32 | uint64(i)
	}
	slices.Sort(t)
	return t
}

// find is a chunk of the layer that is there and has this content, or -1.
func (l *layer) find(want accel.Chunk) int {
	prefix := binary.BigEndian.Uint32(want.Digest[:])
	at, _ := slices.BinarySearch(l.twins, uint64(prefix)<<32)
	for _, v := range l.twins[at:min(at+maxTwins, len(l.twins))] {
		if uint32(v>>32) != prefix {
			break
		}
		i := int(uint32(v))
		if c := l.Content.Chunk(i); c.Digest == want.Digest && c.Bytes == want.Bytes && l.Content.Has(i) {
			return i
		}
	}
	return -1
}

// copyTwins puts those missing chunks of fl's members before `to` that any layer has. What goes wrong is
// fetched instead.
func (f *Filler) copyTwins(ctx context.Context, fl *flight, to int) {
	l := fl.l
	var buf []byte
	for m := fl.first; m < to && ctx.Err() == nil; m++ {
		for p, end := l.places(m); p < end; p++ {
			i := l.at(p)
			if l.Content.Has(i) {
				continue
			}
			c := l.Content.Chunk(i)
			from, twin := f.borrow(c)
			if from == nil {
				continue
			}
			if int64(cap(buf)) < c.Bytes {
				buf = make([]byte, c.Bytes)
			}
			buf = buf[:c.Bytes]
			err := from.Content.Read(twin, buf)
			f.giveBack(from)
			if err == nil {
				err = l.Content.Put(i, buf)
			}
			if err != nil {
				f.log.Warn("a chunk could not be copied and will be fetched", "layer", l.digest, "chunk", i, "from", from.digest, "err", err)
				continue
			}
			f.arrived(l, i, c.Bytes)
			f.metrics.copied(fl.kind, c.Bytes)
			f.mu.Lock()
			l.stats.CopiedBytes += c.Bytes
			f.mu.Unlock()
		}
	}
}

// borrow finds a layer that has the content of c, and keeps it from going.
func (f *Filler) borrow(c accel.Chunk) (*layer, int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range f.list {
		if i := l.find(c); i >= 0 {
			l.users++
			return l, i
		}
	}
	return nil, -1
}

func (f *Filler) giveBack(l *layer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l.leave()
}
