package meter

import (
	"fmt"
	"slices"

	"accel"

	"google.golang.org/protobuf/encoding/protowire"
)

// outcomes and modes are kept by their place here: append only.
var (
	outcomes = []accel.Outcome{accel.OutcomeHit, accel.OutcomePartial, accel.OutcomeMiss, accel.OutcomeError}
	modes    = []accel.PullMode{accel.PullFull, accel.PullLazy, accel.PullMirror}
)

const (
	numOutcomes = 4
	numModes    = 3
)

// sums are what is added up of pulls. All of them are exact and do not depend on the order in
// which pulls come.
type sums struct {
	counts                [numOutcomes][numModes]int64
	registry, peer, cache total // bytes
	duration              total // nanoseconds of pulls that were no error

	// Billed nanoseconds of pulls without a memory size of their own, and bytes times
	// billed nanoseconds of those with one.
	billedPlain, billedArea total

	// Of savers (see Billing), again without and with a memory size: their number and summed
	// memory, layer bytes and memory times layer bytes, and what of the above they were billed.
	saversPlain                       int64
	saversMemory                      total
	saverBytesPlain, saverBytesArea   total
	saverBilledPlain, saverBilledArea total
	savers                            int64
}

// row is one roll-up: the pulls of one day, image, tenant and node.
type row struct {
	sums
	sketch []byte // of the durations in seconds of pulls that were no error
}

// fields are a row's sums with their field numbers, which are never used again for something else.
func (s *sums) fields() []struct {
	number protowire.Number
	total  *total
} {
	return []struct {
		number protowire.Number
		total  *total
	}{
		{2, &s.registry}, {3, &s.peer}, {4, &s.cache}, {5, &s.duration}, {7, &s.billedPlain}, {8, &s.billedArea},
		{10, &s.saversMemory}, {11, &s.saverBytesPlain}, {12, &s.saverBytesArea}, {13, &s.saverBilledPlain}, {14, &s.saverBilledArea},
	}
}

const (
	fieldCount   = 1 // repeated: place of outcome and mode, count
	fieldSketch  = 6
	fieldPlain   = 9
	fieldSavers  = 15
	placesOfMode = 16 // a place is outcome * 16 + mode
)

func (s *sums) add(p *accel.Pull, b Billing) {
	s.counts[slices.Index(outcomes, p.Outcome)][slices.Index(modes, p.Mode)]++
	s.registry.addNumber(p.RegistryBytes)
	s.peer.addNumber(p.PeerBytes)
	s.cache.addNumber(p.CacheBytes)
	if p.Outcome != accel.OutcomeError {
		s.duration.addNumber(int64(p.Duration))
	}
	billed := int64(b.billed(p))
	saver := isSaver(p)
	layers := p.RegistryBytes + p.PeerBytes + p.CacheBytes
	if saver {
		s.savers++
	}
	if p.MemoryBytes == 0 {
		s.billedPlain.addNumber(billed)
		if saver {
			s.saversPlain++
			s.saverBytesPlain.addNumber(layers)
			s.saverBilledPlain.addNumber(billed)
		}
		return
	}
	s.billedArea.addProduct(p.MemoryBytes, billed)
	if saver {
		s.saversMemory.addNumber(p.MemoryBytes)
		s.saverBytesArea.addProduct(p.MemoryBytes, layers)
		s.saverBilledArea.addProduct(p.MemoryBytes, billed)
	}
}

func (s *sums) merge(o *sums) {
	for i := range s.counts {
		for j := range s.counts[i] {
			s.counts[i][j] += o.counts[i][j]
		}
	}
	from := o.fields()
	for i, f := range s.fields() {
		f.total.add(*from[i].total)
	}
	s.saversPlain += o.saversPlain
	s.savers += o.savers
}

func (r *row) add(p *accel.Pull, b Billing) (err error) {
	r.sums.add(p, b)
	if p.Outcome != accel.OutcomeError {
		r.sketch, err = sketchOf(r.sketch, p.Duration.Seconds())
	}
	return err
}

func (r *row) encode() []byte {
	w := make(writer, 0, 128)
	for i := range r.counts {
		for j, n := range r.counts[i] {
			if n > 0 {
				w.bytes(fieldCount, protowire.AppendVarint([]byte{byte(i*placesOfMode + j)}, uint64(n)))
			}
		}
	}
	for _, f := range r.fields() {
		w.bytes(f.number, f.total.encode())
	}
	w.bytes(fieldSketch, r.sketch)
	w.number(fieldPlain, uint64(r.saversPlain))
	w.number(fieldSavers, uint64(r.savers))
	return w
}

// decodeRow reads a row; its sketch is b's and holds as long.
func decodeRow(b []byte) (r row, err error) {
	fields := r.fields()
	err = read(b, func(field protowire.Number, raw []byte, n uint64) error {
		switch field {
		case fieldCount:
			return r.decodeCount(raw)
		case fieldSketch:
			if len(raw) > 0 {
				r.sketch = raw
			}
		case fieldPlain:
			r.saversPlain = int64(n)
		case fieldSavers:
			r.savers = int64(n)
		default:
			for _, f := range fields {
				if f.number == field {
					*f.total, err = decodeTotal(raw)
					return err
				}
			}
		}
		return nil
	})
	return r, err
}

func (s *sums) decodeCount(raw []byte) error {
	if len(raw) < 2 || int(raw[0]/placesOfMode) >= numOutcomes || int(raw[0]%placesOfMode) >= numModes {
		return fmt.Errorf("%w: a count %x", ErrDamaged, raw)
	}
	n, used := protowire.ConsumeVarint(raw[1:])
	if used < 0 || int64(n) < 0 {
		return fmt.Errorf("%w: a count %x", ErrDamaged, raw)
	}
	s.counts[raw[0]/placesOfMode][raw[0]%placesOfMode] = int64(n)
	return nil
}
