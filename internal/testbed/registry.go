package testbed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem" // its storage
)

// RegistryOptions says how a registry is to be.
type RegistryOptions struct {
	// Dir is an empty directory, or that of an earlier registry.
	Dir string
	// Address is "127.0.0.1:0" where empty.
	Address string
	// Accounts may get tokens; where empty, the registry asks nobody.
	Accounts []Account
}

// Registry is a distribution registry over plain HTTP on loopback. Close ends it.
type Registry struct {
	app     *handlers.App
	tokens  *tokenService // nil: asks nobody
	counter counter
	cancel  context.CancelFunc

	mu     sync.Mutex
	host   string
	server *http.Server // nil while stopped
	served chan struct{}
}

// StartRegistry starts a registry that serves until Stop or Close.
func StartRegistry(o RegistryOptions) (*Registry, error) {
	if o.Address == "" {
		o.Address = "127.0.0.1:0"
	}
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", o.Address)
	if err != nil {
		return nil, err
	}
	r := &Registry{host: l.Addr().String()}
	config := &configuration.Configuration{}
	config.Log.AccessLog.Disabled = true
	config.Log.Level = "error"
	config.HTTP.Secret = "one process only"
	config.Catalog.MaxEntries = 200 // 0 would list nothing
	config.Storage = configuration.Storage{
		"filesystem":  {"rootdirectory": filepath.Join(o.Dir, "registry")},
		"cache":       {"blobdescriptor": "inmemory"},
		"delete":      {"enabled": true},
		"maintenance": {"uploadpurging": map[any]any{"enabled": false}},
	}
	if len(o.Accounts) > 0 {
		if r.tokens, err = newTokenService(r.host, o.Accounts); err == nil {
			config.Auth, err = r.tokens.configuration(o.Dir)
		}
		if err != nil {
			return nil, errors.Join(err, l.Close())
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	r.app = handlers.NewApp(ctx, config)
	r.serve(l)
	return r, nil
}

// Host is "address:port", also while it is stopped.
func (r *Registry) Host() string { return r.host }

func (r *Registry) serve(l net.Listener) {
	mux := http.NewServeMux()
	mux.Handle("/", r.counter.count(r.app))
	if r.tokens != nil {
		mux.Handle(tokenPath, r.tokens)
	}
	r.server = &http.Server{Handler: mux, ErrorLog: log.New(io.Discard, "", 0)}
	r.served = make(chan struct{})
	go func(s *http.Server, done chan struct{}) {
		defer close(done)
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			fmt.Fprintln(os.Stderr, "testbed: registry:", err)
		}
	}(r.server, r.served)
}

// Stop closes the listener and every connection: the registry is down.
func (r *Registry) Stop() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.server == nil {
		return nil
	}
	err := r.server.Close()
	<-r.served
	r.server = nil
	return err
}

// Start has a stopped registry listen where it did before.
func (r *Registry) Start() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.server != nil {
		return nil
	}
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", r.host)
	if err != nil {
		return err
	}
	r.serve(l)
	return nil
}

// Delivered is what it sent since the start or the last Reset.
func (r *Registry) Delivered() Delivered { return r.counter.delivered() }

// Reset sets the counters to zero.
func (r *Registry) Reset() { r.counter.reset() }

// Close ends the registry; its directory stays.
func (r *Registry) Close() error {
	err := r.Stop()
	r.cancel()
	return errors.Join(err, r.app.Shutdown())
}
