package prefetch

import "time"

const (
	// splitBytes: a window that is larger is fetched over several connections, at most splitParts, since one
	// may be bound by its latency.
	splitBytes = 2 << 20
	splitParts = 4
	// maxWindowBytes are fetched ahead of a program that reads on and on. Linux' read-ahead doubles in the same way.
	maxWindowBytes = 16 << 20
	// spareConnections are not used for reading ahead.
	spareConnections = 2
	// leastOvertakeBytes: what is nearer than this in a flight is waited for, whatever was measured.
	leastOvertakeBytes = 256 << 10
	// overtakeFactor is how much later than by a request of its own a miss has to expect its bytes.
	overtakeFactor = 1.5
	// maxSequences of reading are told apart in one layer.
	maxSequences = 8
)

// sequence is a program that reads members one after the other.
type sequence struct {
	last   int // member that it asked for
	end    int // to here it is fetched
	mark   int // when it asks for this, more is fetched
	window int64
	used   uint64 // Filler.touches then; 0: never
}

// sequence finds the program that reads these members, by where it was, and doubles its window where
// it has come far enough into what was fetched for it. Filler.mu is held.
func (l *layer) sequence(touches uint64, members []int) *sequence {
	m, last := members[0], members[len(members)-1]
	oldest := &l.reads[0]
	for i := range l.reads {
		s := &l.reads[i]
		if s.used > 0 && s.last <= m && m <= s.end {
			if s.used, s.last = touches, last; m >= s.mark {
				s.window = min(2*s.window, maxWindowBytes)
				l.cursor = max(s.end, m) // the background helps it
			}
			return s
		}
		if s.used < oldest.used {
			oldest = s
		}
	}
	*oldest = sequence{last: last, end: last + 1, mark: last + 1, window: l.link.window(), used: touches}
	return oldest
}

// reach notes that s was fetched for from one member to another.
func (s *sequence) reach(from, end int) {
	s.end = max(s.end, end)
	s.mark = max(from+(end-from)/2, s.last+1)
}

// ensureWhole starts the one flight of a layer whose registry knows no ranges. f.mu is held.
func (f *Filler) ensureWhole(l *layer) {
	for _, fl := range l.flights {
		if fl.whole {
			fl.hasten()
			return
		}
	}
	f.start(l, demand, 0, 0, l.members)
}

// cover starts flights for what is free from member `from` on, for as many of the blob's bytes as the window
// has, and at least to must. It returns where it ended. f.mu is held.
func (f *Filler) cover(l *layer, from, must int, window int64) (end int) {
	if from >= l.members {
		return l.members
	}
	base, _ := l.span(from)
	m := from
	for m < l.members {
		offset, _ := l.span(m)
		if m >= must && offset-base >= window {
			break
		}
		if !l.free(m) {
			m++
			continue
		}
		length := window - (offset - base)
		if must > m {
			_, reached := l.span(must - 1)
			length = max(length, reached-offset)
		}
		stop := l.run(m, l.members, length, l.link.bridge(), nil)
		f.split(l, m, must, stop)
		m = stop
	}
	return m
}

// split starts one flight or several over [from, end). f.mu is held.
func (f *Filler) split(l *layer, from, must, end int) {
	offset, _ := l.span(from)
	_, reached := l.span(end - 1)
	parts := min(max((reached-offset)/splitBytes, 1), splitParts)
	each := (reached - offset) / parts
	for ; from < end; parts-- {
		stop := from + 1
		for ; stop < end; stop++ {
			if _, after := l.span(stop); parts > 1 && after-offset > each {
				break
			}
		}
		f.start(l, demand, from, min(max(must, from), stop), stop)
		// What the next part begins with may be there.
		for from = stop; from < end && !l.free(from); from++ {
		}
		if from < end {
			offset, _ = l.span(from)
		}
	}
}

// join waits for what fl brings, or overtakes it where a request of its own brings m earlier. f.mu is held.
func (f *Filler) join(l *layer, fl *flight, m int) {
	fl.hasten()
	if fl.kind == background && f.limit != nil && !fl.whole {
		// The limit holds for what comes long after m.
		stop, window := m+1, l.link.window()
		offset, _ := l.span(m)
		for ; stop < fl.end; stop++ {
			if _, end := l.span(stop); end-offset > window {
				break
			}
		}
		f.truncate(fl, stop)
	}
	if fl.whole || m < fl.must || m < fl.next || l.link.flying[demand] >= f.o.DemandConnections {
		return
	}
	offset, end := l.span(m)
	distance := end - fl.position
	if distance < leastOvertakeBytes || !l.link.overtakes(fl.wait(distance), end-offset) {
		return
	}
	f.metrics.overtakes.Inc()
	f.truncate(fl, m)
	if l.owner(m) == nil {
		f.cover(l, m, m+1, l.link.window())
	}
}

// wait is how long it takes until so many more bytes have come. Filler.mu is held.
func (fl *flight) wait(bytes int64) time.Duration {
	latency, rate := fl.l.link.estimate()
	if fl.begun.IsZero() {
		if !fl.requested.IsZero() {
			latency = max(0, latency-time.Since(fl.requested))
		}
		return latency + seconds(float64(bytes)/rate)
	}
	if since := time.Since(fl.begun); !fl.paced && fl.received >= leastSampleBytes && since > 0 {
		rate = float64(fl.received) / since.Seconds()
	}
	return seconds(float64(bytes) / rate)
}

// overtakes reports whether a request of its own brings so many bytes much earlier than after that wait. Filler.mu is held.
func (k *link) overtakes(wait time.Duration, bytes int64) bool {
	latency, rate := k.estimate()
	return float64(wait) > overtakeFactor*float64(latency+seconds(float64(bytes)/rate))
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
