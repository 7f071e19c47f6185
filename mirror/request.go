package mirror

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"accel"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// kind is what a request is for.
type kind string

const (
	ping      kind = "ping"
	manifest  kind = "manifest"
	blob      kind = "blob"
	tags      kind = "tags"
	referrers kind = "referrers"
)

// question is a request as it was understood.
type question struct {
	kind kind
	// host is the canonical upstream registry; empty for a ping of none in particular.
	host string
	path string // the repository at host, as it was asked for
	// tag or digest: one is set for a manifest, digest for a blob and for referrers.
	tag    string
	digest digest.Digest
}

// maxPathBytes bounds what parse looks at: a host, a name (255), a digest.
const maxPathBytes = 1024

// parse understands a request's URL. What is passed on upstream is built from the parts
// that it has checked, never from the URL itself. Errors are *refused, or
// accel.ErrRegistryNotAllowed.
func (m *Mirror) parse(u *url.URL) (question, error) {
	if len(u.Path) > maxPathBytes {
		return question{}, refuse(http.StatusRequestURITooLong, "NAME_INVALID", "the path has %d bytes, more than %d", len(u.Path), maxPathBytes)
	}
	// A path that decodes to other segments than it shows could mean one thing to a
	// filter in front and another to us.
	if raw := strings.ToLower(u.RawPath); strings.Contains(raw, "%2f") || strings.Contains(raw, "%2e") {
		return question{}, refuse(http.StatusBadRequest, "NAME_INVALID", "encoded slashes and dots are not taken")
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return question{}, refuse(http.StatusBadRequest, "UNSUPPORTED", "malformed query")
	}
	ns := query["ns"]
	if len(ns) > 1 {
		return question{}, refuse(http.StatusBadRequest, "NAME_INVALID", "more than one ns")
	}
	rest, ok := strings.CutPrefix(u.Path, "/v2/")
	if ok && rest == "" || u.Path == "/v2" {
		return m.place(question{kind: ping}, ns, nil)
	}
	parts := strings.Split(rest, "/")
	if !ok || len(parts) < 3 {
		return question{}, refuse(http.StatusNotFound, "UNSUPPORTED", "no such endpoint; this is a mirror for pulls (OCI distribution API)")
	}
	name, what, last := parts[:len(parts)-2], parts[len(parts)-2], parts[len(parts)-1]
	q := question{}
	switch {
	case what == "manifests" && !strings.Contains(last, ":"):
		q.kind, q.tag = manifest, last
		if !validTag(last) {
			// The spec has no code for it; no tag of that name can exist.
			return question{}, refuse(http.StatusNotFound, "MANIFEST_UNKNOWN", "%q is neither a tag nor a digest", last)
		}
	case what == "manifests", what == "blobs", what == "referrers":
		q.kind, q.digest = map[string]kind{"manifests": manifest, "blobs": blob, "referrers": referrers}[what], digest.Digest(last)
		if err := q.digest.Validate(); err != nil {
			return question{}, refuse(http.StatusBadRequest, "DIGEST_INVALID", "%q: %v", last, err)
		}
		if q.digest.Algorithm() != digest.SHA256 {
			return question{}, refuse(http.StatusBadRequest, "DIGEST_INVALID", "%q: only sha256 is supported", last)
		}
	case what == "tags" && last == "list":
		q.kind = tags
	default:
		return question{}, refuse(http.StatusNotFound, "UNSUPPORTED", "no such endpoint; this is a mirror for pulls (OCI distribution API)")
	}
	return m.place(q, ns, name)
}

// place finds the registry that a request is meant for.
func (m *Mirror) place(q question, ns, name []string) (question, error) {
	var err error
	switch {
	case len(ns) == 1:
		q.host, err = m.o.Registry.Canonical(ns[0])
	case len(name) > 1 && hostOf(name[0]) != "":
		q.host, err = m.o.Registry.Canonical(hostOf(name[0]))
		if err == nil {
			name = name[1:]
		} else if m.o.Default != "" {
			q.host, err = m.o.Default, nil // a name of the default registry that looks like a host
		}
	default:
		q.host = m.o.Default
	}
	switch {
	case errors.Is(err, accel.ErrInvalid):
		return question{}, refuse(http.StatusBadRequest, "NAME_INVALID", "%v", err)
	case err != nil:
		return question{}, err
	case q.kind == ping:
		return q, nil
	case q.host == "":
		return question{}, refuse(http.StatusBadRequest, "NAME_INVALID", "%q names no registry: want ?ns=HOST, or HOST/PATH", strings.Join(name, "/"))
	}
	q.path = strings.Join(name, "/")
	if _, err := reference.WithName(q.host + "/" + q.path); err != nil || len(name) == 0 {
		return question{}, refuse(http.StatusBadRequest, "NAME_INVALID", "%q is no repository name", q.path)
	}
	return q, nil
}

// hostOf is the registry that the first part of a name stands for, by docker's rule; empty: none. Clients
// take no colon within a name, so HOST_PORT means HOST:PORT.
func hostOf(part string) string {
	host, port := part, ""
	if i := strings.LastIndexByte(part, '_'); i > 0 {
		if _, ok := parsePlace(part[i+1:]); ok {
			host, port = part[:i], ":"+part[i+1:]
		}
	}
	if !strings.ContainsAny(host, ".:") && host != "localhost" {
		return ""
	}
	return host + port
}

func validTag(s string) bool {
	at := reference.TagRegexp.FindStringIndex(s)
	return at != nil && at[0] == 0 && at[1] == len(s)
}

// refused is a request that is answered without asking anybody.
type refused struct {
	status  int
	code    string // of the distribution spec
	message string
}

func (r *refused) Error() string { return r.message }

func refuse(status int, code, format string, args ...any) error {
	return &refused{status, code, fmt.Sprintf(format, args...)}
}
