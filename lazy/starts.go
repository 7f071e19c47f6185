package lazy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"accel"
	"accel/lazyfs"
	"accel/profile"
	"accel/snapshot"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
)

const (
	// holdTime is how long a complete layer is served by the holder still, because its first start, which is
	// to be recorded, has not come: of what plain mounts read nobody tells.
	holdTime = 10 * time.Minute
	// scanTime is how often the holder's notes are looked at. They have times of their own; this is how soon an
	// end by quiet is known.
	scanTime = 500 * time.Millisecond
	// maxStarts are recorded at a time, and as many that are over are remembered.
	maxStarts = 64
	// enoughTime is how long an image is not recorded of which there are recordings enough.
	enoughTime = time.Hour
	// clockGrain is how much earlier than it was a read may seem.
	clockGrain = 2 * time.Millisecond
)

// Start is one start that was recorded, or is being.
type Start struct {
	// Container is containerd's name of its snapshot, which ends with the container's ID.
	Container string        `json:"container"`
	Image     string        `json:"image"`
	Manifest  digest.Digest `json:"manifest"`
	Began     time.Time     `json:"began"`
	// End is empty while it is being recorded; Took is its time from its snapshot to the answer, where somebody told of that.
	End      profile.End   `json:"end,omitempty"`
	Took     time.Duration `json:"tookNs,omitempty"`
	Complete bool          `json:"complete" doc:"everything that was read was seen"`
	// What was read: in files and in bytes, whole chunks at the reads' ends counted as the kernel asked for them.
	Files int   `json:"files"`
	Bytes int64 `json:"bytes"`
	// Misses are the reads that had to wait meanwhile, MissBytes what they waited for. Of the blobs, DemandedBytes were fetched
	// because of them: what nobody had begun to fetch ahead, with what lies near.
	Misses        int64         `json:"misses"`
	MissBytes     int64         `json:"missBytes"`
	DemandedBytes int64         `json:"demandedBytes"`
	Waited        time.Duration `json:"waitedNs"`
	Ahead         *Ahead        `json:"ahead,omitempty" doc:"what was fetched ahead of it"`
	Problem       string        `json:"problem,omitempty" doc:"why nothing came of the recording"`
}

// Is reports whether it is the start of a container, by its ID.
func (s Start) Is(container string) bool {
	return s.Container == container || strings.HasSuffix(s.Container, "/"+container)
}

// starts decides which starts are recorded. A layer belongs to one recording at a time, since the
// holder cannot tell who reads.
type starts struct {
	mu     sync.Mutex
	images *lru.Cache[digest.Digest, *image]    // that were asked for, by manifest
	enough *lru.Cache[digest.Digest, time.Time] // images of which no more recordings are wanted until then
	// fresh layers were mounted anew in this daemon's time, so that their reads are seen, and no container was started on
	// them since.
	fresh map[digest.Digest]bool
	// held layers stay with the holder when they are complete, until then at the latest.
	held  map[digest.Digest]time.Time
	under map[digest.Digest]*recording // by layer
	count int                          // of recordings under way
	past  []Start                      // the newest last
	plain map[digest.Digest]time.Time  // images, by manifest, ahead of whose starts nothing is fetched until then
	// wanted are by the name that they are to be asked for by; see RecordNext.
	wanted  map[string]*wanted
	skipped []unrecorded // starts that are not recorded, the newest last
}

func newStarts() (*starts, error) {
	s := &starts{fresh: map[digest.Digest]bool{}, held: map[digest.Digest]time.Time{}, under: map[digest.Digest]*recording{}, plain: map[digest.Digest]time.Time{}, wanted: map[string]*wanted{}}
	var err error
	if s.images, err = lru.New[digest.Digest, *image](maxAnswers); err != nil {
		return nil, err
	}
	s.enough, err = lru.New[digest.Digest, time.Time](maxAnswers)
	return s, err
}

// asked notes that containerd asks for a layer of an image.
func (s *starts) asked(img *image) { s.images.Add(img.manifest, img) }

// wants reports whether a recording of the image would be of use. s.mu is held.
func (s *starts) wants(manifest digest.Digest) bool {
	if s.isWanted(manifest) {
		return true
	}
	until, known := s.enough.Get(manifest)
	return !known || time.Now().After(until)
}

// mounting says, before a layer is mounted, that its first start is to be recorded: the layer is mounted through the
// holder then, and stays there when it is complete. Only starts of images of which something was missing are, and those
// that somebody wants.
func (s *starts) mounting(d digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, img := range s.images.Values() {
		if (img.cold || s.isWanted(img.manifest)) && s.wants(img.manifest) && slices.ContainsFunc(img.layers, func(y layer) bool { return y.Digest == d }) {
			s.held[d] = time.Now().Add(holdTime)
			return true
		}
	}
	return false
}

// recorded reports whether a recording has the layer just now.
func (s *starts) recorded(d digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.under[d] != nil
}

// mounted says how that went: lazily, so that reads are seen from now on, or not.
func (s *starts) mounted(d digest.Digest, lazily bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.under[d] != nil {
		return // another mount of it is being read
	}
	if s.fresh[d] = lazily; !lazily {
		delete(s.fresh, d)
		delete(s.held, d)
	}
}

// holds reports whether a complete layer is to stay with the holder for now.
func (s *starts) holds(d digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Now().Before(s.held[d]) || s.under[d] != nil
}

// overdue takes the layers back that nothing was started on in time.
func (s *starts) overdue() (released []digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for d, until := range s.held {
		if time.Now().After(until) {
			delete(s.held, d)
			released = append(released, d)
		}
	}
	return released
}

// closed forgets a layer that is mounted no more.
func (s *starts) closed(d digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.fresh, d)
	delete(s.held, d)
}

// imageOf is the image with exactly these layers, the topmost first, that was asked for last. s.mu is held.
func (s *starts) imageOf(layers []digest.Digest) *image {
	all := s.images.Values() // the newest last
	for i := len(all) - 1; i >= 0; i-- {
		n := len(all[i].layers)
		if n != len(layers) {
			continue
		}
		same := true
		for k, y := range all[i].layers {
			same = same && y.Digest == layers[n-1-k]
		}
		if same {
			return all[i]
		}
	}
	return nil
}

// ambiguous reports whether another image that was asked for has the same layers. s.mu is held.
func (s *starts) ambiguous(img *image) bool {
	sameLayers := func(a, b layer) bool { return a.Digest == b.Digest }
	return slices.ContainsFunc(s.images.Values(), func(other *image) bool {
		return other.manifest != img.manifest && slices.EqualFunc(other.layers, img.layers, sameLayers)
	})
}

// begin says whether the start of a container is recorded.
func (s *starts) begin(e snapshot.Event, node string) *recording {
	s.mu.Lock()
	defer s.mu.Unlock()
	img := s.imageOf(e.Layers)
	if img == nil {
		s.skip(e, "the image was mounted before this node's daemon started, or in part only")
		return nil
	}
	defer s.unwant(img.manifest)
	// One more container of an image whose start is under way reads what the first does. Where images differ in their config
	// alone, nobody says whose it is.
	if r := s.under[img.layers[len(img.layers)-1].Digest]; r != nil && r.img.manifest == img.manifest {
		if s.ambiguous(img) {
			for d := range r.layers {
				r.cutOff(d)
			}
		}
		s.skip(e, "another start of the image, by container "+r.start.Container+", is being recorded")
		return nil
	}
	r := &recording{img: img, began: e.Began, layers: map[digest.Digest]bool{}, cut: map[digest.Digest]time.Time{}}
	cold, fresh := true, false
	for _, y := range img.layers {
		d := y.Digest
		if other := s.under[d]; other != nil && other != r {
			// From now on nobody knows for whom it is read.
			other.cutOff(d)
			cold = false
			continue
		}
		fresh = fresh || s.fresh[d]
		cold = cold && s.fresh[d]
		r.layers[d] = true
	}
	reason := ""
	switch {
	case !s.wants(img.manifest):
		reason = "there are recordings of the image enough for now"
	case !fresh:
		reason = "its layers were mounted before, so that what was read of them is in the kernel's cache, or all of it was in the node's cache"
	case s.count == maxStarts:
		reason = fmt.Sprintf("%d others are being recorded", maxStarts)
	}
	if reason != "" {
		s.skip(e, reason)
		s.started(img)
		return nil
	}
	s.started(img)
	s.count++
	for d := range r.layers {
		s.under[d] = r
	}
	r.start = Start{Container: e.Key, Image: img.name, Manifest: img.manifest, Began: e.Began.UTC().Round(0)}
	o := profile.RecorderOptions{Manifest: img.manifest, Node: node, Cold: cold}
	if w := img.wave.Load(); w != nil {
		o.Profile = w.Version
	}
	r.recorder = profile.NewRecorder(o)
	return r
}

// started notes that what an image reads from now on is no first start's any more. s.mu is held.
func (s *starts) started(img *image) {
	for _, y := range img.layers {
		delete(s.fresh, y.Digest)
		delete(s.held, y.Digest)
	}
}

// end gives a recording's layers back.
func (s *starts) end(r *recording) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for d, of := range s.under {
		if of == r {
			delete(s.under, d)
		}
	}
	s.count--
	if s.past = append(s.past, r.start); len(s.past) > maxStarts {
		s.past = slices.Delete(s.past, 0, 1)
	}
}

// more notes whether more recordings of an image are wanted.
func (s *starts) more(manifest digest.Digest, wanted bool) {
	if wanted {
		s.enough.Remove(manifest)
	} else {
		s.enough.Add(manifest, time.Now().Add(enoughTime))
	}
}

// Observe takes what package snapshot tells: a layer has its snapshot or is downloaded, or a container is about to start.
func (l *Lazy) Observe(e snapshot.Event) {
	switch e.Kind {
	case snapshot.KindMounted, snapshot.KindShared:
		l.pulls.told(e)
		l.placed(e)
		return
	case snapshot.KindDeclined:
		l.pulls.told(e)
		return
	case snapshot.KindPrepared:
	default:
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.running == nil || l.running.Err() != nil {
		return
	}
	ctx := l.running
	r := l.starts.begin(e, l.o.Node)
	l.work.Go(func() {
		if r != nil {
			l.record(ctx, r)
		}
		for _, d := range e.Layers {
			l.unhold(ctx, d)
		}
	})
}

// unhold turns a layer's mounts to the plain file, where it is complete and nothing holds it any more.
func (l *Lazy) unhold(ctx context.Context, d digest.Digest) {
	l.mu.Lock()
	y := l.open[d]
	l.mu.Unlock()
	if y == nil || !y.Complete() {
		return
	}
	unlock, err := l.turns.Lock(ctx, d.String())
	if err != nil {
		return // the node ends
	}
	defer unlock()
	if l.starts.holds(d) {
		return
	}
	// Incomplete: not all is synced yet, and completed comes again.
	if err := l.host.Complete(ctx, d); err != nil && !errors.Is(err, lazyfs.ErrIncomplete) && ctx.Err() == nil {
		l.o.Log.Warn("a complete layer is served through the holder still", "layer", d, "error", err)
	}
}

// Starts are those that were recorded since the node started, the newest first, and those that are being.
func (l *Lazy) Starts() []Start {
	s := l.starts
	s.mu.Lock()
	defer s.mu.Unlock()
	all := append([]Start{}, s.past...)
	seen := map[*recording]bool{}
	for _, r := range s.under {
		if !seen[r] {
			seen[r] = true
			all = append(all, r.start)
		}
	}
	slices.SortStableFunc(all, func(a, b Start) int { return b.Began.Compare(a.Began) })
	return all
}

// Answered tells that the program in a container answers, which ends the recording of its start; or that it
// failed, and then what it read is of no use to anybody. accel.ErrNotFound, with the reason, where its start is not being
// recorded.
func (l *Lazy) Answered(container string, failed bool) error {
	s := l.starts
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.under {
		if r.start.Is(container) {
			r.failed = r.failed || failed
			r.recorder.Answered()
			return nil
		}
	}
	return fmt.Errorf("%w: no start of container %s is being recorded: %s", accel.ErrNotFound, container, s.whyNot(container))
}
