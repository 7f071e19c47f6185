package profile

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

// Bounds of a Summary. Half of 16 starts is sharp enough to tell what starts have
// in common, and one node alone never has the majority.
const (
	// MaxReports is how many reports a summary keeps.
	MaxReports = 16
	// MaxReportsOfNode is how many of them may be one node's.
	MaxReportsOfNode = 4
	// MaxSummaryBytes bounds an encoded summary. Sixteen starts of 2,000 items that have
	// most of them in common take some 300 kB.
	MaxSummaryBytes = MaxReports * MaxEncodedBytes
)

// Summary is a sample of the reports about one image: whole ones before
// incomplete ones, and among these the ones with the lowest hash of their id, which
// is as good as a random choice, bounded for each node and in all. So it is the
// same in whatever order reports and summaries are added, and however often. It
// is not safe for concurrent use.
type Summary struct {
	manifest digest.Digest
	reports  []ranked // ascending
}

// ranked is a report with its place in the order of preference.
type ranked struct {
	Report
	hash    [sha256.Size]byte // of its node and id
	content [sha256.Size]byte // of all of it: an id that was used for two reports counts once
}

func (r ranked) compare(o ranked) int {
	if r.Complete != o.Complete {
		if r.Complete {
			return -1
		}
		return 1
	}
	return cmp.Or(bytes.Compare(r.hash[:], o.hash[:]), bytes.Compare(r.content[:], o.content[:]))
}

// Rank is r's place in the order of preference: what sorts first is kept.
func Rank(r Report) string {
	class := "1"
	if r.Complete {
		class = "0"
	}
	h := hashOf(r)
	return class + hex.EncodeToString(h[:])
}

// Bar is the Rank of the worst report of a full sample, else empty. A report that ranks behind it
// changes nothing, and need not be added.
func (s *Summary) Bar() string {
	if len(s.reports) < MaxReports {
		return ""
	}
	return Rank(s.reports[len(s.reports)-1].Report)
}

func hashOf(r Report) [sha256.Size]byte { return sha256.Sum256([]byte(r.Node + "\x00" + r.ID)) }

// NewSummary is one without reports, of a source platform manifest.
func NewSummary(manifest digest.Digest) *Summary { return &Summary{manifest: manifest} }

// Reports is how many reports s keeps.
func (s *Summary) Reports() int { return len(s.reports) }

// Complete is how many of them saw all reads.
func (s *Summary) Complete() (n int) {
	for _, r := range s.reports {
		if r.Complete {
			n++
		}
	}
	return n
}

// Nodes is how many nodes they are of.
func (s *Summary) Nodes() int {
	names := map[string]bool{}
	for _, r := range s.reports {
		names[r.Node] = true
	}
	return len(names)
}

// Cover is how well a profile foretells the complete reports, added up.
func (s *Summary) Cover(p accel.Profile) (c Cover) {
	for _, r := range s.reports {
		if r.Complete {
			one := Coverage(accel.Profile{Items: r.Items}, p)
			c.RecordedBytes += one.RecordedBytes
			c.CoveredBytes += one.CoveredBytes
			c.VainBytes += one.VainBytes
		}
	}
	return c
}

// Manifest is the image's.
func (s *Summary) Manifest() digest.Digest { return s.manifest }

// Add takes one report in, and says whether s is another one now. What is invalid
// among its items, said twice or above the bounds is left out. The error is an
// accel.ErrInvalid: a report without its id, about another image, or too large.
func (s *Summary) Add(r Report) (changed bool, err error) {
	if r.Manifest != s.manifest {
		return false, fmt.Errorf("%w: report %.40q is about %.100q, not %s", accel.ErrInvalid, r.ID, r.Manifest, s.manifest)
	}
	r.Items = bounded(r.Items, MaxItems, MaxHotBytes)
	r.Took, r.Profile = 0, "" // how it went is not what it read, and is not kept
	b, err := EncodeReport(r)
	if err != nil {
		return false, err
	}
	return s.insert([]ranked{{Report: r, hash: hashOf(r), content: sha256.Sum256(b)}}), nil
}

// Merge takes all of o's reports in. The error is an accel.ErrInvalid: o is about
// another image.
func (s *Summary) Merge(o *Summary) (changed bool, err error) {
	if o.manifest != s.manifest {
		return false, fmt.Errorf("%w: a summary of %s, not of %s", accel.ErrInvalid, o.manifest, s.manifest)
	}
	return s.insert(o.reports), nil
}

// insert keeps the best of both. An element that is left out has the allowed number
// of better ones in its way, and more reports only give it more of them; therefore
// the order of additions does not matter.
func (s *Summary) insert(more []ranked) (changed bool) {
	all := slices.SortedFunc(slices.Values(slices.Concat(s.reports, more)), ranked.compare)
	seen, ofNode := map[[sha256.Size]byte]bool{}, map[string]int{}
	kept := make([]ranked, 0, MaxReports)
	for _, r := range all {
		if seen[r.hash] || ofNode[r.Node] == MaxReportsOfNode || len(kept) == MaxReports {
			continue
		}
		seen[r.hash] = true
		ofNode[r.Node]++
		kept = append(kept, r)
	}
	changed = !slices.EqualFunc(s.reports, kept, func(a, b ranked) bool { return a.compare(b) == 0 })
	s.reports = kept
	return changed
}

type wireSummary struct {
	Version  int           `json:"v"`
	Manifest digest.Digest `json:"manifest"`
	Layers   []wireLayer   `json:"layers"`
	Parts    []int64       `json:"parts"` // all reports' distinct items
	Reports  []wireStart   `json:"reports"`
}

// wireStart is a report whose items are numbers of parts.
type wireStart struct {
	ID        string `json:"id"`
	Node      string `json:"node,omitempty"`
	StartedAt int64  `json:"startedAt"`
	Complete  bool   `json:"complete,omitempty"`
	End       End    `json:"end"`
	Parts     []int  `json:"parts"`
}

// Encode is s in canonical form: equal summaries give equal bytes.
func (s *Summary) Encode() []byte {
	var parts []Item
	known := map[Item]int{}
	for _, r := range s.reports {
		for _, i := range r.Items {
			if _, ok := known[i]; !ok {
				known[i] = 0
				parts = append(parts, i)
			}
		}
	}
	slices.SortFunc(parts, func(a, b Item) int {
		return cmp.Or(fileOf(a).compare(fileOf(b)), cmp.Compare(a.Offset, b.Offset), cmp.Compare(a.Bytes, b.Bytes))
	})
	for n, i := range parts {
		known[i] = n
	}
	t := tableOf(parts)
	w := wireSummary{Version: wireVersion, Manifest: s.manifest, Layers: t.encode(), Parts: t.numbers(parts), Reports: []wireStart{}}
	for _, r := range s.reports {
		start := wireStart{ID: r.ID, Node: r.Node, StartedAt: unix(r.StartedAt), Complete: r.Complete, End: r.End, Parts: []int{}}
		for _, i := range r.Items {
			start.Parts = append(start.Parts, known[i])
		}
		w.Reports = append(w.Reports, start)
	}
	return marshal(w)
}

// DecodeSummary reads what Encode wrote. The error is an accel.ErrInvalid that says
// where.
func DecodeSummary(b []byte) (*Summary, error) {
	s, err := func() (*Summary, error) {
		var w wireSummary
		if err := unmarshal(b, MaxSummaryBytes, &w); err != nil {
			return nil, err
		}
		if w.Version != wireVersion || len(w.Reports) > MaxReports {
			return nil, fmt.Errorf("%w: version %d with %d reports", accel.ErrInvalid, w.Version, len(w.Reports))
		}
		if err := checkHead(w.Manifest, time.Time{}); err != nil {
			return nil, err
		}
		files, err := decodeFiles(w.Layers, MaxReports*maxPathsBytes)
		if err != nil {
			return nil, err
		}
		parts, err := itemsOf(files, w.Parts, MaxReports*MaxItems)
		if err != nil {
			return nil, err
		}
		s := NewSummary(w.Manifest)
		for _, start := range w.Reports {
			r := Report{ID: start.ID, Node: start.Node, Manifest: w.Manifest, StartedAt: fromUnix(start.StartedAt), Complete: start.Complete, End: start.End}
			for _, n := range start.Parts {
				if n < 0 || n >= len(parts) {
					return nil, fmt.Errorf("%w: report %.40q: part %d of %d", accel.ErrInvalid, r.ID, n, len(parts))
				}
				r.Items = append(r.Items, parts[n])
			}
			if _, err := s.Add(r); err != nil {
				return nil, err
			}
		}
		return s, canonical(b, s.Encode())
	}()
	if err != nil {
		return nil, fmt.Errorf("summary of starts: %w", err)
	}
	return s, nil
}
