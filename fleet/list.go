package fleet

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"slices"

	"accel"
)

// Filter selects warms. Zero fields select all.
type Filter struct {
	Node string
	// Images are references; one with a digest selects what was resolved to it too.
	Images []accel.Reference
	Cursor string // from a previous Page
	Limit  int    // default 50, at most 500
}

// Page is one page of warms, newest first.
type Page struct {
	Warms []accel.Warm
	Next  string // empty on the last page
}

// Warms returns a page of warms in the order in which they were asked for, newest
// first. ErrInvalid for a cursor that is none.
func (f *Fleet) Warms(ctx context.Context, sel Filter) (Page, error) {
	before, err := base64.RawURLEncoding.DecodeString(sel.Cursor)
	if err != nil || (len(before) != 0 && len(before) != orderBytes) {
		return Page{}, fmt.Errorf("%w: cursor %.80q is none that a page gave", accel.ErrInvalid, sel.Cursor)
	}
	limit := 50
	if sel.Limit > 0 {
		limit = min(sel.Limit, 500)
	}
	var page Page
	err = f.view(ctx, func(c *change) error {
		all, err := c.selected(&sel, before, limit+1)
		if err != nil {
			return err
		}
		page = Page{Warms: all}
		if len(all) > limit {
			page.Warms = all[:limit]
			page.Next = base64.RawURLEncoding.EncodeToString(order(&all[limit-1]))
		}
		return nil
	})
	return page, err
}

func (c *change) selected(sel *Filter, before []byte, limit int) ([]accel.Warm, error) {
	switch {
	case len(sel.Images) > 0:
		var all []accel.Warm
		for _, ref := range sel.Images {
			for _, name := range names(ref) {
				some, err := c.newest(bucketByImage, hash(name), before, limit, sel.Node)
				if err != nil {
					return nil, err
				}
				all = append(all, some...)
			}
		}
		slices.SortFunc(all, func(a, b accel.Warm) int { return bytes.Compare(order(&b), order(&a)) })
		all = slices.CompactFunc(all, func(a, b accel.Warm) bool { return a.ID == b.ID })
		return all[:min(len(all), limit)], nil
	case sel.Node != "":
		return c.newest(bucketByNode, hash(sel.Node), before, limit, "")
	default:
		return c.newest(bucketAll, nil, before, limit, "")
	}
}

// newest lists up to limit warms of an index with the prefix, before an order (nil:
// all), newest first; of one node where that is set.
func (c *change) newest(bucket, prefix, before []byte, limit int, node string) ([]accel.Warm, error) {
	cur := c.bt.Bucket(bucket).Cursor()
	end := slices.Concat(prefix, before)
	if len(before) == 0 {
		end = slices.Concat(prefix, bytes.Repeat([]byte{0xff}, orderBytes+1))
	}
	k, _ := cur.Seek(end)
	if k == nil {
		k, _ = cur.Last()
	} else {
		k, _ = cur.Prev()
	}
	var all []accel.Warm
	for ; k != nil && bytes.HasPrefix(k, prefix) && len(all) < limit; k, _ = cur.Prev() {
		w, err := c.led(k)
		if err != nil {
			return nil, err
		}
		if node == "" || w.Node == node {
			all = append(all, w)
		}
	}
	return all, nil
}

// names of an image in the index: as asked for, and by digest.
func names(ref accel.Reference) []string {
	var all []string
	if ref.Tag != "" {
		all = append(all, ref.Name()+":"+ref.Tag)
	}
	if ref.Digest != "" {
		all = append(all, ref.Name()+"@"+ref.Digest.String())
	}
	return all
}
