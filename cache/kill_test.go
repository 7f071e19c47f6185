package cache

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"accel"
	"accel/internal/killtest"

	"github.com/opencontainers/go-digest"
)

const (
	killBlobs  = 12
	killLayers = 4
)

// killContent is one of the blobs of the kill loop; of different sizes, so that some end and some do not.
func killContent(i int) []byte { return content(2000+i, (i%4)*3*mib+i*1000+1) }

func killLayer(i int) testLayer { return layerOf(3000+i, 64+i) }

// fillKilled fills layers as mounts do, and says which chunks it was told are marked.
func fillKilled(s *Store, seed uint64) {
	ctx := context.Background()
	if err := s.Pin("mount", killLayer(0).digest); err != nil { // this one stays
		panic(err)
	}
	for worker := range 3 {
		go func() {
			rng := rand.New(rand.NewPCG(seed, uint64(100+worker)))
			for {
				i := rng.IntN(killLayers)
				l := killLayer(i)
				kept, err := s.CreateLayer(ctx, l.digest, l.info(), l.write)
				var some []int
				for n := 0; err == nil && n < 5; n++ {
					some = some[:0]
					for range 1 + rng.IntN(8) {
						some = append(some, rng.IntN(l.chunks()))
					}
					if err = l.put(kept, some...); err == nil {
						_ = kept.Use() // gone: see below
						fmt.Println("marked", i, some)
					}
				}
				if rng.IntN(3) == 0 {
					_ = s.Remove(l.digest) // refused for the one that is pinned, or is being written
				}
				// What is not pinned may go under the hands of who fills it.
				if err != nil && !errors.Is(err, ErrNoSpace) && !errors.Is(err, accel.ErrNotFound) && !errors.Is(err, os.ErrNotExist) {
					panic(err)
				}
			}
		}()
	}
}

// checkLayers compares what is marked with what it has to be, and the pinned layer's marks with what was said.
func checkLayers(t *testing.T, s *Store, said []string) (marked int) {
	t.Helper()
	for i := range killLayers {
		l := killLayer(i)
		kept, err := s.Layer(l.digest)
		told := func(yield func(c string) bool) {
			for _, line := range said {
				if rest, ok := strings.CutPrefix(line, "marked 0 ["); ok && i == 0 {
					for c := range strings.FieldsSeq(strings.TrimSuffix(rest, "]")) {
						if !yield(c) {
							return
						}
					}
				}
			}
		}
		if errors.Is(err, accel.ErrNotFound) {
			for c := range told {
				t.Fatalf("the pinned layer is gone, of which chunk %s was marked", c)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		has := kept.Has()
		for c := range told {
			if n, err := strconv.Atoi(c); err != nil || !has(n) {
				t.Fatalf("chunk %s of the pinned layer was marked and is not, %v", c, err)
			}
		}
		marked += l.right(t, kept)
	}
	return marked
}

// beKilled pulls blobs, fills layers, whole and in ranges, evicts, pins and checks without end.
func beKilled(dir, seed string) {
	n, err := strconv.Atoi(seed)
	if err != nil {
		panic(err)
	}
	s, err := Open(Options{Dir: dir, BudgetBytes: 55 * mib, VerifyLayer: verifyLayer, Log: quiet()})
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	go func() { panic(s.Run(ctx)) }()
	blobs := make([][]byte, killBlobs)
	for i := range blobs {
		blobs[i] = killContent(i)
	}
	fmt.Println("at work")
	fillKilled(s, uint64(n))
	for client := range 6 {
		go func() {
			rng := rand.New(rand.NewPCG(uint64(n), uint64(client)))
			for {
				data := blobs[rng.IntN(killBlobs)]
				offset, length := int64(0), int64(-1)
				if rng.IntN(3) == 0 {
					offset = rng.Int64N(int64(len(data)))
					length = rng.Int64N(int64(len(data)) - offset)
				}
				r, err := s.OpenBlob(ctx, describe(data), offset, length, from(data))
				if err != nil {
					panic(err)
				}
				want := data[offset:]
				if length >= 0 {
					want = want[:length]
				}
				if _, err = r.WriteTo(&compared{want}); err != nil {
					panic(err)
				}
				r.Close()
			}
		}()
	}
	for i := 0; ; i++ { // what is answered is durable
		owner := fmt.Sprint("owner", i)
		if err := s.Pin(owner, digest.FromBytes(blobs[i%2])); err != nil {
			panic(err)
		}
		fmt.Println("pinned", owner)
		if err := s.PutTag("registry.example/app", fmt.Sprint("v", i%10), Tag{Digest: digest.FromBytes(blobs[0]), CheckedAt: time.Now()}); err != nil {
			panic(err)
		}
		if err := s.Unpin(owner); err != nil {
			panic(err)
		}
		fmt.Println("unpinned", owner)
	}
}

func TestKilled(t *testing.T) { killLoop(t, 20) }

func TestKilledLong(t *testing.T) {
	if os.Getenv("ACCEL_TEST_LONG") == "" {
		t.Skip("SKIPPED here: the long kill loop runs in `make test-long`")
	}
	killLoop(t, 200)
}

// killLoop kills a process that pulls at random instants. After each, every byte that the index
// marks as there must be the right one, and everything can be pulled.
func killLoop(t *testing.T, kills int) {
	dir := filepath.Join(t.TempDir(), "cache")
	blobs := map[digest.Digest][]byte{}
	for i := range killBlobs {
		data := killContent(i)
		blobs[digest.FromBytes(data)] = data
	}
	whole, parts, marked, evicted := 0, 0, 0, 0
	for run := range kills {
		cmd := role("killed", dir, fmt.Sprint(run))
		// A commit comes each second.
		said := killtest.Run(t, cmd, 1500*time.Millisecond)
		w, p, m, e := checkKilled(t, dir, blobs, said)
		whole, parts, marked, evicted = whole+w, parts+p, marked+m, evicted+e
	}
	t.Logf("%d kills; after them %d whole blobs, %d parts of others and %d chunks of layers were there, every byte right; %d were evicted when the kill came", kills, whole, parts, marked, evicted)
	if whole == 0 || parts == 0 || marked == 0 {
		t.Error("the kills left nothing to look at")
	}
}

// checkKilled compares everything that is marked with what it has to be.
func checkKilled(t *testing.T, dir string, blobs map[digest.Digest][]byte, said []string) (whole, parts, marked, evicted int) {
	t.Helper()
	s, err := Open(Options{Dir: dir, VerifyLayer: verifyLayer, Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	last := ""
	for _, line := range said {
		if !strings.HasPrefix(line, "marked ") {
			last = line
		}
	}
	marked = checkLayers(t, s, said)
	if _, err := os.Stat(s.index.asidePath()); err == nil {
		t.Fatal("the index was damaged by a kill")
	}
	if owner, ok := strings.CutPrefix(last, "pinned "); ok && len(s.Pins()[owner]) == 0 {
		// It may have been unpinned durably without having said so.
		t.Logf("the pin of %s, said last, is gone: unpinned meanwhile", owner)
	}
	if owner, ok := strings.CutPrefix(last, "unpinned "); ok && len(s.Pins()[owner]) != 0 {
		t.Fatalf("%s was unpinned and holds %v", owner, s.Pins()[owner])
	}
	for owner := range s.Pins() {
		if err := s.Unpin(owner); err != nil {
			t.Fatal(err)
		}
	}
	// What has all its parts is checked as a whole before its end is given, which needs Run.
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	for _, e := range s.List() {
		if e.Form == FormLayer {
			continue
		}
		data := blobs[e.Digest]
		if data == nil {
			t.Fatalf("nobody pulled %s", e.Digest)
		}
		if _, err := os.Lstat(s.path(e.Digest)); errors.Is(err, os.ErrNotExist) {
			evicted++ // just before the kill, and the index had not been told
			continue
		}
		if e.Complete {
			whole++
		}
		for offset := int64(0); offset < e.SizeBytes; offset += partBytes {
			length := min(partBytes, e.SizeBytes-offset)
			r, err := s.OpenBlob(t.Context(), accel.BlobDescriptor{Digest: e.Digest, SizeBytes: -1}, offset, length, nil)
			if errors.Is(err, accel.ErrNotFound) && !e.Complete {
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			c := &compared{data[offset : offset+length]}
			if _, err := r.WriteTo(c); err != nil || len(c.left) > 0 {
				t.Fatalf("part at %d of %s (complete: %v): %d bytes are missing, %v", offset, e.Digest, e.Complete, len(c.left), err)
			}
			r.Close()
			if !e.Complete {
				parts++
			}
		}
	}
	for _, data := range blobs {
		mustGet(t, s, data, 0, -1, from(data))
	}
	for i := range killLayers { // also one that nobody had written to the index
		l := killLayer(i)
		l.right(t, mustCreate(t, s, l))
	}
	cancel()
	wg.Wait()
	if rep, err := s.Check(t.Context(), nil); err != nil || rep.WrongChunks > 0 {
		t.Fatalf("%+v, %v", rep, err)
	}
	// Half of it goes, so that the next run has something to fetch.
	for i, e := range s.List() {
		if i%2 == 0 {
			if err := s.Remove(e.Digest); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return whole, parts, marked, evicted
}
