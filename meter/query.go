package meter

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"strings"
	"time"

	"accel"

	"go.etcd.io/bbolt"
)

// Filter selects pulls; zero fields select all.
type Filter struct {
	Image   string // as in Pull.Image, or a repository "host/path" for all of its images
	Node    string
	Tenant  string
	Outcome accel.Outcome
	From    time.Time // started then or later
	To      time.Time // started before
	Limit   int       // of a page; 1 to MaxPage
	Cursor  string    // Next of the page before
}

// Page is one page of pulls, the latest started first.
type Page struct {
	Pulls []accel.Pull
	// Next is the cursor of the next page, empty on the last. A page may be short, and even empty, and
	// not be the last: one page looks at a bounded number of pulls.
	Next string
}

const (
	// MaxPage bounds a page.
	MaxPage = 1000
	// maxLooked bounds the pulls that one page looks at, about 0.1 s of work.
	maxLooked = 100_000
)

func (f *Filter) has(p *accel.Pull) bool {
	return (f.Image == "" || matchesImage(p.Image, f.Image)) && (f.Node == "" || p.Node == f.Node) &&
		(f.Tenant == "" || p.Tenant == f.Tenant) && (f.Outcome == "" || p.Outcome == f.Outcome)
}

// matchesImage reports whether image is the wanted one, or one of the wanted repository.
func matchesImage(image, wanted string) bool {
	rest, ok := strings.CutPrefix(image, wanted)
	return ok && (rest == "" || strings.HasPrefix(rest, "@") || rest[0] == ':' && !strings.Contains(rest, "/"))
}

// texts are those of names, looked up once.
type texts struct {
	bt    *bbolt.Tx
	known map[uint32]string
}

func (t *texts) of(name uint32) string {
	if name == 0 {
		return ""
	}
	s, ok := t.known[name]
	if !ok {
		s = string(t.bt.Bucket(bucketTexts).Get(binary.BigEndian.AppendUint32(nil, name)))
		t.known[name] = s
	}
	return s
}

// Pulls lists pulls, the latest started first. accel.ErrInvalid for a bad limit or cursor.
func (l *Ledger) Pulls(ctx context.Context, f Filter) (Page, error) {
	if f.Limit < 1 || f.Limit > MaxPage {
		return Page{}, fmt.Errorf("%w: limit %d: want 1 to %d", accel.ErrInvalid, f.Limit, MaxPage)
	}
	var before []byte // exclusive
	if !f.To.IsZero() {
		before = timeKey(f.To)
	}
	if f.Cursor != "" {
		k, err := idKey(f.Cursor)
		if err != nil {
			return Page{}, fmt.Errorf("%w: cursor %.40q is not one of this list", accel.ErrInvalid, f.Cursor)
		}
		if before == nil || bytes.Compare(k, before) < 0 {
			before = k
		}
	}
	var from []byte
	if !f.From.IsZero() {
		from = timeKey(f.From)
	}
	var page Page
	err := l.file.View(func(bt *bbolt.Tx) (err error) {
		texts := texts{bt: bt, known: map[uint32]string{}}
		page, err = f.page(ctx, bt.Bucket(bucketPulls).Cursor(), from, before, texts.of)
		return err
	})
	return page, l.located(err)
}

func (f *Filter) page(ctx context.Context, c *bbolt.Cursor, from, before []byte, text func(uint32) string) (Page, error) {
	page := Page{Pulls: []accel.Pull{}}
	k, v := c.Last()
	if before != nil {
		if k, v = c.Seek(before); k == nil {
			k, v = c.Last()
		}
		for k != nil && bytes.Compare(k, before) >= 0 {
			k, v = c.Prev()
		}
	}
	looked := 0
	for ; k != nil && bytes.Compare(k, from) >= 0; k, v = c.Prev() {
		if looked++; looked%1000 == 0 && ctx.Err() != nil {
			return Page{}, ctx.Err()
		}
		p, err := decodePull(k, v, text)
		if err != nil {
			return Page{}, err
		}
		if f.has(&p) {
			page.Pulls = append(page.Pulls, p)
		}
		if len(page.Pulls) == f.Limit || looked == maxLooked {
			if before, _ := c.Prev(); before != nil && bytes.Compare(before, from) >= 0 {
				page.Next = p.ID
			}
			break
		}
	}
	return page, nil
}
