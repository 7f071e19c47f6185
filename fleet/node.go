package fleet

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"time"
	"unicode/utf8"

	"accel"
)

// Bounds of what a node may tell of itself. Names are those of hosts; labels have at
// least the room that Kubernetes gives them.
const (
	maxLabels       = 128
	maxLabelBytes   = 512
	maxVersionBytes = 256
)

var nodeName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,252}$`)

// Status is a node as it told of itself, and whether it still does.
type Status struct {
	accel.Node
	Silent bool
}

func checkNode(n *accel.Node) error {
	if !nodeName.MatchString(n.Name) {
		return fmt.Errorf("%w: node name %.300q: want up to 253 letters, digits, dots, dashes or underscores", accel.ErrInvalid, n.Name)
	}
	if len(n.Labels) > maxLabels {
		return fmt.Errorf("%w: node %s has %d labels, more than %d", accel.ErrInvalid, n.Name, len(n.Labels), maxLabels)
	}
	for k, v := range n.Labels {
		if k == "" || len(k) > maxLabelBytes || len(v) > maxLabelBytes || !utf8.ValidString(k) || !utf8.ValidString(v) {
			return fmt.Errorf("%w: node %s: label %.80q: want UTF-8, and at most %d bytes each", accel.ErrInvalid, n.Name, k, maxLabelBytes)
		}
	}
	u := n.Cache
	if len(n.Version) > maxVersionBytes || !utf8.ValidString(n.Version) || n.DroppedPulls < 0 || u.Blobs < 0 || min(u.BudgetBytes, u.UsedBytes, u.PinnedBytes, u.FreeBytes) < 0 {
		return fmt.Errorf("%w: node %s: its version or figures make no sense", accel.ErrInvalid, n.Name)
	}
	return nil
}

// Seen takes a node's heartbeat in; SeenAt of n does not count. ErrInvalid for one that makes
// no sense, ErrConflict for a new one where the fleet is full.
//
// Most heartbeats change nothing but SeenAt and figures: these are written at most once
// in SilentAfter, so that a large fleet does not keep the disk busy.
func (f *Fleet) Seen(ctx context.Context, n accel.Node) (Status, error) {
	if err := checkNode(&n); err != nil {
		return Status{}, err
	}
	now := f.o.Now()
	n.SeenAt, n.StartedAt, n.Labels = stamp(now), stamp(n.StartedAt), maps.Clone(n.Labels)

	f.mu.Lock()
	was := f.nodes[n.Name]
	gone, full := "", false
	if was == nil && len(f.nodes) >= f.o.MaxNodes {
		gone, full = f.longestSilent(now)
	}
	if full {
		f.mu.Unlock()
		return Status{}, fmt.Errorf("%w: node %s is one more than the %d that the fleet may have", accel.ErrConflict, n.Name, f.o.MaxNodes)
	}
	m := &member{
		Node: n, heard: now, savedAt: now,
		owesCatchUp:  was == nil || was.owesCatchUp || f.silent(was, now) || !maps.Equal(was.Labels, n.Labels),
		owesTakeBack: was == nil || was.owesTakeBack || !was.StartedAt.Equal(n.StartedAt),
	}
	write := m.owesCatchUp || m.owesTakeBack || now.Sub(was.savedAt) >= f.o.SilentAfter
	if !write {
		m.savedAt = was.savedAt
	}
	// Known before the transaction, so that an image that becomes Ready meanwhile is
	// brought by one of the two.
	f.nodes[n.Name] = m
	delete(f.nodes, gone)
	f.mu.Unlock()
	if !write {
		return Status{Node: n}, nil
	}
	if err := f.settle(ctx, m, gone); err != nil {
		return Status{}, err
	}
	if was == nil {
		f.o.Log.Info("a node is new", "node", n.Name, "version", n.Version)
	}
	return Status{Node: n}, nil
}

// settle makes m durable and does what it owes; gone made room for it.
func (f *Fleet) settle(ctx context.Context, m *member, gone string) error {
	f.mu.Lock()
	catchUp, takeBack := m.owesCatchUp, m.owesTakeBack
	f.mu.Unlock()
	row, err := json.Marshal(m.Node)
	if err != nil {
		return err
	}
	err = f.update(ctx, func(c *change) error {
		if gone != "" {
			if err := c.forget(gone); err != nil {
				return err
			}
		}
		if err := c.bt.Bucket(bucketNodes).Put([]byte(m.Name), row); err != nil {
			return err
		}
		if takeBack {
			if err := c.takeBack(m.Name); err != nil {
				return err
			}
		}
		if catchUp {
			return c.catchUp(&m.Node)
		}
		return nil
	})
	if err == nil {
		f.mu.Lock()
		m.owesCatchUp, m.owesTakeBack = false, false
		f.mu.Unlock()
	}
	return err
}

// longestSilent is the node that makes room for a new one; full where none is silent.
// The caller holds mu.
func (f *Fleet) longestSilent(now time.Time) (name string, full bool) {
	var oldest *member
	for _, m := range f.nodes {
		if f.silent(m, now) && (oldest == nil || m.heard.Before(oldest.heard)) {
			oldest = m
		}
	}
	if oldest == nil {
		return "", true
	}
	return oldest.Name, false
}

// Nodes lists all nodes by name.
func (f *Fleet) Nodes() []Status {
	now := f.o.Now()
	f.mu.Lock()
	defer f.mu.Unlock()
	all := make([]Status, 0, len(f.nodes))
	for _, m := range f.nodes {
		all = append(all, Status{m.Node, f.silent(m, now)})
	}
	slices.SortFunc(all, func(a, b Status) int { return cmp.Compare(a.Name, b.Name) })
	return all
}

// Node returns one node; ErrNotFound for an unknown one.
func (f *Fleet) Node(name string) (Status, error) {
	now := f.o.Now()
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.nodes[name]
	if m == nil {
		return Status{}, fmt.Errorf("%w: no node %q has been heard of", accel.ErrNotFound, name)
	}
	return Status{m.Node, f.silent(m, now)}, nil
}

// listening are the nodes that are not silent, by name.
func (f *Fleet) listening() []accel.Node {
	known := f.Nodes()
	all := make([]accel.Node, 0, len(known))
	for _, s := range known {
		if !s.Silent {
			all = append(all, s.Node)
		}
	}
	return all
}

// takeBack makes Pending what a daemon that is gone was fetching.
func (c *change) takeBack(node string) error {
	all, err := c.oldest(bucketFetching, hash(node), c.o.MaxWarms)
	for i := range all {
		if err == nil {
			err = c.pend(&all[i], "")
		}
	}
	return err
}

// forget removes a node's row and all its warms.
func (c *change) forget(node string) error {
	all, err := c.oldest(bucketByNode, hash(node), c.o.MaxWarms)
	if err != nil {
		return err
	}
	for i := range all {
		if err := c.put(&all[i], nil); err != nil {
			return err
		}
	}
	return c.bt.Bucket(bucketNodes).Delete([]byte(node))
}
