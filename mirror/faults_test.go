package mirror_test

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"

	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem"
)

// fault answers a request instead of the registry, or changes what it answers;
// it reports whether it has.
type fault func(w http.ResponseWriter, r *http.Request, next http.Handler) bool

func (u *upstream) set(x fault) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.fault, u.seen = x, nil
}

// breakTokens breaks the token service, and has the tokens that it gave end.
func (u *upstream) breakTokens(x fault) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.tokens = x
	clear(u.given)
}

// on limits a fault to requests of a method whose path has part, and to the
// first n of them (all, where n is 0).
func on(method, part string, n int64, x fault) fault {
	var done atomic.Int64
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		if method != "" && r.Method != method || !strings.Contains(r.URL.Path, part) || n > 0 && done.Add(1) > n {
			return false
		}
		return x(w, r, next)
	}
}

func status(code int, headers ...string) fault {
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) bool {
		for i := 0; i+1 < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		w.WriteHeader(code)
		return true
	}
}

// changed has the registry answer into memory and sends what change makes of it;
// then the connection breaks where cut is set.
func changed(change func([]byte) []byte, cut bool) fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		rec := httptest.NewRecorder()
		next.ServeHTTP(rec, r)
		for k, v := range rec.Header() {
			w.Header()[k] = v
		}
		body := change(bytes.Clone(rec.Body.Bytes()))
		if !cut {
			w.Header().Set("Content-Length", fmt.Sprint(len(body)))
		}
		w.WriteHeader(rec.Code)
		w.Write(body)
		if cut {
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
		return true
	}
}

func hangs(_ http.ResponseWriter, r *http.Request, _ http.Handler) bool {
	<-r.Context().Done()
	return true
}

func unranged(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
	r.Header.Del("Range")
	return false
}
