package api

import (
	"errors"
	"fmt"
	"net/http"
	"runtime/debug"
	"time"
)

// outer wraps the routes with what every request gets: a bound on the body, a
// measured duration, problem+json for what no route takes, and a stop for
// panics.
func (s *server) outer(mux *http.ServeMux) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		begin := time.Now()
		out := &statusWriter{ResponseWriter: w}
		defer func() {
			if p := recover(); p != nil {
				if err, ok := p.(error); ok && errors.Is(err, http.ErrAbortHandler) {
					panic(p)
				}
				s.Log.Error("panic in a request", "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
				if out.status == 0 {
					writeProblem(out, http.StatusInternalServerError, "internal error; the server's log has the cause")
				}
			}
			s.metrics.request(r, out.status, time.Since(begin))
		}()
		if r.Body != http.NoBody {
			// On a copy: net/http looks at its own request's body to keep a connection open
			// until the sender has read the 413.
			r = r.WithContext(r.Context())
			r.Body = http.MaxBytesReader(out, r.Body, s.MaxBodyBytes+1) // one more: the operation sees that it is too much
		}
		h, pattern := mux.Handler(r)
		if pattern == "" {
			refuse(out, r, h)
			return
		}
		mux.ServeHTTP(out, r)
	})
}

// refuse answers what no route takes: 404, or 405 where another method would do.
func refuse(w http.ResponseWriter, r *http.Request, h http.Handler) {
	probe := &headerOnly{header: http.Header{}}
	h.ServeHTTP(probe, r)
	if probe.status == http.StatusMethodNotAllowed {
		w.Header().Set("Allow", probe.header.Get("Allow"))
		writeProblem(w, probe.status, fmt.Sprintf("%s is not allowed here, but %s", r.Method, probe.header.Get("Allow")))
		return
	}
	writeProblem(w, http.StatusNotFound, fmt.Sprintf("no route for %s %s; see /docs", r.Method, r.URL.Path))
}

// headerOnly takes an answer's status and header and drops its body.
type headerOnly struct {
	header http.Header
	status int
}

func (h *headerOnly) Header() http.Header         { return h.header }
func (h *headerOnly) WriteHeader(status int)      { h.status = status }
func (h *headerOnly) Write(p []byte) (int, error) { return len(p), nil }

// statusWriter notes an answer's status.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return w.ResponseWriter.Write(p)
}

// Unwrap lets http.ResponseController find Flush and the deadlines.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
