package mirror

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"accel"
	"accel/cache"
	"accel/registry"
)

// maxMessageBytes of an error go to a client.
const maxMessageBytes = 1 << 10

// statusGone is what is counted for a client that hung up; nginx's number.
const statusGone = 499

// fail answers with an error, in the distribution spec's form, unless an answer
// has begun; then the connection breaks off, because less than announced was written.
func (x *exchange) fail(err error) {
	if x.r.Context().Err() != nil {
		if x.status == 0 {
			x.status = statusGone
		}
		return
	}
	x.transfer.Err = err
	if x.status != 0 {
		x.m.o.Log.Warn("an answer broke off", "repository", x.transfer.Repository, "digest", x.q.digest, "error", err)
		return
	}
	var said *refused
	switch {
	case errors.As(err, &said):
		x.error(said.status, said.code, said.message)
	case errors.Is(err, accel.ErrRegistryNotAllowed):
		x.error(http.StatusForbidden, "DENIED", err.Error())
	case errors.Is(err, accel.ErrUnauthenticated), errors.Is(err, accel.ErrForbidden) && x.source != nil && x.source.Own():
		if challenge := x.challenge(x.r.Context(), err); len(challenge) > 0 {
			x.unauthorized(challenge, err.Error())
			return
		}
		x.error(http.StatusForbidden, "DENIED", err.Error())
	case errors.Is(err, accel.ErrForbidden):
		x.error(http.StatusForbidden, "DENIED", err.Error())
	case errors.Is(err, accel.ErrNotFound):
		x.error(http.StatusNotFound, map[kind]string{manifest: "MANIFEST_UNKNOWN", blob: "BLOB_UNKNOWN"}[x.q.kind], err.Error())
	default:
		x.unavailable(err)
	}
}

// unavailable answers an error that says nothing about what was asked for.
func (x *exchange) unavailable(err error) {
	if x.source != nil && x.source.Own() && registry.Unreachable(err) {
		if challenge := x.basicChallenge(); challenge != nil {
			x.unauthorized(challenge, err.Error())
			return
		}
	}
	if x.source != nil && silent(err) {
		if _, graced := x.granted(); !graced {
			err = &unprovenError{x.access, err}
		}
	}
	if after := accel.RetryAfter(err); after > 0 {
		x.w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(after.Seconds()))))
	}
	var status int
	switch {
	case registry.StatusOf(err) == http.StatusTooManyRequests:
		x.error(http.StatusTooManyRequests, "TOOMANYREQUESTS", err.Error())
		return
	case errors.Is(err, cache.ErrClosed), errors.As(err, new(*unprovenError)):
		status = http.StatusServiceUnavailable
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, errImpatient), errors.Is(err, errStalled):
		status = http.StatusGatewayTimeout
	default:
		status = http.StatusBadGateway
	}
	x.m.o.Log.Warn("a request failed", "kind", string(x.q.kind), "registry", x.q.host, "repository", x.q.path, "error", err)
	x.error(status, "UNAVAILABLE", err.Error())
}

// silent reports whether upstream, or its token service, gave no answer at all, or that it cannot answer now.
func silent(err error) bool {
	var broken *url.Error
	return registry.Unreachable(err) &&
		(registry.StatusOf(err) != 0 || errors.As(err, &broken) || errors.Is(err, errImpatient) || errors.Is(err, context.DeadlineExceeded))
}

// unprovenError: upstream cannot be asked, and nothing that is remembered says that this client
// may have what it asks for. Whether it is here is not told.
type unprovenError struct {
	access
	cause error
}

func (e *unprovenError) Error() string {
	who := "without a credential nobody was let in there lately, and a client's could not be checked now"
	if e.client != OwnClient {
		who = "this credential was not let in there lately, nor is it open without one"
	}
	return fmt.Sprintf("whether this client may pull from %s cannot be found out: %s; what is cached is served meanwhile to who was let in within the last %s. %v",
		e.repository(), who, max(e.m.o.GrantGrace, e.m.o.GrantTTL), e.cause)
}

func (e *unprovenError) Unwrap() error { return e.cause }

// unauthorized sends the registry's own challenge.
func (x *exchange) unauthorized(challenge []string, message string) {
	for _, c := range challenge {
		x.w.Header().Add("WWW-Authenticate", c)
	}
	x.error(http.StatusUnauthorized, "UNAUTHORIZED", message)
}

func (x *exchange) error(status int, code, message string) {
	if code == "" {
		code = "NAME_UNKNOWN"
	}
	h := x.w.Header()
	for _, name := range []string{"ETag", "Docker-Content-Digest", "Accept-Ranges", "Warning"} {
		h.Del(name)
	}
	body, err := json.Marshal(map[string]any{"errors": []map[string]string{{"code": code, "message": message[:min(len(message), maxMessageBytes)]}}})
	if err != nil {
		body = nil // strings always have a form in JSON
	}
	h.Set("Content-Type", "application/json")
	x.start(status, int64(len(body)))
	if x.r.Method != http.MethodHead {
		_, _ = x.w.Write(body) // a client that has gone needs no answer
	}
}

// cut is the error of an answer that has begun: nil where it was the client that
// went away.
func (x *exchange) cut(err error) error {
	var gone clientError
	if errors.As(err, &gone) {
		return nil
	}
	return err
}

// clientError is the client's connection, not ours.
type clientError struct{ error }

func (e clientError) Unwrap() error { return e.error }

// sinkBytes go to a client under one deadline.
const sinkBytes = 1 << 20

// sink writes to the client, piece by piece under a deadline each, and keeps the
// way open for sendfile.
type sink struct {
	w        http.ResponseWriter
	control  *http.ResponseController
	patience time.Duration
}

func (x *exchange) sink() *sink {
	return &sink{w: x.w, control: http.NewResponseController(x.w), patience: x.m.o.ClientPatience}
}

// extend sets the deadline; servers that know none go without.
func (s *sink) extend() { _ = s.control.SetWriteDeadline(time.Now().Add(s.patience)) }

func (s *sink) Write(p []byte) (int, error) {
	written := 0
	for {
		s.extend()
		n, err := s.w.Write(p[written:min(len(p), written+sinkBytes)])
		written += n
		if err != nil {
			return written, clientError{err}
		}
		if written == len(p) {
			return written, nil
		}
	}
}

// ReadFrom implements io.ReaderFrom. net/http uses sendfile for a file and for an
// io.LimitedReader of one, so pieces are such again.
func (s *sink) ReadFrom(r io.Reader) (int64, error) {
	to, ok := s.w.(io.ReaderFrom)
	limited, bounded := r.(*io.LimitedReader)
	if !ok || !bounded {
		return io.Copy(struct{ io.Writer }{s}, r)
	}
	var total int64
	for limited.N > 0 {
		piece := &io.LimitedReader{R: limited.R, N: min(limited.N, sinkBytes)}
		s.extend()
		n, err := to.ReadFrom(piece)
		total += n
		limited.N -= n
		if err != nil {
			return total, clientError{err}
		}
		if n == 0 {
			return total, nil // the file ends here; whoever counts will notice
		}
	}
	return total, nil
}
