package testbed

import (
	"context"
	"errors"
	"path/filepath"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem" // its storage
)

// RegistryOptions says how a registry is to be.
type RegistryOptions struct {
	// Dir is an empty directory, or that of an earlier registry.
	Dir string
	// Address is one that is free where empty.
	Address string
	// Accounts may get tokens; where empty, the registry asks nobody.
	Accounts []Account
}

// Registry is a distribution registry over plain HTTP on loopback, and its token
// service on another address. Close ends both.
type Registry struct {
	app     *handlers.App
	counter counter
	expirer expirer
	server  *server
	cancel  context.CancelFunc

	tokens      *tokenService // nil: asks nobody
	tokenServer *server
}

// StartRegistry starts a registry that serves until Stop or Close.
func StartRegistry(o RegistryOptions) (_ *Registry, err error) {
	r := &Registry{}
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
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
		if config.Auth, err = r.startTokens(o); err != nil {
			return nil, err
		}
	}
	r.app = handlers.NewApp(ctx, config)
	s, l, err := reserve(o.Address)
	if err != nil {
		return nil, err
	}
	r.server = s
	s.handler = r.counter.count(r.expirer.expire(r.app))
	return r, s.start(l)
}

func (r *Registry) startTokens(o RegistryOptions) (configuration.Auth, error) {
	s, l, err := reserve("")
	if err != nil {
		return nil, err
	}
	if r.tokens, err = newTokenService(s.host, o.Accounts); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	s.handler, r.tokenServer = r.tokens, s
	if err := s.start(l); err != nil {
		return nil, err
	}
	return r.tokens.configuration(o.Dir)
}

// Host is "address:port", also while it is stopped.
func (r *Registry) Host() string { return r.server.host }

// Stop closes the listener and every connection: the registry is down. Its token
// service is not.
func (r *Registry) Stop() error { return r.server.stop() }

// Start has a stopped registry serve where it did before.
func (r *Registry) Start() error { return r.server.start(nil) }

// StopTokens has the token service be down, StartTokens be up again.
func (r *Registry) StopTokens() error { return r.tokenServer.stop() }

// StartTokens ends what StopTokens began.
func (r *Registry) StartTokens() error { return r.tokenServer.start(nil) }

// Delivered is what it sent since the start or the last Reset.
func (r *Registry) Delivered() Delivered { return r.counter.delivered() }

// Reset sets the counters to zero.
func (r *Registry) Reset() { r.counter.reset() }

// Close ends the registry; its directory stays.
func (r *Registry) Close() error {
	var errs []error
	for _, s := range []*server{r.server, r.tokenServer} {
		if s != nil {
			errs = append(errs, s.stop())
		}
	}
	r.cancel()
	if r.app != nil {
		errs = append(errs, r.app.Shutdown())
	}
	return errors.Join(errs...)
}
