package testbed

import (
	"net/http"
	"sync"
)

// expirer has a registry refuse tokens before their time.
type expirer struct {
	mu      sync.Mutex
	seen    map[string]bool // Authorization headers
	expired map[string]bool
}

func (e *expirer) expire(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if given := r.Header.Get("Authorization"); e.refuses(given) {
			r.Header.Del("Authorization") // the registry answers as it does to nobody: with its challenge
		}
		next.ServeHTTP(w, r)
	})
}

func (e *expirer) refuses(given string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if given == "" || e.expired[given] {
		return given != ""
	}
	if e.seen == nil {
		e.seen = map[string]bool{}
	}
	e.seen[given] = true
	return false
}

// ExpireTokens has the registry refuse each token that it has seen so far, as if it had expired.
func (r *Registry) ExpireTokens() {
	r.expirer.mu.Lock()
	defer r.expirer.mu.Unlock()
	if r.expirer.expired == nil {
		r.expirer.expired = map[string]bool{}
	}
	for token := range r.expirer.seen {
		r.expirer.expired[token] = true
	}
}
