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

	// Of savers of folded days, again without and with a memory size: what they would have been billed, by
	// baselines of their time; their number and what these are made of is zero then. noBaseline
	// counts those of which it was not known.
	wouldPlain, wouldArea total
	noBaseline            int64
}

// row is one roll-up: the pulls of one day, image, tenant and node; or a folded sum.
type row struct {
	sums
	sketch []byte // of the durations in seconds of pulls that were no error
}

// totalFields are the field numbers of a row's totals, which are never used again for something else.
var totalFields = [...]protowire.Number{2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 14, 16, 17}

// total is the one with a field number; nil: there is none.
func (s *sums) total(field protowire.Number) *total {
	switch field {
	case 2:
		return &s.registry
	case 3:
		return &s.peer
	case 4:
		return &s.cache
	case 5:
		return &s.duration
	case 7:
		return &s.billedPlain
	case 8:
		return &s.billedArea
	case 10:
		return &s.saversMemory
	case 11:
		return &s.saverBytesPlain
	case 12:
		return &s.saverBytesArea
	case 13:
		return &s.saverBilledPlain
	case 14:
		return &s.saverBilledArea
	case 16:
		return &s.wouldPlain
	case 17:
		return &s.wouldArea
	}
	return nil
}

const (
	fieldCount   = 1 // repeated: place of outcome and mode, count
	fieldSketch  = 6
	fieldPlain   = 9
	fieldSavers  = 15
	fieldNoBase  = 18
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
	for _, f := range totalFields {
		s.total(f).add(*o.total(f))
	}
	s.saversPlain += o.saversPlain
	s.savers += o.savers
	s.noBaseline += o.noBaseline
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
	for _, f := range totalFields {
		w.bytes(f, r.total(f).encode())
	}
	w.bytes(fieldSketch, r.sketch)
	w.number(fieldPlain, uint64(r.saversPlain))
	w.number(fieldSavers, uint64(r.savers))
	w.number(fieldNoBase, uint64(r.noBaseline))
	return w
}

// decodeRow reads a row; its sketch is b's and holds as long.
func decodeRow(b []byte) (r row, err error) {
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
		case fieldNoBase:
			r.noBaseline = int64(n)
		default:
			if t := r.total(field); t != nil {
				*t, err = decodeTotal(raw)
				return err
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
