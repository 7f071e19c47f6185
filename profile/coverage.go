package profile

import "accel"

// Cover says how well one profile foretold another.
type Cover struct {
	// RecordedBytes were read, CoveredBytes of them foretold, VainBytes foretold and not
	// read.
	RecordedBytes, CoveredBytes, VainBytes int64
}

// Share of the recorded bytes that were foretold; 1 where nothing was read.
func (c Cover) Share() float64 {
	if c.RecordedBytes == 0 {
		return 1
	}
	return float64(c.CoveredBytes) / float64(c.RecordedBytes)
}

// Coverage compares what was read with what had been foretold, byte by byte of each
// layer's files.
func Coverage(recorded, predicted accel.Profile) (c Cover) {
	read, foretold := map[place]*spans{}, map[place]*spans{}
	for _, i := range recorded.Items {
		for _, s := range covered(read, i) {
			c.RecordedBytes += s.to - s.from
		}
	}
	for _, i := range predicted.Items {
		for _, s := range covered(foretold, i) {
			hit := int64(0)
			if set := read[placeOf(i)]; set != nil {
				hit = set.shared(s)
			}
			c.CoveredBytes += hit
			c.VainBytes += s.to - s.from - hit
		}
	}
	return c
}

// Minus is what a names and b does not, in a's order.
func Minus(a, b accel.Profile) (rest []Item) {
	seen := map[place]*spans{}
	for _, i := range b.Items {
		covered(seen, i)
	}
	for _, i := range a.Items {
		for _, s := range covered(seen, i) {
			i.Offset, i.Bytes = s.from, s.to-s.from
			rest = append(rest, i)
		}
	}
	return rest
}
