package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// PushLayer uploads one blob. It is asked for by HEAD first, and mounted from
// another repository where l is Mountable (or a *remote.MountableLayer); only
// then is l's content opened. An error of the content is returned as it is, so a
// layer without content makes ErrNotFound of a failed mount.
func (c *Client) PushLayer(ctx context.Context, repository string, l v1.Layer) error {
	r, err := c.repository(repository)
	if err != nil {
		return err
	}
	return c.pushLayer(ctx, r, l)
}

func (c *Client) pushLayer(ctx context.Context, r repo, l v1.Layer) error {
	hash, err := l.Digest()
	if err != nil {
		return fmt.Errorf("digest of a layer for %s: %w", r, err)
	}
	size, err := l.Size()
	if err != nil {
		return fmt.Errorf("size of layer %s: %w", hash, err)
	}
	u := upload{c: c, r: r, layer: l, digest: hash.String(), source: source{open: l.Compressed, sizeBytes: size}}
	b := c.budget()
	for {
		err := u.once(ctx, b)
		var own sourceError
		if errors.As(err, &own) {
			return fmt.Errorf("content of layer %s: %w", hash, own.error)
		}
		if err == nil {
			return nil
		}
		if err := b.again(ctx, err); err != nil {
			return fmt.Errorf("push blob %s to %s: %w", hash, r, err)
		}
	}
}

// upload is one blob's way into a repository.
type upload struct {
	c      *Client
	r      repo
	layer  v1.Layer
	digest string
	source source
}

// once makes one attempt, which starts by looking: the attempt before may have
// succeeded with its answer lost.
func (u upload) once(ctx context.Context, b *budget) error {
	resp, err := u.c.once(ctx, u.r, request{
		method: http.MethodHead,
		url:    u.r.url("blobs/" + u.digest),
		scopes: u.r.push(),
		ok:     []int{http.StatusOK, http.StatusNotFound},
	})
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	location, mounted := u.mount(ctx)
	if mounted {
		return nil
	}
	if location == "" {
		if location, err = u.begin(ctx); err != nil {
			return err
		}
	}
	if location, err = u.stream(ctx, location); err != nil {
		return err
	}
	return u.commit(ctx, location, b)
}

// mount asks for the blob from each repository that may have it. Where the
// registry says no and begins an upload instead, that one's location is
// returned. No error matters: the content is uploaded then.
func (u upload) mount(ctx context.Context) (location string, mounted bool) {
	for _, from := range mountSources(u.layer) {
		other, err := u.c.repository(from)
		if err != nil || other.name != u.r.name || other.path == u.r.path {
			continue
		}
		u.abandon(ctx, location)
		location = ""
		resp, err := u.c.once(ctx, u.r, request{
			method: http.MethodPost,
			url:    u.r.url("blobs/uploads/") + "?" + url.Values{"mount": {u.digest}, "from": {other.path}}.Encode(),
			scopes: append(u.r.push(), other.pull()...),
			ok:     []int{http.StatusCreated, http.StatusAccepted},
		})
		if err != nil {
			continue
		}
		drain(resp)
		if resp.StatusCode == http.StatusCreated {
			return "", true
		}
		location, _ = u.next(resp)
	}
	return location, false
}

func mountSources(l v1.Layer) []string {
	switch m := l.(type) {
	case Mountable:
		return m.MountFrom()
	case *remote.MountableLayer:
		return []string{m.Reference.Context().Name()}
	default:
		return nil
	}
}

func (u upload) begin(ctx context.Context) (string, error) {
	resp, err := u.c.once(ctx, u.r, request{
		method: http.MethodPost,
		url:    u.r.url("blobs/uploads/"),
		scopes: u.r.push(),
		ok:     []int{http.StatusAccepted},
	})
	if err != nil {
		return "", err
	}
	drain(resp)
	return u.next(resp)
}

// stream sends the content and returns where to commit it.
func (u upload) stream(ctx context.Context, location string) (string, error) {
	resp, err := u.c.once(ctx, u.r, request{
		method: http.MethodPatch,
		url:    location,
		header: map[string]string{"Content-Type": "application/octet-stream"},
		scopes: u.r.push(),
		ok:     []int{http.StatusAccepted, http.StatusNoContent, http.StatusCreated},
		source: &u.source,
	})
	if err != nil {
		u.abandon(ctx, location)
		return "", err
	}
	drain(resp)
	return u.next(resp)
}

// commit closes the upload. It is tried by itself, so that a fault here does
// not cost another transfer.
func (u upload) commit(ctx context.Context, location string, b *budget) error {
	at, err := url.Parse(location)
	if err != nil {
		return err
	}
	query := at.Query()
	query.Set("digest", u.digest)
	at.RawQuery = query.Encode()
	for {
		resp, err := u.c.once(ctx, u.r, request{
			method: http.MethodPut,
			url:    at.String(),
			header: map[string]string{"Content-Type": "application/octet-stream"},
			scopes: u.r.push(),
			ok:     []int{http.StatusCreated, http.StatusNoContent, http.StatusOK},
		})
		if err == nil {
			drain(resp)
			return nil
		}
		if answer := (*responseError)(nil); errors.As(err, &answer) && answer.answer.StatusCode < 500 && answer.answer.StatusCode != http.StatusTooManyRequests {
			return err // what was sent is refused or forgotten: from the start
		}
		if err := b.again(ctx, err); err != nil {
			return spentError{err}
		}
	}
}

// abandon gives an upload back that will not be used. Registries clean up by
// themselves where it does not succeed.
func (u upload) abandon(ctx context.Context, location string) {
	if location == "" || ctx.Err() != nil {
		return
	}
	resp, err := u.c.once(ctx, u.r, request{method: http.MethodDelete, url: location, scopes: u.r.push(), ok: []int{http.StatusNoContent}})
	if err == nil {
		drain(resp)
	}
}

// next is where an answer says that the upload goes on.
func (u upload) next(resp *http.Response) (string, error) {
	said := resp.Header.Get("Location")
	if said == "" {
		return "", fmt.Errorf("%s %s: the answer names no upload location", resp.Request.Method, resp.Request.URL.Redacted())
	}
	at, err := resp.Request.URL.Parse(said)
	if err != nil {
		return "", fmt.Errorf("%s %s: upload location: %w", resp.Request.Method, resp.Request.URL.Redacted(), err)
	}
	// A registry behind a proxy may not know the scheme and the name that it is
	// reached by; they are ours to know.
	if n, err := normalise(at.Host, at.Scheme == "http"); err == nil && (u.c.names[n] == u.r.host || n == u.r.wire) || strings.EqualFold(at.Host, u.r.wire) {
		at.Scheme, at.Host = u.r.scheme, u.r.wire
	}
	if err := u.c.follow(u.r.host, at, 0); err != nil {
		return "", err
	}
	return at.String(), nil
}
