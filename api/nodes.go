package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"accel"
	"accel/fleet"

	"github.com/danielgtaylor/huma/v2"
)

// NodeStatus is a node as it told of itself, and whether it still does.
type NodeStatus struct {
	accel.Node
	Silent bool `json:"silent" doc:"not heard of for a while, so it is told nothing and its figures are old"`
}

// NodeList is all nodes, by name.
type NodeList struct {
	Nodes []NodeStatus `json:"nodes"`
}

type nodeInput struct {
	Authorization string `header:"Authorization" hidden:"true"`
	Name          string `path:"name" doc:"name of a node" maxLength:"253"`
}

type heartbeatInput struct {
	Authorization string `header:"Authorization" hidden:"true"`
	Name          string `path:"name" doc:"name of the node, as in the body" maxLength:"253"`
	Body          accel.Node
}

type nodeOutput struct {
	Body NodeStatus
}

type nodesOutput struct {
	Body NodeList
}

type nextInput struct {
	Authorization string `header:"Authorization" hidden:"true"`
	Name          string `path:"name" doc:"name of a node" maxLength:"253"`
	Wait          string `query:"wait" doc:"how long to wait while there is nothing to fetch, at most 10m; default: not at all" maxLength:"20" example:"50s"`
}

// maxHeartbeatBytes bounds a node's account of itself, nearly all of it labels.
const maxHeartbeatBytes = 256 << 10

func (s *server) nodeRoutes(routes huma.API) {
	tags := []string{"Nodes"}
	huma.Register(routes, huma.Operation{
		OperationID: "report-node", Method: http.MethodPut, Path: "/v1/nodes/{name}", Tags: tags, Security: secured(ScopeNode),
		Summary:     "Tell that a node lives, and what it is",
		Description: "A node's daemon sends this every 30 seconds, with a token of scope node that speaks for it. seenAt is the server's and does not count.",
		// Nodes and server are upgraded one after the other: what one of them does not
		// know is passed over. The fleet judges the rest.
		SkipValidateBody: true, MaxBodyBytes: min(maxHeartbeatBytes, s.MaxBodyBytes), Errors: []int{400, 401, 403, 409},
	}, func(ctx context.Context, in *heartbeatInput) (*nodeOutput, error) {
		if err := s.speaks(in.Authorization, in.Name); err != nil {
			return nil, s.problem(err)
		}
		if in.Body.Name != in.Name {
			return nil, s.problem(fmt.Errorf("%w: the path names node %.253q, the body %.253q", accel.ErrInvalid, in.Name, in.Body.Name))
		}
		return s.node(s.Fleet.Seen(ctx, in.Body))
	})
	huma.Register(routes, huma.Operation{
		OperationID: "list-nodes", Method: http.MethodGet, Path: "/v1/nodes", Tags: tags, Security: secured(ScopeRead),
		Summary: "List nodes by name", Errors: []int{401, 403},
	}, func(context.Context, *struct{}) (*nodesOutput, error) {
		all := s.Fleet.Nodes()
		out := &nodesOutput{Body: NodeList{Nodes: make([]NodeStatus, 0, len(all))}}
		for _, n := range all {
			out.Body.Nodes = append(out.Body.Nodes, NodeStatus(n))
		}
		return out, nil
	})
	huma.Register(routes, huma.Operation{
		OperationID: "get-node", Method: http.MethodGet, Path: "/v1/nodes/{name}", Tags: tags, Security: secured(ScopeRead, ScopeNode),
		Summary: "Get a node", Errors: []int{401, 403, 404},
	}, func(_ context.Context, in *nodeInput) (*nodeOutput, error) {
		if err := s.speaks(in.Authorization, in.Name); err != nil {
			return nil, s.problem(err)
		}
		return s.node(s.Fleet.Node(in.Name))
	})
	huma.Register(routes, huma.Operation{
		OperationID: "next-warms", Method: http.MethodGet, Path: "/v1/nodes/{name}/warms", Tags: tags, Security: secured(ScopeRead, ScopeNode),
		Summary:     "Get what a node is to fetch, and wait for it",
		Description: "The images that the node has not taken up, the longest waiting first. With wait an empty answer is held until there is one. An image is taken up by reporting it as Fetching; until then it is given out again.",
		Errors:      []int{400, 401, 403},
	}, func(ctx context.Context, in *nextInput) (*warmsOutput, error) {
		if err := s.speaks(in.Authorization, in.Name); err != nil {
			return nil, s.problem(err)
		}
		warms, err := s.nextWarms(ctx, in)
		if err != nil {
			return nil, s.problem(err)
		}
		return warmsOf(warms, ""), nil
	})
}

func (s *server) node(n fleet.Status, err error) (*nodeOutput, error) {
	if err != nil {
		return nil, s.problem(err)
	}
	return &nodeOutput{Body: NodeStatus(n)}, nil
}

func (s *server) nextWarms(ctx context.Context, in *nextInput) ([]accel.Warm, error) {
	var wait time.Duration
	if in.Wait != "" {
		var err error
		if wait, err = time.ParseDuration(in.Wait); err != nil || wait < 0 || wait > maxWait {
			return nil, fmt.Errorf("%w: wait %q: want a duration such as 50s, up to %s", accel.ErrInvalid, in.Wait, maxWait)
		}
	}
	patience, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.Draining, cancel)()
	warms, err := s.Fleet.Next(patience, in.Name, wait)
	if errors.Is(err, context.Canceled) {
		return nil, nil // the server stops, or the node is gone
	}
	return warms, err
}

// Heartbeat tells the server that a node lives, and what it is. The first one of
// a daemon makes Pending again what the one before it was fetching.
func (c *Client) Heartbeat(ctx context.Context, n accel.Node) error {
	var known NodeStatus
	return c.do(ctx, http.MethodPut, "/v1/nodes/"+url.PathEscape(n.Name), nil, n, &known)
}

// Nodes lists all nodes by name.
func (c *Client) Nodes(ctx context.Context) ([]NodeStatus, error) {
	var list NodeList
	err := c.do(ctx, http.MethodGet, "/v1/nodes", nil, nil, &list)
	return list.Nodes, err
}

// Node gets one node; accel.ErrNotFound for an unknown one.
func (c *Client) Node(ctx context.Context, name string) (n NodeStatus, err error) {
	return n, c.do(ctx, http.MethodGet, "/v1/nodes/"+url.PathEscape(name), nil, nil, &n)
}
