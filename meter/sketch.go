package meter

import (
	"fmt"

	"github.com/DataDog/sketches-go/ddsketch"
	"github.com/DataDog/sketches-go/ddsketch/mapping"
	"github.com/DataDog/sketches-go/ddsketch/store"
)

// sketchAccuracy is the largest relative error of a percentile. A change makes old
// roll-ups unreadable, so it takes a new format of the file.
const sketchAccuracy = 0.01

// maxBins bounds the memory that a sum takes even where its file is damaged: what Validate lets through falls
// into below 3,500 bins.
const maxBins = 4096

// sketch is a DDSketch: percentiles of many values in few bytes, that add up.
type sketch struct{ s *ddsketch.DDSketch }

// newSketch makes one for sums of many.
func newSketch() (sketch, error) {
	return sketchIn(store.NewCollapsingLowestDenseStore(maxBins))
}

func sketchIn(s store.Store) (sketch, error) {
	m, err := mapping.NewLogarithmicMapping(sketchAccuracy)
	if err != nil {
		return sketch{}, fmt.Errorf("percentiles: %w", err)
	}
	return sketch{ddsketch.NewDDSketch(m, s, store.NewSparseStore())}, nil // no value is below 0
}

func (s sketch) add(value float64) error {
	if err := s.s.Add(value); err != nil {
		return fmt.Errorf("percentile of %g: %w", value, err)
	}
	return nil
}

// merge adds the values of an encoded sketch.
func (s sketch) merge(encoded []byte) (err error) {
	if len(encoded) == 0 {
		return nil
	}
	if err := s.s.DecodeAndMergeWith(encoded); err != nil {
		return fmt.Errorf("%w: percentiles of a row: %w", ErrDamaged, err)
	}
	return nil
}

func (s sketch) encode() []byte {
	if s.s.IsEmpty() {
		return nil
	}
	var b []byte
	s.s.Encode(&b, true)
	return b
}

// quantile is a value that at most the part q of all are below; false where there is none.
func (s sketch) quantile(q float64) (float64, bool) {
	v, err := s.s.GetValueAtQuantile(q)
	if err != nil {
		return 0, false
	}
	return v, true
}

// sketchOf is encoded with one more value.
func sketchOf(encoded []byte, value float64) ([]byte, error) {
	s, err := sketchIn(store.NewSparseStore())
	if err != nil {
		return nil, err
	}
	if err := s.merge(encoded); err != nil {
		return nil, err
	}
	if err := s.add(value); err != nil {
		return nil, err
	}
	return s.encode(), nil
}
