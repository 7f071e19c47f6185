package node

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"time"

	"accel"
	"accel/api"
	"accel/cache"
	"accel/lazy"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Status is a live node.
type Status struct {
	accel.Node
	PID int `json:"pid"`
	// SpooledPulls wait for the server.
	SpooledPulls int `json:"spooledPulls"`
	// Server is the server's URL; empty without one. ServerProblem is why it cannot be
	// reached just now.
	Server        string `json:"server,omitempty"`
	ServerProblem string `json:"serverProblem,omitempty"`
	// HolderDiedAt is when the process that serves lazy mounts died last, since the daemon started.
	HolderDiedAt *time.Time `json:"holderDiedAt,omitempty"`
}

// CheckProgress is one line of the answer to a check: how far it is, or with Report or Error
// the last one.
type CheckProgress struct {
	DoneBytes  int64         `json:"doneBytes"`
	TotalBytes int64         `json:"totalBytes"`
	Report     *cache.Report `json:"report,omitempty"`
	Error      string        `json:"error,omitempty"`
}

type body[T any] struct{ Body T }

// What names content on a live node.
type What struct {
	What string `json:"what" minLength:"1" maxLength:"1024" doc:"an image (HOST/PATH:TAG or HOST/PATH@DIGEST) or a digest"`
}

// admin is the API on the node's unix socket, whose file mode says who may use it. When
// ctx is done, what takes long is ended.
func (n *Node) admin(ctx context.Context) http.Handler {
	mux := http.NewServeMux()
	conf := huma.DefaultConfig("accel node", n.o.Version)
	conf.Info.Description = "What people and `accel` ask a node on its own machine."
	conf.DocsPath, conf.CreateHooks = "", nil
	routes := humago.New(mux, conf)
	c := &Contents{store: n.store, canonical: n.o.Registry.Canonical}
	if n.mounts != nil {
		c.mounted, c.layersOf, c.forget = n.mounts.lazy.ManifestOf, n.mounts.lazy.LayersOf, n.mounts.lazy.Forget
	}

	get(routes, "node", "/v1/node", "What the node is and how it does", func(context.Context, *struct{}) (Status, error) { return n.status(), nil })
	get(routes, "mounts", "/v1/mounts", "Images of which layers are lazily mounted", func(context.Context, *struct{}) ([]MountedImage, error) { return n.mounted(), nil })
	get(routes, "cache-usage", "/v1/cache", "How full the cache is, and what is pinned", func(ctx context.Context, _ *struct{}) (Usage, error) { return c.Usage(ctx) })
	get(routes, "cache-blobs", "/v1/cache/blobs", "All blobs and layers, those used last first", func(ctx context.Context, _ *struct{}) ([]Blob, error) { return c.List(ctx) })
	get(routes, "cache-stat", "/v1/cache/content", "What there is of an image or a digest", func(ctx context.Context, in *struct {
		What string `query:"what" required:"true" maxLength:"1024"`
	}) (Content, error) {
		return c.Stat(ctx, in.What)
	})
	post(routes, "cache-gc", "/v1/cache/gc", "Evict down to the budget, and remove what is of no use", func(ctx context.Context, _ *struct{}) (cache.Report, error) { return c.GC(ctx) })
	post(routes, "cache-pin", "/v1/cache/pin", "Keep an image or a digest from being evicted; what is missing of an image is fetched first", func(ctx context.Context, in *body[What]) (Content, error) {
		return n.pin(ctx, c, in.Body.What)
	})
	post(routes, "cache-unpin", "/v1/cache/unpin", "Release what was pinned by this name", func(ctx context.Context, in *body[What]) (struct{}, error) {
		return struct{}{}, c.Unpin(ctx, in.Body.What)
	})
	post(routes, "cache-remove", "/v1/cache/remove", "Drop what there is of an image or a digest: nothing where some of it is pinned, else all but what is in use", func(ctx context.Context, in *body[What]) (cache.Report, error) {
		return c.Remove(ctx, in.Body.What)
	})
	get(routes, "starts", "/v1/starts", "Starts of containers whose reads were recorded, the newest first", func(context.Context, *struct{}) ([]lazy.Start, error) { return n.starts(), nil })
	post(routes, "start-answered", "/v1/starts/answered", "The program in a container answers, or failed: its start is over", func(_ context.Context, in *body[Answered]) (struct{}, error) {
		return struct{}{}, n.answered(in.Body)
	})
	post(routes, "record-next", "/v1/starts/wanted", "Record the next start of an image, whatever there is of it, by a pull of the next 10 minutes", func(_ context.Context, in *body[RecordNext]) (struct{}, error) {
		return struct{}{}, n.recordNext(in.Body)
	})
	post(routes, "fetch-ahead", "/v1/starts/ahead", "Whether anything is fetched ahead of an image's starts, by pulls of the next 10 minutes", func(_ context.Context, in *body[FetchAhead]) (struct{}, error) {
		return struct{}{}, n.fetchAhead(in.Body)
	})
	huma.Register(routes, huma.Operation{
		OperationID: "cache-check", Method: http.MethodPost, Path: "/v1/cache/check",
		Summary: "Read every complete blob and every layer again, and drop what is damaged", Description: "The answer is a JSON object a line: how far it is, and last the report.",
	}, func(context.Context, *struct{}) (*huma.StreamResponse, error) {
		return &huma.StreamResponse{Body: func(out huma.Context) { check(ctx, out, c) }}, nil
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.Handle("GET /metrics", promhttp.HandlerFor(n.o.Metrics, promhttp.HandlerOpts{}))
	return endWith(ctx, mux)
}

// endWith cancels requests that run when ctx is done.
func endWith(ctx context.Context, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		defer context.AfterFunc(ctx, cancel)()
		h.ServeHTTP(w, r.WithContext(rctx))
	})
}

func get[I, O any](routes huma.API, id, path, summary string, do func(context.Context, *I) (O, error)) {
	register(routes, http.MethodGet, id, path, summary, do)
}

func post[I, O any](routes huma.API, id, path, summary string, do func(context.Context, *I) (O, error)) {
	register(routes, http.MethodPost, id, path, summary, do)
}

func register[I, O any](routes huma.API, method, id, path, summary string, do func(context.Context, *I) (O, error)) {
	huma.Register(routes, huma.Operation{OperationID: id, Method: method, Path: path, Summary: summary, DefaultStatus: http.StatusOK, Errors: []int{400, 404, 409}},
		func(ctx context.Context, in *I) (*body[O], error) {
			out, err := do(ctx, in)
			if err != nil {
				return nil, problem(err)
			}
			return &body[O]{out}, nil
		})
}

// problem is err as an answer. Whoever may use the socket may read what broke.
func problem(err error) huma.StatusError {
	if p := api.Problem(err); p != nil {
		return p
	}
	return &huma.ErrorModel{Title: http.StatusText(http.StatusInternalServerError), Status: http.StatusInternalServerError, Detail: err.Error()}
}

func (n *Node) status() Status {
	s := Status{Node: n.self(), PID: os.Getpid(), SpooledPulls: n.spool.Len()}
	if n.server != nil {
		s.Server = n.server.Server()
		if err := n.server.problem(); err != nil {
			s.ServerProblem = err.Error()
		}
	}
	if n.mounts != nil {
		if at := n.mounts.lazy.HolderDiedAt(); !at.IsZero() {
			s.HolderDiedAt = &at
		}
	}
	return s
}

// pin brings what is missing of an image before it pins it.
func (n *Node) pin(ctx context.Context, c *Contents, what string) (Content, error) {
	if _, err := digest.Parse(what); err != nil {
		if _, err := n.fetch(ctx, what, nil); err != nil {
			return Content{}, fmt.Errorf("bring %s before it is pinned: %w", what, err)
		}
	}
	return c.Pin(ctx, what)
}

// progressTime is how often a check tells how far it is.
const progressTime = time.Second

// check streams a check's progress and its report. It ends with the daemon or when nobody
// reads any more.
func check(daemon context.Context, out huma.Context, c *Contents) {
	ctx, cancel := context.WithCancel(out.Context())
	defer cancel()
	defer context.AfterFunc(daemon, cancel)()
	out.SetHeader("Content-Type", "application/x-ndjson")
	w := out.BodyWriter()
	enc := json.NewEncoder(w)
	say := func(p CheckProgress) {
		if err := enc.Encode(p); err != nil {
			cancel()
			return
		}
		if f, ok := w.(http.Flusher); ok {
			f.Flush()
		}
	}
	var last CheckProgress
	var told time.Time
	report, err := c.Check(ctx, func(done, total int64) {
		last.DoneBytes, last.TotalBytes = done, total
		if now := time.Now(); now.Sub(told) >= progressTime {
			told = now
			say(last)
		}
	})
	if last.Report = &report; err != nil {
		last.Error = err.Error()
	}
	say(last)
}
