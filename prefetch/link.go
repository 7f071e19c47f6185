package prefetch

import (
	"math"
	"time"

	"golang.org/x/sync/semaphore"
)

// kind is why a flight is under way; a lower one goes first.
type kind int

const (
	demand kind = iota
	hot
	background
	kinds
)

func (k kind) String() string { return [kinds]string{"demand", "hot", "background"}[k] }

const (
	// hotConnections to one host at a time; as the background's, they make up for single connections that
	// are bound by their latency. Where less than twice of what comes in a round trip is on its way, as when ranges are short
	// and far, there may be mostHotConnections.
	hotConnections, mostHotConnections = 4, 16
	// demandBufferBytes bound what is read for misses and the hot set and not inflated yet, with all
	// that inflating takes, for each host; backgroundBufferBytes the same for the background. A batch of
	// 256 KiB chunks is about 1 MiB.
	demandBufferBytes     = 64 << 20
	backgroundBufferBytes = 32 << 20
	// maxIdleLinks are remembered of hosts that have no layers just now.
	maxIdleLinks = 64

	// What is assumed of a host of which nothing is known.
	guessedLatency = 50 * time.Millisecond
	guessedRate    = 10e6 // bytes a second over one connection

	// ewma is the weight of a new measurement.
	ewma = 0.25
	// slotTime is how long bytes are counted to know the rate of the whole link, and capacityDecay what
	// remains of the best rate with each: links get slower too.
	slotTime      = 100 * time.Millisecond
	capacityDecay = 0.98
	// leastSampleBytes tell a rate.
	leastSampleBytes = 128 << 10
	// othersShare: flights of lower kind take one part of so many of the link while a higher one delivers.
	othersShare = 4
	// activeTime after a miss the background holds back too, with one connection: the next miss is likely, and would wait
	// behind what is on its way by then; and the program wants the processors that inflating takes.
	activeTime        = 500 * time.Millisecond
	activeConnections = 1
	// startTime after a layer was added, or its hot set was asked for, counts as active too: a program is about to start, and
	// where nothing of what it reads is missing, it is the processors that it wants.
	startTime = 10 * time.Second
	// foretoldTime after the last of what was foretold is here, the background waits for the program to be there: it reads
	// nothing that is missing. A miss of anything else ends that.
	foretoldTime = 5 * time.Second
)

// link is one host: its connections and what was measured. Filler.mu guards all but the channels and semaphores.
type link struct {
	layers  int
	slots   chan struct{} // of misses
	buffers [kinds]*semaphore.Weighted
	hot     hotSet

	flying     [kinds]int
	hotBytes   int64         // that the flights of the hot set were started for
	delivering [kinds]int    // of flying: the first byte is here; but for those that are only read on because somebody joined
	calm       chan struct{} // closed when a kind delivers no more

	missed   time.Time // the last miss
	starting time.Time // until then a program may be starting
	// foretold: what a start reads was asked for ahead, some of which came at arrived last, and nothing else was missed since.
	foretold bool
	arrived  time.Time

	latency  time.Duration // from request to first byte; 0: not known
	rate     float64       // bytes a second over one connection; 0: not known
	capacity float64       // bytes a second over all connections
	slot     time.Time     // since then are counted
	counted  int64
	// stalls since the last first byte: each doubles the patience, since what was measured may not hold any more.
	stalls int
}

func newLink(o Options) *link {
	demanded := semaphore.NewWeighted(demandBufferBytes)
	return &link{
		slots:   make(chan struct{}, o.DemandConnections),
		buffers: [kinds]*semaphore.Weighted{demand: demanded, hot: demanded, background: semaphore.NewWeighted(backgroundBufferBytes)},
		calm:    make(chan struct{}),
	}
}

// idle reports whether nothing uses the link.
func (k *link) idle() bool { return k.layers == 0 && k.flying == [kinds]int{} }

// answered notes a first byte.
func (k *link) answered(after time.Duration) {
	k.stalls = 0
	if k.latency == 0 {
		k.latency = after
		return
	}
	k.latency += time.Duration(ewma * float64(after-k.latency))
}

// sample notes what one connection brought at its own speed.
func (k *link) sample(bytes int64, in time.Duration) {
	if bytes < leastSampleBytes || in <= 0 {
		return
	}
	r := float64(bytes) / in.Seconds()
	if k.rate == 0 {
		k.rate = r
		return
	}
	k.rate += ewma * (r - k.rate)
}

// count notes bytes that came over any connection.
func (k *link) count(n int64, now time.Time) {
	since := now.Sub(k.slot)
	if since < slotTime {
		k.counted += n
		return
	}
	if since < 2*slotTime {
		k.capacity = max(float64(k.counted+n)/since.Seconds(), k.capacity*capacityDecay)
	}
	k.slot, k.counted = now, 0
}

// estimate is the latency and one connection's rate.
func (k *link) estimate() (latency time.Duration, bytesPerSecond float64) {
	latency, bytesPerSecond = k.latency, k.rate
	if latency == 0 {
		latency = guessedLatency
	}
	if bytesPerSecond == 0 {
		bytesPerSecond = guessedRate
	}
	return latency, bytesPerSecond
}

// latencyBytes could have come in the time that a request takes to be answered.
func (k *link) latencyBytes() int64 {
	latency, r := k.estimate()
	return int64(latency.Seconds() * max(r, k.capacity/float64(othersShare)))
}

const (
	leastWindowBytes = 128 << 10
	firstWindowBytes = 2 << 20
	leastBridgeBytes = 16 << 10
	mostBridgeBytes  = 1 << 20
	// mostHotBridgeBytes is what one processor inflates and hashes in about a millisecond.
	mostHotBridgeBytes = 64 << 10
)

// window is how much a miss of which nothing else is known asks for: what doubles its time at most.
func (k *link) window() int64 { return min(max(k.latencyBytes(), leastWindowBytes), firstWindowBytes) }

// bridge is how many bytes are rather read over than asked around.
func (k *link) bridge() int64 { return min(max(k.latencyBytes()/2, leastBridgeBytes), mostBridgeBytes) }

// hotBridge is the same for what is fetched ahead, by many connections at a time: a request more costs little, and what is
// read over has to be inflated on the processors that the start wants.
func (k *link) hotBridge() int64 {
	return min(max(k.latencyBytes()*othersShare/mostHotConnections/2, leastBridgeBytes), mostHotBridgeBytes)
}

// patience is how long a request may bring nothing.
func (k *link) patience(most time.Duration) time.Duration {
	if k.latency == 0 || k.rate == 0 {
		return most
	}
	measured := 30*k.latency + time.Duration(float64(1<<20)/k.rate*float64(time.Second))
	return min(max(measured, time.Second)<<min(k.stalls, 8), most)
}

// active reports whether programs are missing things just now, or what they will want is on its way.
func (k *link) active(now time.Time) bool {
	return now.Sub(k.missed) < activeTime || k.flying[hot] > 0 || now.Before(k.starting)
}

// serves reports whether a program is starting that has, or is about to have, all that it reads.
func (k *link) serves(now time.Time) bool {
	return k.foretold && (k.flying[hot] > 0 || now.Sub(k.arrived) < foretoldTime)
}

// spares is how many connections the background may have. It leaves the hot set alone as long as some of that is to be asked
// for: it would take a part along, in the middle of what can wait.
func (k *link) spares(now time.Time) int {
	switch {
	case k.hot.waits(now), k.serves(now):
		return 0
	case k.active(now):
		return activeConnections
	}
	return math.MaxInt
}

// takesHot reports whether one more flight of the hot set may start.
func (k *link) takesHot() bool {
	n := k.flying[hot]
	return n < hotConnections || n < mostHotConnections && k.hotBytes < 2*k.latencyBytes()
}

// deliver counts a flight among those that deliver, or no more.
func (k *link) deliver(of kind, n int) {
	k.delivering[of] += n
	if n < 0 {
		close(k.calm)
		k.calm = make(chan struct{})
	}
}

// outranked reports whether a flight of that kind should hold back, and what is closed when that may be over.
func (k *link) outranked(of kind, now time.Time) (yes bool, calm <-chan struct{}) {
	if of == background && k.active(now) {
		return true, nil
	}
	for higher := demand; higher < of; higher++ {
		if k.delivering[higher] > 0 {
			return true, k.calm
		}
	}
	return false, nil
}
