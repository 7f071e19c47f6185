package meter

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

// wentAway is the reason of a pull whose client hung up in the middle of a layer
// and did not come back for it.
const wentAway = "the client went away"

// pull is one that is under way.
type pull struct {
	*image
	start   time.Time
	end     time.Time // of the last transfer that the client needed
	touched time.Time // the client asked for anything of it

	layers      map[digest.Digest]*layer // that were asked for
	tally       accel.Tally
	tenant      string
	memoryBytes int64
	manifestErr string // why the manifest or the config could not be had; empty after it could
	configErr   string
	notes       []string
}

// layer is what the client was given of one.
type layer struct {
	given  int64
	failed string // why the last transfer was not complete
}

// delivered reports whether a client has all of a layer that is so large.
func (l *layer) delivered(size int64) bool { return l != nil && l.failed == "" && l.given >= size }

// say notes what every transfer may tell.
func (p *pull) say(x *accel.Transfer, now time.Time) {
	p.touched = now
	p.tenant = cmp.Or(p.tenant, x.Tenant)
	p.memoryBytes = cmp.Or(p.memoryBytes, x.MemoryBytes)
	if x.Note != "" && !slices.Contains(p.notes, x.Note) && len(p.notes) < 8 {
		p.notes = append(p.notes, x.Note)
	}
}

func (p *pull) configDone(x *accel.Transfer, now time.Time) {
	p.configErr = ""
	if !x.Complete {
		p.configErr = reasonOf(x)
	}
	p.end = now
	p.say(x, now)
}

func (p *pull) layer(x *accel.Transfer, given int64) {
	l := p.layers[x.Digest]
	if l == nil {
		l = &layer{}
		p.layers[x.Digest] = l
	}
	l.given += given
	l.failed = ""
	if !x.Complete {
		l.failed = reasonOf(x)
	}
	p.tally.Add(x.Tally)
}

func reasonOf(x *accel.Transfer) string {
	if x.Err == nil {
		return wentAway
	}
	return x.Err.Error()
}

// cut ends a pull from outside.
func (p *pull) cut(reason string) {
	if !p.delivered() && p.manifestErr == "" {
		p.manifestErr = reason
	}
}

// delivered reports whether the client was given all layers of the manifest.
func (p *pull) delivered() bool {
	for d, size := range p.sizes {
		if !p.layers[d].delivered(size) {
			return false
		}
	}
	return len(p.sizes) > 0
}

// result is the pull as it is reported, but for id and node; false where nothing was pulled.
func (p *pull) result() (accel.Pull, bool) {
	t := p.tally
	out := accel.Pull{
		Image: p.name, Digest: cmp.Or(p.platform, p.root), Mode: accel.PullMirror, Tenant: p.tenant, MemoryBytes: min(max(0, p.memoryBytes), maxMemory),
		Start: p.start.UTC().Round(0), Duration: max(0, p.end.Sub(p.start)),
		RegistryBytes: t.RegistryBytes, PeerBytes: t.PeerBytes, CacheBytes: t.CacheBytes + t.SharedBytes,
	}
	reason := cmp.Or(p.manifestErr, p.configErr)
	for _, d := range slices.Sorted(maps.Keys(p.layers)) {
		if l := p.layers[d]; l.failed != "" {
			reason = cmp.Or(reason, l.failed)
		}
	}
	switch {
	case reason != "":
		out.Outcome = accel.OutcomeError
	case len(p.layers) == 0:
		return out, false // only looked at
	case t.RegistryBytes == 0 && t.SharedBytes == 0:
		out.Outcome = accel.OutcomeHit
	case t.CacheBytes == 0 && t.PeerBytes == 0 && t.SharedBytes == 0:
		out.Outcome = accel.OutcomeMiss
	default:
		out.Outcome = accel.OutcomePartial
	}
	words := p.notes
	if reason != "" {
		words = append([]string{reason}, p.notes...)
	}
	out.Reason = short(strings.Join(words, "; "))
	return out, true
}

// short cuts a reason to what is kept of it.
func short(s string) string {
	s = strings.ToValidUTF8(s, "?")
	if len(s) > maxReasonBytes {
		s = strings.ToValidUTF8(s[:maxReasonBytes], "")
	}
	return s
}
