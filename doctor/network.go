package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"strings"
	"time"

	"accel"
	"accel/api"
	"accel/node"
	"accel/registry"
)

// daemon asks the node itself.
func (o *Options) daemon(ctx context.Context) []Finding {
	ctx, cancel := context.WithTimeout(ctx, o.Patience)
	defer cancel()
	s, err := o.Node.Status(ctx)
	switch {
	case errors.Is(err, node.ErrNotRunning):
		return []Finding{fail("node", err.Error(), "systemctl start accel-node, or accel node; its log says why it ended")}
	case errors.Is(err, fs.ErrPermission):
		return []Finding{warn("node", err.Error(), "run accel doctor as the node's user")}
	case err != nil:
		return []Finding{fail("node", err.Error(), "look at its log: journalctl -u accel-node")}
	}
	found := []Finding{ok("node", fmt.Sprintf("%s runs since %s (pid %d, version %s)", s.Name, s.StartedAt.Local().Format(time.DateTime), s.PID, s.Version))}
	found = append(found, o.mirrorAnswers(ctx))
	if s.ServerProblem != "" {
		found = append(found, warn("node", "it cannot reach the server: "+s.ServerProblem, "mend what the server finding says; pulls are kept until then"))
	}
	if s.DroppedPulls > 0 {
		found = append(found, warn("node", fmt.Sprintf("%d reports of pulls were dropped since it started, because too many waited for the server", s.DroppedPulls), "mend the way to the server; pulls.max_spooled bounds what is kept"))
	}
	if c := s.Cache; c.BudgetBytes > 0 && c.PinnedBytes > c.BudgetBytes*9/10 {
		found = append(found, warn("node", fmt.Sprintf("%s of the cache's %s are pinned: there is little room for others", gigabytes(c.PinnedBytes), gigabytes(c.BudgetBytes)), "accel cache unpin, or a larger cache.budget"))
	}
	return found
}

// mirrorAnswers asks the mirror as a client would.
func (o *Options) mirrorAnswers(ctx context.Context) Finding {
	at := o.Install.Mirror + "/v2/"
	res, err := o.get(ctx, at, "")
	if err != nil {
		return fail("node", "its mirror does not answer: "+err.Error(), "compare the key listen with the running node's; accel node install after a change")
	}
	res.Body.Close()
	if res.StatusCode != http.StatusOK && res.StatusCode != http.StatusUnauthorized {
		return fail("node", fmt.Sprintf("%s answers %s", at, res.Status), "another program may have this address; choose another with listen")
	}
	return ok("node", "the mirror answers on "+o.Install.Mirror)
}

func (o *Options) get(ctx context.Context, at, token string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at, nil)
	if err != nil {
		return nil, err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	return o.HTTP.Do(req)
}

// registries asks each registry to let the node in.
func (o *Options) registries(ctx context.Context) []Finding {
	if len(o.Registries) == 0 {
		return []Finding{fail("registry", "none is configured, so the mirror has nothing to offer", "name some in the configuration: registries: [{host: registry.example}]")}
	}
	found := make([]Finding, len(o.Registries))
	done := make(chan struct{})
	for i, r := range o.Registries {
		go func() {
			found[i] = o.registry(ctx, r)
			done <- struct{}{}
		}()
	}
	for range o.Registries {
		<-done
	}
	return found
}

func (o *Options) registry(ctx context.Context, r registry.Host) Finding {
	ctx, cancel := context.WithTimeout(ctx, o.Patience)
	defer cancel()
	has, err := o.Client.HasCredentials(ctx, r.Name)
	if err != nil {
		return fail("registry", err.Error(), "mend the credential helper, or give credentials with password_file or token_file")
	}
	err = o.Client.Ping(ctx, r.Name, "")
	switch {
	case err == nil && has:
		return ok("registry", r.Name+" lets this machine in, with its own credentials")
	case err == nil:
		return ok("registry", r.Name+" answers without credentials")
	case errors.Is(err, accel.ErrUnauthenticated) && !has, errors.Is(err, accel.ErrForbidden) && !has:
		return warn("registry", r.Name+" asks for credentials, and this machine has none: clients have to bring theirs, and images cannot be brought ahead",
			"give some with username and password_file, or docker login; nothing to do where pods have imagePullSecrets")
	case errors.Is(err, accel.ErrUnauthenticated), errors.Is(err, accel.ErrForbidden):
		return fail("registry", r.Name+" refuses this machine's credentials: "+err.Error(), "renew them")
	default:
		mend := "check name, network and proxy"
		if !r.PlainHTTP && strings.Contains(err.Error(), "HTTP response to HTTPS client") {
			mend = "it speaks plain HTTP; where that is meant, set plain_http: true"
		} else if strings.Contains(err.Error(), "x509") {
			mend = "give its CA with ca_file"
		}
		return fail("registry", fmt.Sprintf("%s does not answer as a registry: %v", r.Name, err), mend+"; what is cached is served meanwhile")
	}
}

// server asks the server for the node.
func (o *Options) server(ctx context.Context) []Finding {
	if o.Server == "" {
		return []Finding{warn("server", "none is configured: pulls are kept, but reported to nobody", "set server.url")}
	}
	ctx, cancel := context.WithTimeout(ctx, o.Patience)
	defer cancel()
	client, err := api.NewClient(o.Server, api.WithToken(o.Token), api.WithHTTPClient(o.HTTP))
	if err != nil {
		return []Finding{fail("server", err.Error(), "mend server.url")}
	}
	n, err := client.Node(ctx, o.NodeName)
	switch {
	case err == nil && n.Silent:
		return []Finding{warn("server", fmt.Sprintf("%s has not heard from %s since %s", o.Server, o.NodeName, n.SeenAt.Local().Format(time.DateTime)), "start the node; it says in its log what keeps it from the server")}
	case err == nil:
		return []Finding{ok("server", fmt.Sprintf("%s heard from %s at %s", o.Server, o.NodeName, n.SeenAt.Local().Format(time.DateTime)))}
	case errors.Is(err, accel.ErrNotFound):
		return []Finding{warn("server", fmt.Sprintf("%s has never heard from a node %q", o.Server, o.NodeName), "start the node; its token needs scope node, for this name")}
	case errors.Is(err, accel.ErrUnauthenticated), errors.Is(err, accel.ErrForbidden):
		return []Finding{fail("server", fmt.Sprintf("%s refuses the token: %v", o.Server, err), "put a token of scope node, for this name, into server.token_file; pulls are kept meanwhile")}
	default:
		return []Finding{fail("server", err.Error(), "check server.url, network and proxy; pulls are kept meanwhile")}
	}
}

// Clocks that differ by more than the first make times in reports hard to read; by more than the
// second, registries' tokens and certificates fail.
const (
	skewSeen  = 10 * time.Second
	skewFatal = 5 * time.Minute
)

// clock compares this machine's with the server's, or else a registry's.
func (o *Options) clock(ctx context.Context) []Finding {
	var asked []string
	if o.Server != "" {
		asked = append(asked, strings.TrimSuffix(o.Server, "/")+"/healthz")
	}
	for _, r := range o.Registries {
		scheme, host := "https", r.Name
		if r.PlainHTTP {
			scheme = "http"
		}
		if host == "docker.io" {
			host = "registry-1.docker.io"
		}
		asked = append(asked, scheme+"://"+host+"/v2/")
	}
	for _, at := range asked {
		skew, known := o.skew(ctx, at)
		if !known {
			continue
		}
		host := at
		if u, err := url.Parse(at); err == nil {
			host = u.Host
		}
		detail := fmt.Sprintf("%s from that of %s", skew.Round(time.Second), host)
		const mend = "let a time service set it: timedatectl set-ntp true"
		switch size := skew.Abs(); {
		case size > skewFatal:
			return []Finding{fail("clock", detail+": tokens and certificates fail", mend)}
		case size > skewSeen:
			return []Finding{warn("clock", detail, mend)}
		default:
			return []Finding{ok("clock", "agrees with that of "+host)}
		}
	}
	return []Finding{warn("clock", "nobody could be asked for the time", "mend the way to the server and the registries first")}
}

// skew is how far this machine's clock is ahead of another's, by the Date of an answer.
func (o *Options) skew(ctx context.Context, at string) (skew time.Duration, known bool) {
	ctx, cancel := context.WithTimeout(ctx, o.Patience)
	defer cancel()
	begin := time.Now()
	res, err := o.get(ctx, at, "")
	if err != nil {
		return 0, false
	}
	res.Body.Close()
	date, err := http.ParseTime(res.Header.Get("Date"))
	if err != nil {
		return 0, false
	}
	// Date has whole seconds, cut off; what the question took goes both ways.
	theirs := date.Add(time.Second/2 + time.Since(begin)/2)
	return o.Now().Sub(theirs), true
}
