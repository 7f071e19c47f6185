package webhook

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"regexp"
	"strings"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

// batch collects what one notification says, and validates it on the way in.
type batch struct {
	source   string // the Source's name
	registry string // Config.Registry
	events   []accel.PushEvent
	ignored  []string
	rejected []error
}

// field is a value of the body together with where it stood, for errors.
type field struct{ path, value string }

// push is one announced push as a decoder found it, not validated yet.
type push struct {
	host       field
	repository field
	tag        field
	digest     field
	mediaType  field // the manifest's; an empty value where the event does not tell
	artifact   field // the config's or the artifact's media type, likewise
	at         timestamp
}

// fallbackTag is the form of the tags that clients use to attach signatures,
// attestations and referrers to a digest (cosign; the distribution spec's
// referrers tag schema), and that accel itself uses for untagged targets.
var fallbackTag = regexp.MustCompile(`^sha(256|384|512)-[0-9a-f]{64}`)

// add validates p and keeps it as an event, or notes why it is none.
func (b *batch) add(p push) {
	if reason := notAnImage(p); reason != "" {
		b.ignore("%s", reason)
		return
	}
	if fallbackTag.MatchString(p.tag.value) {
		b.ignore("%s %.200q: attached to another manifest (signature, attestation or referrers), no image", p.tag.path, p.tag.value)
		return
	}
	event, err := b.event(p)
	if err != nil {
		b.reject(err)
		return
	}
	b.events = append(b.events, event)
}

// event assembles the reference and has its grammar checked, field by field so
// that the error names the one at fault.
func (b *batch) event(p push) (accel.PushEvent, error) {
	var none accel.PushEvent
	host := canonicalHost(p.host.value)
	if b.registry != "" {
		host, p.host.path = b.registry, "registry (of the configuration)"
	}
	switch {
	case host == "":
		return none, b.invalid(p.host.path, "missing, and the source's configuration names no registry")
	case !validHost(host):
		return none, b.invalid(p.host.path, "%.200q is no registry host (want HOST[:PORT] with a dot or a port in it)", host)
	case p.repository.value == "":
		return none, b.invalid(p.repository.path, "missing")
	}
	name, err := accel.ParseReference(host + "/" + p.repository.value)
	if err != nil || name.Digest != "" || !sameRepository(name, host, p.repository.value) {
		return none, b.invalid(p.repository.path, "%.300q is no repository name", p.repository.value)
	}

	tag, dgst := p.tag, p.digest
	if strings.Contains(tag.value, ":") { // a digest where a tag should be
		if dgst.value != "" && dgst.value != tag.value {
			return none, b.invalid(tag.path, "%.200q is another digest than %s", tag.value, dgst.path)
		}
		dgst, tag = tag, field{path: tag.path}
	}
	if tag.value == "" && dgst.value == "" {
		if dgst.path == "" {
			return none, b.invalid(tag.path, "missing")
		}
		return none, b.invalid(dgst.path, "missing, and %s too", tag.path)
	}
	want := accel.Reference{Registry: name.Registry, Repository: name.Repository, Tag: tag.value}
	if dgst.value != "" {
		d, err := digest.Parse(dgst.value)
		if err != nil {
			return none, b.invalid(dgst.path, "%.200q is no digest: %v", dgst.value, err)
		}
		want.Digest = d
	}
	got, err := accel.ParseReference(want.String())
	if err != nil || got != want {
		if tag.value == "" {
			return none, b.invalid(dgst.path, "%.200q is no digest", dgst.value)
		}
		return none, b.invalid(tag.path, "%.200q is no tag", tag.value)
	}
	return accel.PushEvent{
		Source:     b.source,
		Registry:   want.Registry,
		Repository: want.Repository,
		Tag:        want.Tag,
		Digest:     want.Digest,
		MediaType:  bareMediaType(p.mediaType.value),
		OccurredAt: p.at.Time,
	}, nil
}

// sameRepository reports whether parsing found in the assembled name what was
// put in, and has not split it elsewhere. Docker Hub's official images are
// spelled without "library/".
func sameRepository(got accel.Reference, host, repository string) bool {
	if got.Registry != host {
		return false
	}
	return got.Repository == repository || host == dockerHubHost && got.Repository == "library/"+repository
}

func (b *batch) ignore(format string, args ...any) {
	b.ignored = append(b.ignored, fmt.Sprintf(format, args...))
}

func (b *batch) reject(err error) { b.rejected = append(b.rejected, err) }

// invalid is an accel.ErrInvalid about one field of the body.
func (b *batch) invalid(path, format string, args ...any) error {
	return fmt.Errorf("%w: webhook %s: %s: %s", accel.ErrInvalid, b.source, path, fmt.Sprintf(format, args...))
}

// unmarshal reads body as JSON into v.
func (b *batch) unmarshal(what string, body []byte, v any) error {
	err := json.Unmarshal(body, v)
	if err == nil {
		return nil
	}
	var wrong *json.UnmarshalTypeError
	if errors.As(err, &wrong) {
		return b.invalid(what, "field %.200q holds a JSON %s", wrong.Field, wrong.Value)
	}
	return b.invalid(what, "not the expected JSON: %v", err)
}

// count refuses more events than a notification may have.
func (b *batch) count(path string, n int) error {
	if n > MaxEvents {
		return b.invalid(path, "%d entries, more than %d", n, MaxEvents)
	}
	return nil
}

func (b *batch) result() (Result, error) {
	if len(b.events) == 0 && len(b.rejected) > 0 {
		return Result{}, b.rejected[0]
	}
	for _, err := range b.rejected {
		b.ignored = append(b.ignored, err.Error())
	}
	return Result{Events: b.events, Ignored: b.ignored}, nil
}

// timestamp is a point in time in any of the forms that registries use: RFC
// 3339, or seconds or milliseconds since 1970. Anything else, a time without a
// zone among it, reads as zero, which means unknown: the order of pushes is not
// worth refusing one for.
type timestamp struct{ time.Time }

// UnmarshalJSON never fails.
func (t *timestamp) UnmarshalJSON(data []byte) error {
	t.Time = time.Time{}
	var text string
	var number float64
	switch {
	case json.Unmarshal(data, &text) == nil:
		*t = timestampOf(text)
	case json.Unmarshal(data, &number) == nil:
		const firstMilli = 1e11 // as seconds this would be the year 5138
		if number >= firstMilli {
			number /= 1000
		}
		if number > 0 && number < firstMilli {
			whole, fraction := math.Modf(number)
			t.Time = time.Unix(int64(whole), int64(fraction*1e9)).UTC()
		}
	}
	t.bound()
	return nil
}

func timestampOf(text string) timestamp {
	var t timestamp
	if parsed, err := time.Parse(time.RFC3339Nano, text); err == nil {
		t.Time = parsed.UTC()
	}
	t.bound()
	return t
}

// bound drops times that no registry can mean; those outside of four-digit
// years could not be written as JSON either.
func (t *timestamp) bound() {
	if y := t.Year(); y < 1971 || y > 9998 {
		t.Time = time.Time{}
	}
}
