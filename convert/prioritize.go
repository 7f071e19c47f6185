package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"accel"

	"github.com/containerd/stargz-snapshotter/estargz"
)

// maxPrioritized bounds Options.Prioritized. A large start reads 5,000 files.
const maxPrioritized = 100_000

// priorities are Options.Prioritized as the layers' passes need them.
type priorities struct {
	paths []string // clean, each once
	key   string   // for Fingerprint; "" without paths
}

func newPriorities(list []string) (priorities, error) {
	if len(list) > maxPrioritized {
		return priorities{}, fmt.Errorf("%w: %d prioritized files are more than %d", accel.ErrInvalid, len(list), maxPrioritized)
	}
	var p priorities
	seen := map[string]bool{"": true}
	h := sha256.New()
	for _, name := range list {
		if len(name) > maxPathBytes {
			return priorities{}, fmt.Errorf("%w: the name %.40q... of a prioritized file is longer than %d bytes", accel.ErrInvalid, name, maxPathBytes)
		}
		if c := clean(name); !seen[c] {
			seen[c] = true
			p.paths = append(p.paths, c)
			fmt.Fprintf(h, "%s\x00", c)
		}
	}
	if len(p.paths) > 0 {
		p.key = ";prioritized=" + hex.EncodeToString(h.Sum(nil)[:8])
	}
	return p, nil
}

// fingerprint is the key of the run's layers in the memo: what decides their
// bytes.
func (r *run) fingerprint() string { return r.Params.Fingerprint() + r.priorities.key }

// span is a run of bytes.
type span struct{ from, to int64 }

// ordering is how a layer's tar is read so that its prioritized entries come
// first, then the landmark, then everything else as it was.
type ordering struct {
	spill  *os.File // the prioritized entries' bytes
	first  []span   // of spill, in their new order
	skip   []span   // of the source's tar stream, ascending: what is in first, or reserved
	diffID sum      // of the source
}

// reader gives the tar stream in its new order; source is it in the old one.
func (o *ordering) reader(source io.Reader) (io.Reader, error) {
	var mark bytes.Buffer
	tw := tar.NewWriter(&mark)
	if err := tw.WriteHeader(&tar.Header{Name: estargz.PrefetchLandmark, Typeflag: tar.TypeReg, Size: 1}); err != nil {
		return nil, err
	}
	if _, err := tw.Write([]byte{0xf}); err != nil {
		return nil, err
	}
	if err := tw.Flush(); err != nil {
		return nil, err
	}
	var readers []io.Reader
	for _, s := range o.first {
		readers = append(readers, io.NewSectionReader(o.spill, s.from, s.to-s.from))
	}
	return io.MultiReader(append(readers, &mark, &skipper{r: source, skip: o.skip})...), nil
}

// skipper leaves spans of a stream out.
type skipper struct {
	r    io.Reader
	at   int64
	skip []span
}

func (s *skipper) Read(p []byte) (int, error) {
	for len(s.skip) > 0 && s.at >= s.skip[0].from {
		n, err := io.CopyN(io.Discard, s.r, s.skip[0].to-s.at)
		s.at += n
		s.skip = s.skip[1:]
		if err != nil {
			return 0, err
		}
	}
	if len(s.skip) > 0 {
		p = p[:min(int64(len(p)), s.skip[0].from-s.at)]
	}
	n, err := s.r.Read(p)
	s.at += int64(n)
	return n, err
}

// prioritize reads the layer in blob once, to find which of its entries come
// first. It is nil where none does, and where the layer cannot be read: the pass
// that follows says why.
func (r *run) prioritize(ctx context.Context, blob *os.File, sizeBytes int64) (*ordering, error) {
	wanted := slices.Clone(r.priorities.paths)
	for {
		s := &survey{run: r, ctx: ctx, wanted: map[string]bool{}, count: map[string]int{}, removed: map[string]bool{}, links: map[string][]string{}, found: map[string]*moving{}}
		for _, p := range wanted {
			for ; p != "." && p != "" && !s.wanted[p]; p = path.Dir(p) {
				s.wanted[p] = true
			}
		}
		o, err := s.read(newSource(io.NewSectionReader(blob, 0, sizeBytes), nil))
		var bad formatError
		if errors.As(err, &bad) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		more := s.otherNames(wanted)
		if len(more) == 0 {
			return s.order(o, wanted), nil
		}
		// A hard link's file, and its other names, go with it; only now are they known.
		wanted = append(wanted, more...)
	}
}

// survey is one pass over a layer's tar.
type survey struct {
	run     *run
	ctx     context.Context
	wanted  map[string]bool // with all their parents
	count   map[string]int  // entries of each name
	removed map[string]bool // names that a whiteout removes
	links   map[string][]string
	found   map[string]*moving
}

// moving is a wanted entry.
type moving struct {
	name   string
	kind   byte
	source span
	spill  span
	link   string // of a hard link
}

// read copies the wanted entries' bytes into a file.
func (s *survey) read(src *source) (*ordering, error) {
	stream, err := src.tarStream()
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	spill, err := s.run.files.create()
	if err != nil {
		return nil, err
	}
	diffID := sha256.New()
	rec := &recorder{r: io.TeeReader(stream, diffID)}
	o := &ordering{spill: spill}
	tr := tar.NewReader(rec)
	var at int64 // in spill
	for from := int64(0); ; from = rec.n + int64(padding(rec.n)) {
		if s.ctx.Err() != nil {
			return nil, context.Cause(s.ctx)
		}
		before := rec.n
		rec.hold, rec.holding = rec.hold[:0], true
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			rec.holding = false
			if _, err := io.Copy(io.Discard, rec); err != nil {
				return nil, src.explain(err)
			}
			diffID.Sum(o.diffID[:0])
			return o, nil
		}
		if err != nil {
			return nil, src.explain(err)
		}
		name := clean(h.Name)
		s.note(name, h)
		wanted := s.wanted[name]
		if wanted { // its content is held in parts
			if _, err := spill.Write(rec.hold[from-before:]); err != nil {
				return nil, fmt.Errorf("spill a layer's prioritized files: %w", err)
			}
		}
		rec.hold = rec.hold[:0]
		rec.holding = wanted
		for done := false; !done; {
			_, err := io.CopyN(io.Discard, tr, batchBytes)
			if done = errors.Is(err, io.EOF); err != nil && !done {
				return nil, src.explain(err)
			}
			if _, err := spill.Write(rec.hold); err != nil {
				return nil, fmt.Errorf("spill a layer's prioritized files: %w", err)
			}
			rec.hold = rec.hold[:0]
		}
		to := rec.n + int64(padding(rec.n))
		if reserved[name] {
			o.skip = append(o.skip, span{from, to})
		}
		if wanted {
			if _, err := spill.Write(zeroes[:padding(rec.n)]); err != nil {
				return nil, fmt.Errorf("spill a layer's prioritized files: %w", err)
			}
			s.found[name] = &moving{name: name, kind: h.Typeflag, source: span{from, to}, spill: span{at, at + to - from}}
			if h.Typeflag == tar.TypeLink {
				s.found[name].link = clean(h.Linkname)
			}
			at += to - from
		}
	}
}

func (s *survey) note(name string, h *tar.Header) {
	s.count[name]++
	dir, base := path.Split(name)
	if gone, ok := strings.CutPrefix(base, whiteoutPrefix); ok {
		s.removed[dir+gone] = true
	}
	if h.Typeflag == tar.TypeLink {
		target := clean(h.Linkname)
		s.links[target] = append(s.links[target], name)
	}
}

// family is all names of the file that m is a name of, in the layer's order.
func (s *survey) family(m *moving) []string {
	head := m.name
	if m.link != "" {
		head = m.link
	}
	return append([]string{head}, s.links[head]...)
}

// otherNames are names of wanted files that were not wanted themselves.
func (s *survey) otherNames(wanted []string) (more []string) {
	for _, p := range wanted {
		m := s.found[p]
		if m == nil || m.kind == tar.TypeDir {
			continue
		}
		for _, name := range s.family(m) {
			if !s.wanted[name] && s.count[name] > 0 {
				s.wanted[name] = true
				more = append(more, name)
			}
		}
	}
	return more
}

// order decides what moves, and adds it to o: each wanted file after its parents,
// with its other names. What several entries of the layer made together, or a
// whiteout removes, depends on their order and stays where it is.
func (s *survey) order(o *ordering, wanted []string) *ordering {
	moved := map[string]bool{}
	move := func(name string) {
		if m := s.found[name]; m != nil && !moved[name] {
			moved[name] = true
			o.first = append(o.first, m.spill)
			o.skip = append(o.skip, m.source)
		}
	}
	for _, p := range wanted {
		m := s.found[p]
		if m == nil {
			continue
		}
		family := []string{p}
		if m.kind != tar.TypeDir {
			family = s.family(m)
		}
		if slices.ContainsFunc(family, s.stays) {
			continue
		}
		for _, name := range family {
			for i := range len(name) {
				if name[i] == '/' {
					move(name[:i])
				}
			}
			move(name)
		}
	}
	if len(o.first) == 0 {
		return nil
	}
	slices.SortFunc(o.skip, func(a, b span) int { return int(min(1, max(-1, a.from-b.from))) })
	return o
}

// stays says that an entry cannot be taken out of its place.
func (s *survey) stays(name string) bool {
	if m := s.found[name]; m == nil || reserved[name] || s.count[name] > 1 || strings.HasPrefix(path.Base(name), whiteoutPrefix) || (m.link != "" && s.found[m.link] == nil) || s.removed[name] {
		return true
	}
	for p := path.Dir(name); p != "."; p = path.Dir(p) {
		if s.count[p] > 1 || s.removed[p] || (s.found[p] != nil && s.found[p].kind != tar.TypeDir) {
			return true
		}
	}
	return false
}
