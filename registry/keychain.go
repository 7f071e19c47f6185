package registry

import (
	"context"
	"fmt"
	"io"
	"strings"

	ecr "github.com/awslabs/amazon-ecr-credential-helper/ecr-login"
	acr "github.com/chrismellard/docker-credential-acr-env/pkg/credhelper"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/authn/github"
	"github.com/google/go-containerregistry/pkg/v1/google"
)

// DefaultKeychain asks, in this order: the keychains given first; docker's
// config.json with its credential helpers, or podman's auth.json (found as
// authn.DefaultKeychain documents); and what the environment offers for ghcr.io
// (GITHUB_TOKEN), Google, Amazon ECR and Azure. Each is asked anew for every
// look-up, so credentials that were renewed on disk or by the cloud are seen.
// Registries that nobody has credentials for are used anonymously.
func DefaultKeychain(first ...authn.Keychain) authn.Keychain {
	return authn.NewMultiKeychain(append(first,
		authn.DefaultKeychain,
		github.Keychain,
		googleKeychain{},
		suffixKeychain{authn.NewKeychainFromHelper(ecr.NewECRHelper(ecr.WithLogger(io.Discard))), []string{".amazonaws.com", ".amazonaws.com.cn", "public.ecr.aws"}},
		suffixKeychain{authn.NewKeychainFromHelper(acr.NewACRCredentialsHelper()), []string{".azurecr.io", ".azurecr.cn", ".azurecr.de", ".azurecr.us"}},
	)...)
}

// suffixKeychain keeps a cloud's helper from being asked about other hosts,
// which some answer only after a time-out of the cloud's metadata service.
type suffixKeychain struct {
	authn.Keychain
	suffixes []string
}

func (k suffixKeychain) Resolve(r authn.Resource) (authn.Authenticator, error) {
	if !hasSuffix(r.RegistryStr(), k.suffixes) {
		return authn.Anonymous, nil
	}
	return k.Keychain.Resolve(r)
}

// googleKeychain is google.Keychain without its sync.Once, which would keep the
// first answer, even "none", until the process ends.
type googleKeychain struct{}

func (k googleKeychain) Resolve(r authn.Resource) (authn.Authenticator, error) {
	return k.ResolveContext(context.Background(), r)
}

func (googleKeychain) ResolveContext(ctx context.Context, r authn.Resource) (authn.Authenticator, error) {
	if r.RegistryStr() != "gcr.io" && !hasSuffix(r.RegistryStr(), []string{".gcr.io", ".pkg.dev"}) {
		return authn.Anonymous, nil
	}
	auth, envErr := google.NewEnvAuthenticator(ctx)
	if envErr == nil && auth != authn.Anonymous {
		return auth, nil
	}
	auth, gcloudErr := google.NewGcloudAuthenticator(ctx)
	if gcloudErr == nil {
		return auth, nil
	}
	return authn.Anonymous, nil // public images need none; others will say so
}

func hasSuffix(host string, suffixes []string) bool {
	for _, s := range suffixes {
		if strings.HasSuffix(host, s) {
			return true
		}
	}
	return false
}

// staticKeychain has one answer.
type staticKeychain struct{ config authn.AuthConfig }

func (k staticKeychain) Resolve(authn.Resource) (authn.Authenticator, error) {
	return authn.FromConfig(k.config), nil
}

// resource is a repository as keychains see it.
type resource struct{ host, path string }

func (r resource) String() string      { return strings.TrimSuffix(r.host+"/"+r.path, "/") }
func (r resource) RegistryStr() string { return r.host }

// lookUp asks the keychain for r's credentials. Credential helpers are other
// programs and know no context; one that hangs is left behind until it ends.
func lookUp(ctx context.Context, keychain authn.Keychain, r resource) (*authn.AuthConfig, error) {
	if keychain == nil {
		return &authn.AuthConfig{}, nil
	}
	type answer struct {
		config *authn.AuthConfig
		err    error
	}
	answers := make(chan answer, 1)
	go func() {
		auth, err := authn.Resolve(ctx, keychain, r)
		if err != nil {
			answers <- answer{err: err}
			return
		}
		config, err := authn.Authorization(ctx, auth)
		answers <- answer{config, err}
	}()
	select {
	case a := <-answers:
		if a.err != nil {
			return nil, fmt.Errorf("look up the credentials for %s: %w", r, a.err)
		}
		return a.config, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("look up the credentials for %s: %w", r, context.Cause(ctx))
	}
}
