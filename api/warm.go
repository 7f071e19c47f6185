package api

import (
	"context"
	"errors"
	"iter"
	"net/http"
	"net/url"
	"slices"
	"time"

	"accel"
	"accel/fleet"

	"github.com/danielgtaylor/huma/v2"
)

// WarmRequest asks for an image to be brought to nodes.
type WarmRequest struct {
	Image string   `json:"image" doc:"reference by tag or digest" minLength:"1" maxLength:"1024" example:"registry.example/team/app:v1"`
	Nodes []string `json:"nodes,omitempty" doc:"names of nodes; absent or empty: all that are not silent" maxItems:"10000"`
}

// WarmList is images that nodes are to have.
type WarmList struct {
	Warms []accel.Warm `json:"warms"`
	Next  string       `json:"next,omitempty" doc:"cursor of the next page; absent on the last"`
}

type warmInput struct {
	Body WarmRequest
}

type warmsOutput struct {
	Body WarmList
}

type warmOutput struct {
	Body accel.Warm
}

type reportInput struct {
	Authorization string `header:"Authorization" hidden:"true"`
	ID            string `path:"id" doc:"id of a warm, as in the body" maxLength:"100"`
	Body          accel.Warm
}

type warmsInput struct {
	Image  string `query:"image" doc:"only this image, by tag or digest; a tag means the image that has it now too" maxLength:"1024"`
	Node   string `query:"node" doc:"only of this node" maxLength:"253"`
	Cursor string `query:"cursor" doc:"next of the page before" maxLength:"200"`
	Limit  int    `query:"limit" minimum:"1" maximum:"500" default:"50" doc:"warms per page"`
}

func warmsOf(warms []accel.Warm, next string) *warmsOutput {
	if warms == nil {
		warms = []accel.Warm{}
	}
	return &warmsOutput{Body: WarmList{Warms: warms, Next: next}}
}

func (s *server) warmRoutes(routes huma.API) {
	tags := []string{"Warm"}
	huma.Register(routes, huma.Operation{
		OperationID: "warm-image", Method: http.MethodPost, Path: "/v1/warms", Tags: tags, Security: secured(ScopeWrite),
		Summary:       "Bring an image to nodes ahead of its first start",
		Description:   "Answers with a warm for each node. Asking for what is Pending or Fetching changes nothing; what is Warm or Failed is looked at again by the node.",
		DefaultStatus: http.StatusAccepted, MaxBodyBytes: s.MaxBodyBytes, Errors: []int{400, 401, 403, 404, 409},
	}, func(ctx context.Context, in *warmInput) (*warmsOutput, error) {
		ref, err := s.anyReference(in.Body.Image)
		if err != nil {
			return nil, s.problem(err)
		}
		warms, err := s.Fleet.Want(ctx, ref, in.Body.Nodes)
		if err != nil {
			return nil, s.problem(err)
		}
		return warmsOf(warms, ""), nil
	})
	huma.Register(routes, huma.Operation{
		OperationID: "list-warms", Method: http.MethodGet, Path: "/v1/warms", Tags: tags, Security: secured(ScopeRead),
		Summary: "List what nodes are to have, newest first", Errors: []int{400, 401, 403},
	}, s.listWarms)
	huma.Register(routes, huma.Operation{
		OperationID: "report-warm", Method: http.MethodPut, Path: "/v1/warms/{id}", Tags: tags, Security: secured(ScopeNode),
		Summary:     "Tell how far a node has come with an image",
		Description: "State (Fetching, Warm or Failed), digest, reason and bytes count, and node says whose it is. 404 and 409 mean that nobody wants it any more.",
		// As with heartbeats: what is not known is passed over, and the fleet judges.
		SkipValidateBody: true, MaxBodyBytes: s.MaxBodyBytes, Errors: []int{400, 401, 403, 404, 409},
	}, func(ctx context.Context, in *reportInput) (*warmOutput, error) {
		if err := s.speaks(in.Authorization, in.Body.Node); err != nil {
			return nil, s.problem(err)
		}
		in.Body.ID = in.ID
		w, err := s.Fleet.Report(ctx, in.Body)
		if err != nil {
			return nil, s.problem(err)
		}
		return &warmOutput{Body: w}, nil
	})
}

func (s *server) listWarms(ctx context.Context, in *warmsInput) (*warmsOutput, error) {
	sel := fleet.Filter{Node: in.Node, Cursor: in.Cursor, Limit: in.Limit}
	if in.Image != "" {
		ref, err := s.anyReference(in.Image)
		if err != nil {
			return nil, s.problem(err)
		}
		if sel.Images, err = s.forms(ctx, ref); err != nil {
			return nil, s.problem(err)
		}
	}
	page, err := s.Fleet.Warms(ctx, sel)
	if err != nil {
		return nil, s.problem(err)
	}
	return warmsOf(page.Warms, page.Next), nil
}

// anyReference parses an image reference. Its host may be one that only nodes know,
// which have an allowlist of their own; one that the server knows gets its canonical form.
func (s *server) anyReference(image string) (accel.Reference, error) {
	ref, err := accel.ParseReference(image)
	if err != nil {
		return ref, err
	}
	if host, err := s.Canonical(ref.Registry); err == nil {
		ref.Registry = host
	}
	return ref, nil
}

// forms are what an image is brought as: as it was named, and where it has a record, its
// source and its target by digest, as the rules ask for them.
func (s *server) forms(ctx context.Context, ref accel.Reference) ([]accel.Reference, error) {
	all := []accel.Reference{ref}
	st, err := s.Tracker.Find(ctx, ref)
	if errors.Is(err, accel.ErrNotFound) {
		return all, nil
	}
	if err != nil {
		return nil, err
	}
	for _, name := range []string{st.Image(), accel.Record{Repository: st.Target.Repository, Digest: st.Target.Digest}.Image()} {
		if form, err := accel.ParseReference(name); err == nil && form.Digest != "" {
			all = append(all, form)
		}
	}
	return all, nil
}

// Warm asks for an image to be brought to the named nodes, without any: to all
// that are not silent. It answers with one Warm for each node, also for one that
// is there already.
func (c *Client) Warm(ctx context.Context, image string, nodes ...string) ([]accel.Warm, error) {
	var list WarmList
	err := c.do(ctx, http.MethodPost, "/v1/warms", nil, WarmRequest{Image: image, Nodes: nodes}, &list)
	return list.Warms, err
}

// NextWarms gets the images that a node is to fetch and has not taken up, the
// longest waiting first. Where there are none, the server holds the answer until there
// are, but no longer than wait; then it is empty. An image is taken up by
// ReportWarm with WarmFetching; until then it is given out again.
func (c *Client) NextWarms(ctx context.Context, node string, wait time.Duration) ([]accel.Warm, error) {
	q := url.Values{}
	if wait > 0 {
		q.Set("wait", wait.String())
	}
	var list WarmList
	err := c.do(ctx, http.MethodGet, "/v1/nodes/"+url.PathEscape(node)+"/warms", q, nil, &list)
	return list.Warms, err
}

// ReportWarm tells how far a node has come: State, Digest, Reason and the bytes of w
// count. While it is fetching, a node reports at least every minute. accel.ErrNotFound
// for what nobody wants any more; the node drops it then.
func (c *Client) ReportWarm(ctx context.Context, w accel.Warm) error {
	var now accel.Warm
	return c.do(ctx, http.MethodPut, "/v1/warms/"+url.PathEscape(w.ID), nil, w, &now)
}

// WarmOptions select warms; zero fields select all.
type WarmOptions struct {
	Image string
	Node  string
}

// Warms iterates over warms, newest first, page by page. It ends at the first
// error.
func (c *Client) Warms(ctx context.Context, o WarmOptions) iter.Seq2[accel.Warm, error] {
	return func(yield func(accel.Warm, error) bool) {
		q := url.Values{"limit": {"500"}}
		if o.Image != "" {
			q.Set("image", o.Image)
		}
		if o.Node != "" {
			q.Set("node", o.Node)
		}
		for {
			var page WarmList
			if err := c.do(ctx, http.MethodGet, "/v1/warms", q, nil, &page); err != nil {
				yield(accel.Warm{}, err)
				return
			}
			for _, w := range page.Warms {
				if !yield(w, nil) {
					return
				}
			}
			if page.Next == "" {
				return
			}
			q.Set("cursor", page.Next)
		}
	}
}

// warmPause is between two looks at how far nodes have come.
const warmPause = time.Second

// WaitWarms looks at warms of an image until each is Warm or Failed, for as long as timeout
// (zero: as ctx lasts). A server that restarts is asked again. When the time is up, the error
// is context.DeadlineExceeded and the warms as they were last seen.
func (c *Client) WaitWarms(ctx context.Context, image string, warms []accel.Warm, timeout time.Duration) ([]accel.Warm, error) {
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	last := slices.Clone(warms)
	for {
		now, err := c.lookAt(ctx, image, last)
		var away unreachableError
		switch {
		case err == nil:
			last = now
			if !slices.ContainsFunc(last, func(w accel.Warm) bool { return !w.Ended() }) {
				return last, nil
			}
		case !errors.As(err, &away):
			return last, err
		}
		sleep(ctx, warmPause)
		if ctx.Err() != nil {
			return last, errors.Join(ctx.Err(), err)
		}
	}
}

// lookAt gets the warms as they are now; one that the server dropped has Failed.
func (c *Client) lookAt(ctx context.Context, image string, warms []accel.Warm) ([]accel.Warm, error) {
	now := slices.Clone(warms)
	at := make(map[string]int, len(now))
	for i, w := range now {
		if !w.Ended() {
			at[w.ID] = i
		}
	}
	for w, err := range c.Warms(ctx, WarmOptions{Image: image}) {
		if err != nil {
			return nil, err
		}
		if i, ok := at[w.ID]; ok {
			now[i] = w
			delete(at, w.ID)
		}
		if len(at) == 0 {
			break
		}
	}
	for _, i := range at {
		now[i].State, now[i].Reason = accel.WarmFailed, "the server has dropped it: its node was forgotten, or other images took its place"
	}
	return now, nil
}
