package profile

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

// End is why a recording ended.
type End string

const (
	EndAnswered End = "answered" // the program said that it is up, as by its first HTTP answer
	EndQuiet    End = "quiet"    // nothing new was read for a while
	EndLimit    End = "limit"    // it never became quiet
	EndStopped  End = "stopped"  // the container or the node ended first
)

// Report is what one start read.
type Report struct {
	// ID makes it count once however often it is sent: 32 hexadecimal digits.
	ID string
	// Node is who says so. The service sets it from the sender's credentials.
	Node string
	// Manifest is the source PLATFORM manifest's digest.
	Manifest digest.Digest
	// StartedAt is in whole seconds UTC.
	StartedAt time.Time
	// Complete says that all reads were seen, to the start's end: the layers had been
	// mounted for it anew, and it was not cut short. Pages that the kernel has in its
	// cache are read without anyone's notice, so what another container's start has
	// left there is missing in any other report. Such a report adds, but what it does not
	// name it says nothing about.
	Complete bool
	End      End
	// Took is how long the start took, from its mount until the program answered; 0 for
	// any other End than EndAnswered, or where nobody knows. At most a day.
	Took time.Duration
	// Profile is the version of the profile that was fetched ahead for it; empty: none
	// was. See Version.
	Profile digest.Digest
	// Items are in the order of their first use. They do not overlap.
	Items []Item
}

// maxTook bounds a start's duration, lest a sum of them runs over.
const maxTook = 24 * time.Hour

// newID is a report's.
func newID() string {
	var id [16]byte
	rand.Read(id[:]) // never fails
	return hex.EncodeToString(id[:])
}

func (r Report) check() error {
	if id, err := hex.DecodeString(r.ID); err != nil || len(id) != 16 || hex.EncodeToString(id) != r.ID {
		return fmt.Errorf("%w: report id %.40q", accel.ErrInvalid, r.ID)
	}
	if !validName(r.Node, 256) {
		return fmt.Errorf("%w: node %.40q", accel.ErrInvalid, r.Node)
	}
	switch r.End {
	case EndAnswered, EndQuiet, EndLimit, EndStopped:
	default:
		return fmt.Errorf("%w: end %.40q", accel.ErrInvalid, r.End)
	}
	if r.StartedAt.IsZero() {
		return fmt.Errorf("%w: no time", accel.ErrInvalid)
	}
	if r.Took < 0 || r.Took > maxTook || (r.Took > 0 && r.End != EndAnswered) {
		return fmt.Errorf("%w: a start that took %v and ended %s", accel.ErrInvalid, r.Took, r.End)
	}
	if r.Profile != "" && r.Profile.Validate() != nil {
		return fmt.Errorf("%w: fetched ahead by profile %.100q", accel.ErrInvalid, r.Profile)
	}
	return checkHead(r.Manifest, r.StartedAt)
}

type wireReport struct {
	Version   int           `json:"v"`
	ID        string        `json:"id"`
	Node      string        `json:"node,omitempty"`
	Manifest  digest.Digest `json:"manifest"`
	StartedAt int64         `json:"startedAt"` // Unix seconds
	Complete  bool          `json:"complete,omitempty"`
	End       End           `json:"end"`
	Took      int64         `json:"tookNs,omitempty"`
	Profile   digest.Digest `json:"profile,omitempty"`
	Layers    []wireLayer   `json:"layers"`
	Items     []int64       `json:"items"`
}

// EncodeReport is r in canonical form. The error is an accel.ErrInvalid.
func EncodeReport(r Report) ([]byte, error) {
	if err := r.check(); err != nil {
		return nil, err
	}
	if err := checkAll(r.Items); err != nil {
		return nil, err
	}
	t := tableOf(r.Items)
	b := marshal(wireReport{
		Version: wireVersion, ID: r.ID, Node: r.Node, Manifest: r.Manifest, StartedAt: unix(r.StartedAt), Complete: r.Complete, End: r.End,
		Took: int64(r.Took), Profile: r.Profile, Layers: t.encode(), Items: t.numbers(r.Items),
	})
	if len(b) > MaxEncodedBytes {
		return nil, fmt.Errorf("%w: a report of %d bytes is larger than %d", accel.ErrInvalid, len(b), MaxEncodedBytes)
	}
	return b, nil
}

// DecodeReport reads what EncodeReport wrote, from whoever sent it. The error is an
// accel.ErrInvalid that says where.
func DecodeReport(b []byte) (Report, error) {
	r, err := func() (r Report, err error) {
		var w wireReport
		if err := unmarshal(b, MaxEncodedBytes, &w); err != nil {
			return r, err
		}
		if w.Version != wireVersion {
			return r, fmt.Errorf("%w: version %d", accel.ErrInvalid, w.Version)
		}
		r = Report{ID: w.ID, Node: w.Node, Manifest: w.Manifest, StartedAt: fromUnix(w.StartedAt), Complete: w.Complete, End: w.End, Took: time.Duration(w.Took), Profile: w.Profile}
		files, err := decodeFiles(w.Layers, maxPathsBytes)
		if err != nil {
			return r, err
		}
		if r.Items, err = itemsOf(files, w.Items, MaxItems); err != nil {
			return r, err
		}
		again, err := EncodeReport(r)
		if err != nil {
			return r, err
		}
		return r, canonical(b, again)
	}()
	if err != nil {
		return Report{}, fmt.Errorf("start report: %w", err)
	}
	return r, nil
}
