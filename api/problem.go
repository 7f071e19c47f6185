package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"strings"

	"accel"

	"github.com/danielgtaylor/huma/v2"
)

// problemType prefixes the `type` of problems (RFC 9457) that stand for one of
// accel's errors.
const problemType = "urn:accel:problem:"

// problems maps accel's errors to HTTP, once for server and client.
var problems = []struct {
	err    error
	name   string
	status int
}{
	{accel.ErrRegistryNotAllowed, "registry-not-allowed", http.StatusForbidden},
	{accel.ErrUnauthenticated, "unauthenticated", http.StatusUnauthorized},
	{accel.ErrForbidden, "forbidden", http.StatusForbidden},
	{accel.ErrNotFound, "not-found", http.StatusNotFound},
	{accel.ErrInvalid, "invalid", http.StatusBadRequest},
	{accel.ErrConflict, "conflict", http.StatusConflict},
}

// isOurs reports whether err is one of accel's errors.
func isOurs(err error) bool {
	for _, p := range problems {
		if errors.Is(err, p.err) {
			return true
		}
	}
	return false
}

// Problem is one of accel's errors as the answer to a request; nil for any other.
func Problem(err error) huma.StatusError {
	for _, p := range problems {
		if errors.Is(err, p.err) {
			return &huma.ErrorModel{Type: problemType + p.name, Title: http.StatusText(p.status), Status: p.status, Detail: err.Error()}
		}
	}
	return nil
}

// problem is err as the answer to a request. What is no error of accel's is the
// server's own fault; its words go to the log, not to the caller.
func (s *server) problem(err error) huma.StatusError {
	if p := Problem(err); p != nil {
		return p
	}
	s.Log.Error("request failed", "error", err)
	return &huma.ErrorModel{Title: http.StatusText(http.StatusInternalServerError), Status: http.StatusInternalServerError, Detail: "internal error; the server's log has the cause"}
}

// writeProblem answers outside of huma's operations.
func writeProblem(w http.ResponseWriter, status int, detail string) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	//nolint:errcheck // the client may be gone; there is nobody else to tell
	json.NewEncoder(w).Encode(huma.ErrorModel{Title: http.StatusText(status), Status: status, Detail: detail})
}

// problemKind is the type of the problem document that an answer is; empty where it is none.
func problemKind(h http.Header, body []byte) string {
	var p huma.ErrorModel
	if kind, _, err := mime.ParseMediaType(h.Get("Content-Type")); err != nil || kind != "application/problem+json" || json.Unmarshal(body, &p) != nil {
		return ""
	}
	return p.Type
}

// ProblemError rebuilds the server's error from its answer.
func ProblemError(status int, body []byte) error {
	var p huma.ErrorModel
	if err := json.Unmarshal(body, &p); err != nil || p.Title == "" && p.Detail == "" {
		return fmt.Errorf("the server answered %d: %.200s", status, body)
	}
	words := p.Detail
	for _, d := range p.Errors {
		words = strings.TrimPrefix(words+"; "+d.Error(), "; ")
	}
	for _, known := range problems {
		if p.Type == problemType+known.name {
			return &remoteError{words: words, is: known.err}
		}
	}
	switch status {
	case http.StatusBadRequest, http.StatusUnprocessableEntity, http.StatusRequestEntityTooLarge:
		return &remoteError{words: words, is: accel.ErrInvalid}
	}
	return fmt.Errorf("the server answered %d %s: %s", status, p.Title, words)
}

// remoteError is one of accel's errors that came over the wire.
type remoteError struct {
	words string
	is    error
}

func (e *remoteError) Error() string { return e.words }
func (e *remoteError) Unwrap() error { return e.is }

// Refused reports whether a server said that the request makes no sense, such as the name of an image.
func Refused(err error) bool {
	var remote *remoteError
	return errors.As(err, &remote) && errors.Is(remote.is, accel.ErrInvalid)
}
