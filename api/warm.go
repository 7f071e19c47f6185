package api

import (
	"context"
	"iter"
	"net/http"
	"net/url"
	"time"

	"accel"
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
