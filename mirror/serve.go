package mirror

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"accel"
	"accel/registry"

	"github.com/opencontainers/go-digest"
)

// exchange is one request on its way to its answer.
type exchange struct {
	access
	w        http.ResponseWriter
	r        *http.Request
	q        question
	transfer accel.Transfer
	status   int                   // answered; 0: not yet
	ended    func(*accel.Transfer) // of Options.Begin, nil where that was not told
}

// ServeHTTP answers one request. The handler must see the path as it came (no http.ServeMux that
// cleans paths before it); w should be the server's own, so that content goes by sendfile.
func (m *Mirror) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	x := &exchange{w: w, r: r, access: access{m: m}}
	defer x.end()
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		x.fail(refuse(http.StatusMethodNotAllowed, "UNSUPPORTED", "this is a mirror for pulls; push to the registry itself"))
		return
	}
	if err := x.serve(); err != nil {
		x.fail(err)
	}
}

func (x *exchange) serve() (err error) {
	if x.q, err = x.m.parse(x.r.URL); err != nil {
		return err
	}
	authorization := x.r.Header.Get("Authorization")
	if x.q.kind == ping {
		return x.ping(authorization)
	}
	if x.access, err = x.m.access(x.q.host, x.q.path, authorization); err != nil {
		return err
	}
	x.arrived = x.m.o.Now()
	if x.q.kind == manifest || x.q.kind == blob {
		x.ended = x.m.o.Begin(x.who(), x.repository(), x.q.digest)
	}
	switch x.q.kind {
	case manifest:
		return x.manifest()
	case blob:
		return x.blob()
	case tags:
		return x.tags()
	default:
		return x.referrers()
	}
}

// ping lets clients that ask first find out how to authenticate. Where the node has
// credentials of its own, or no registry is named, nothing is asked for.
func (x *exchange) ping(authorization string) error {
	if x.q.host != "" {
		// Any path does: what matters is the host.
		a, err := x.m.access(x.q.host, "ping", authorization)
		if err != nil {
			return err
		}
		x.access = a
		challenge, err := x.pingChallenge(authorization)
		if err != nil {
			return err
		}
		if len(challenge) > 0 {
			x.unauthorized(challenge, "the registry asks for credentials")
			return nil
		}
	}
	x.w.Header().Set("Content-Type", "application/json")
	x.start(http.StatusOK, 2)
	_, err := x.w.Write([]byte("{}"))
	return x.cut(err)
}

// pingChallenge: what cannot be asked is not asked for, so that clients go on to what is here. Nor is a token
// asked for that could not be had, because the token service is away.
func (x *exchange) pingChallenge(authorization string) ([]string, error) {
	ctx, cancel := context.WithTimeoutCause(x.r.Context(), x.m.o.AnswerPatience, errImpatient)
	defer cancel()
	if authorization != "" {
		err := x.m.o.Registry.Ping(ctx, x.q.host, authorization)
		if errors.Is(err, accel.ErrUnauthenticated) || errors.Is(err, accel.ErrForbidden) {
			return nil, err
		}
		return nil, nil
	}
	own, err := x.m.o.Registry.HasCredentials(ctx, x.q.host)
	if own || err != nil {
		return nil, err
	}
	challenge, err := x.m.o.Registry.Challenge(ctx, x.q.host)
	if err == nil && scheme(challenge, "bearer") != "" {
		err = x.ask(ctx, false, func(ctx context.Context) error { return x.m.o.Registry.Ping(ctx, x.q.host, "") })
		if !registry.Unreachable(err) {
			err = nil // a token service that refuses is there
		}
	}
	if err != nil {
		x.m.o.Log.Debug("a registry does not answer a ping", "registry", x.q.host, "error", err)
		return nil, nil
	}
	return challenge, nil
}

func (x *exchange) manifest() error {
	ctx := x.r.Context()
	var got resolved
	var err error
	if x.q.tag != "" {
		got, err = x.manifestByTag(ctx, x.q.tag, x.m.o.TagTTL)
	} else {
		got, err = x.manifestByDigest(ctx, x.q.digest)
	}
	if err != nil {
		return err
	}
	x.transfer.Digest = got.Digest
	x.transfer.Manifest = x.describe(got.Manifest)
	x.content(got.Digest, got.MediaType, got.note)
	if x.unchanged(got.Digest) {
		return nil
	}
	x.start(http.StatusOK, int64(len(got.Raw)))
	if x.r.Method == http.MethodGet {
		if _, err := x.sink().Write(got.Raw); err != nil {
			return x.cut(err)
		}
	}
	x.transfer.Complete = true
	return nil
}

// content sets the headers that manifests and blobs have in common.
func (x *exchange) content(d digest.Digest, mediaType string, note error) {
	h := x.w.Header()
	h.Set("Docker-Content-Digest", d.String())
	h.Set("ETag", `"`+d.String()+`"`)
	h.Set("Content-Type", mediaType)
	// Whatever a manifest claims to be, a browser is not to make a page of it.
	h.Set("X-Content-Type-Options", "nosniff")
	x.warn(note)
}

// warn says that an answer is an older one, where note is why upstream could not be asked.
func (x *exchange) warn(note error) {
	if note == nil {
		return
	}
	x.w.Header().Set("Warning", x.warning(note))
	x.note("served without asking the registry: " + note.Error())
	x.m.metrics.stale.Inc()
}

// unchanged answers 304 where the client has it already (RFC 9110 section 13.1.2).
func (x *exchange) unchanged(d digest.Digest) bool {
	for _, header := range x.r.Header.Values("If-None-Match") {
		for tag := range strings.SplitSeq(header, ",") {
			tag = strings.TrimPrefix(strings.TrimSpace(tag), "W/")
			if tag == "*" || strings.Trim(tag, `"`) == d.String() {
				x.w.Header().Del("Content-Type")
				x.start(http.StatusNotModified, -1)
				x.transfer.Complete = true
				return true
			}
		}
	}
	return false
}

func (x *exchange) tags() error {
	asked := x.r.URL.Query()
	query := url.Values{}
	for _, key := range []string{"n", "last"} {
		if v := asked.Get(key); v != "" {
			query.Set(key, v)
		}
	}
	if n := query.Get("n"); n != "" {
		if _, ok := parsePlace(n); !ok {
			return refuse(http.StatusBadRequest, "PAGINATION_NUMBER_INVALID", "n=%q is no number", n)
		}
	}
	var names []string
	var next url.Values
	err := x.ask(x.r.Context(), false, func(ctx context.Context) (err error) {
		names, next, err = x.source.Tags(ctx, query)
		return err
	})
	if err != nil {
		return err
	}
	if next != nil {
		if ns := asked.Get("ns"); ns != "" {
			next.Set("ns", ns)
		}
		x.w.Header().Set("Link", "<"+(&url.URL{Path: x.r.URL.Path, RawQuery: next.Encode()}).String()+`>; rel="next"`)
	}
	if names == nil {
		names = []string{}
	}
	return x.json("application/json", map[string]any{"name": x.q.path, "tags": names})
}

func (x *exchange) referrers() error {
	artifactType := x.r.URL.Query().Get("artifactType")
	list, err := x.referrersOf(x.r.Context(), x.q.digest, artifactType)
	if err != nil {
		return err
	}
	if artifactType != "" {
		x.w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	x.warn(list.note)
	return x.message(list.MediaType, list.Raw)
}

func (x *exchange) json(mediaType string, body any) error {
	raw, err := json.Marshal(body)
	if err != nil {
		return err
	}
	return x.message(mediaType, raw)
}

func (x *exchange) message(mediaType string, raw []byte) (err error) {
	x.w.Header().Set("Content-Type", mediaType)
	x.start(http.StatusOK, int64(len(raw)))
	if x.r.Method == http.MethodGet {
		_, err = x.sink().Write(raw)
	}
	return x.cut(err)
}

// start sends the header; a negative length is left out.
func (x *exchange) start(status int, lengthBytes int64) {
	if lengthBytes >= 0 {
		x.w.Header().Set("Content-Length", strconv.FormatInt(lengthBytes, 10))
	}
	x.status = status
	x.w.WriteHeader(status)
}
