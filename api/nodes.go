package api

import (
	"context"
	"net/http"
	"net/url"

	"accel"
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
