package fleet

import (
	"context"
	"fmt"
	"slices"

	"accel"
)

// occasion is why an image is wanted; it decides what becomes of one that is finished.
type occasion int

const (
	byPerson  occasion = iota // looked at again, whatever it was
	byReady                   // tried again where it Failed
	byCatchUp                 // left as it is
)

// Want asks for an image to be brought to the named nodes, without any: to all that are not
// silent. It returns one Warm for each, by node name. A wish for what is Pending or
// Fetching changes nothing. ErrNotFound for an unknown node, and where there is none at
// all; ErrConflict where nothing more can be kept. With both a tag and a digest, the digest
// counts, and the node is to know the tag too.
func (f *Fleet) Want(ctx context.Context, ref accel.Reference, nodes []string) ([]accel.Warm, error) {
	im := image{Name: name(ref.Name(), ref.Tag, ref.Digest), Repository: ref.Name(), Digest: ref.Digest, Tag: ref.Tag}
	var all []accel.Warm
	err := f.update(ctx, func(c *change) error {
		all = nil
		names, err := c.addressed(nodes)
		if err != nil {
			return err
		}
		for _, name := range names {
			w, err := c.want(name, wish{im, ""}, byPerson)
			if err != nil {
				return err
			}
			all = append(all, w)
		}
		return nil
	})
	return all, err
}

// addressed are the nodes that a wish is for.
func (c *change) addressed(nodes []string) ([]string, error) {
	if len(nodes) == 0 {
		for _, n := range c.listening() {
			nodes = append(nodes, n.Name)
		}
		if len(nodes) == 0 {
			return nil, fmt.Errorf("%w: there is no node, or all are silent", accel.ErrNotFound)
		}
		return nodes, nil
	}
	for _, name := range nodes {
		if _, err := c.Node(name); err != nil {
			return nil, err
		}
	}
	return slices.Compact(slices.Sorted(slices.Values(nodes))), nil
}

// want makes or renews one Warm. A rule's wish that there is no room for is counted and
// returns the zero Warm.
func (c *change) want(node string, w wish, why occasion) (accel.Warm, error) {
	id := warmID(node, w.Name)
	was, there, err := c.warm(id)
	if err != nil {
		return accel.Warm{}, err
	}
	now := accel.Warm{ID: id, Node: node, Image: w.Name, Digest: w.Digest, Rule: w.rule, State: accel.WarmPending, CreatedAt: c.now, UpdatedAt: c.now}
	if there {
		again := (why == byPerson && was.State == accel.WarmDone) || (why != byCatchUp && was.State == accel.WarmFailed)
		if !again {
			return was, nil
		}
		return c.pending(&was, now)
	}
	room, err := c.makeRoom()
	if err != nil {
		return accel.Warm{}, err
	}
	if !room && why == byPerson {
		return accel.Warm{}, fmt.Errorf("%w: %d images wait for nodes, more cannot be kept; see accel warm status", accel.ErrConflict, c.o.MaxWarms)
	}
	if !room {
		c.refused++
		return accel.Warm{}, nil
	}
	c.made++
	return c.pending(nil, now)
}

// pending stores a Warm that the node is to take up; the longest waiting one gives way
// where there are too many.
func (c *change) pending(was *accel.Warm, w accel.Warm) (accel.Warm, error) {
	if c.atLeast(bucketPending, hash(w.Node), c.o.MaxPending) {
		first, err := c.oldest(bucketPending, hash(w.Node), 1)
		if err != nil {
			return w, err
		}
		failed := first[0]
		failed.State, failed.UpdatedAt = accel.WarmFailed, c.now
		failed.Reason = fmt.Sprintf("gave way to newer images: %d waited for the node", c.o.MaxPending)
		if err := c.put(&first[0], &failed); err != nil {
			return w, err
		}
		c.gaveWay++
	}
	c.wake[w.Node] = struct{}{}
	return w, c.put(was, &w)
}

// pend makes Pending again what nobody is fetching any more; it keeps its place.
func (c *change) pend(was *accel.Warm, reason string) error {
	w := *was
	w.State, w.Reason, w.UpdatedAt, w.FetchedBytes = accel.WarmPending, reason, c.now, 0
	c.wake[w.Node] = struct{}{}
	return c.put(was, &w)
}

// makeRoom removes the longest finished Warm where the fleet has as many as it may; false
// where there is none.
func (c *change) makeRoom() (bool, error) {
	total := uint64(0)
	for _, s := range warmStates {
		total += count(c.bt, s)
	}
	if total < uint64(c.o.MaxWarms) {
		return true, nil
	}
	first, err := c.oldest(bucketFinished, nil, 1)
	if err != nil || len(first) == 0 {
		return false, err
	}
	return true, c.put(&first[0], nil)
}
