package api

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"accel"
	"accel/meter"

	"github.com/danielgtaylor/huma/v2"
)

// MaxReport bounds the pulls of one report.
const MaxReport = 1000

// PullReport brings measured pulls.
type PullReport struct {
	Pulls []accel.Pull `json:"pulls" doc:"up to 1000"`
}

// PullList is one page of pulls, the latest started first.
type PullList struct {
	Pulls []accel.Pull `json:"pulls"`
	Next  string       `json:"next,omitempty" doc:"cursor of the next page; absent on the last. A page may be short, and even empty, without being the last"`
}

type pullReportInput struct {
	Authorization string `header:"Authorization" hidden:"true"`
	Body          PullReport
}

type receiptOutput struct {
	Body meter.Receipt
}

type pullsInput struct {
	Image   string `query:"image" doc:"only of this image, as in image; or of this repository, host/path" maxLength:"1024"`
	Node    string `query:"node" doc:"only on this node" maxLength:"253"`
	Tenant  string `query:"tenant" doc:"only of this tenant" maxLength:"128"`
	Outcome string `query:"outcome" enum:"hit,partial,miss,error" doc:"only with this outcome"`
	From    string `query:"from" doc:"only those started then or later: RFC 3339, or a date, which is its midnight in UTC" maxLength:"40" example:"2026-01-31"`
	To      string `query:"to" doc:"only those started before" maxLength:"40" example:"2026-02-01T12:00:00Z"`
	Cursor  string `query:"cursor" doc:"next of the page before" maxLength:"200"`
	Limit   int    `query:"limit" minimum:"1" maximum:"1000" default:"100" doc:"pulls per page"`
}

type pullsOutput struct {
	Body PullList
}

func (s *server) pullRoutes(routes huma.API) {
	tags := []string{"Pulls"}
	huma.Register(routes, huma.Operation{
		OperationID: "report-pulls", Method: http.MethodPost, Path: "/v1/pulls", Tags: tags, Security: secured(ScopeNode),
		Summary: "Report measured pulls",
		Description: "Nodes do this, with a token that speaks for the node of each pull. A pull counts once, by its id, however often and in which order it is reported; what is answered with 200 is durable. " +
			"Where one of them cannot be, none is counted and the error names it. One that is older than the single pulls that are kept is not counted, for it may have been before: that is late in the answer.",
		// Nodes and server are upgraded one after the other: what one of them does not
		// know is passed over. The ledger judges the rest.
		SkipValidateBody: true, MaxBodyBytes: s.MaxBodyBytes, Errors: []int{400, 401, 403, 507},
	}, func(ctx context.Context, in *pullReportInput) (*receiptOutput, error) {
		if len(in.Body.Pulls) > MaxReport {
			return nil, s.problem(fmt.Errorf("%w: a report of %d pulls: send up to %d at a time", accel.ErrInvalid, len(in.Body.Pulls), MaxReport))
		}
		for i := range in.Body.Pulls {
			if err := s.speaks(in.Authorization, in.Body.Pulls[i].Node); err != nil {
				return nil, s.problem(fmt.Errorf("pull %.40q: %w", in.Body.Pulls[i].ID, err))
			}
		}
		r, err := s.Ledger.Add(ctx, in.Body.Pulls)
		if errors.Is(err, meter.ErrFull) { // the ledger logs it, once
			return nil, &huma.ErrorModel{Title: http.StatusText(http.StatusInsufficientStorage), Status: http.StatusInsufficientStorage, Detail: "the server has no room on its disk; nothing was counted, try again later"}
		}
		if err != nil {
			return nil, s.problem(err)
		}
		return &receiptOutput{Body: r}, nil
	})
	huma.Register(routes, huma.Operation{
		OperationID: "list-pulls", Method: http.MethodGet, Path: "/v1/pulls", Tags: tags, Security: secured(ScopeRead),
		Summary: "List pulls, the latest started first", Errors: []int{400, 401, 403},
	}, func(ctx context.Context, in *pullsInput) (*pullsOutput, error) {
		f := meter.Filter{Image: in.Image, Node: in.Node, Tenant: in.Tenant, Outcome: accel.Outcome(in.Outcome), Limit: in.Limit, Cursor: in.Cursor}
		var err error
		if f.From, f.To, err = period(in.From, in.To); err != nil {
			return nil, s.problem(err)
		}
		p, err := s.Ledger.Pulls(ctx, f)
		if err != nil {
			return nil, s.problem(err)
		}
		return &pullsOutput{Body: PullList(p)}, nil
	})
}

// period reads from and to; empty ones are zero.
func period(from, to string) (f, t time.Time, err error) {
	for name, x := range map[string]struct {
		text string
		at   *time.Time
	}{"from": {from, &f}, "to": {to, &t}} {
		if x.text == "" {
			continue
		}
		if *x.at, err = ParseTime(x.text); err != nil {
			return f, t, fmt.Errorf("%s: %w", name, err)
		}
	}
	return f, t, nil
}

// ParseTime reads RFC 3339 or a date, which is its midnight in UTC.
func ParseTime(text string) (time.Time, error) {
	for _, layout := range []string{time.RFC3339Nano, time.DateOnly} {
		if t, err := time.Parse(layout, text); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("%w: time %.40q: want 2026-01-31 or 2026-01-31T12:00:00Z", accel.ErrInvalid, text)
}

// ReportPulls brings measured pulls to the server, which has them for good when the error
// is nil. It may be done again. A meter.Refusal where the server says that it will never take one of them: its
// own problem document, which names the pull, and not what a proxy might say. meter.ErrTooLarge where fewer might pass.
func (c *Client) ReportPulls(ctx context.Context, pulls []accel.Pull) error {
	for len(pulls) > 0 {
		n := min(len(pulls), MaxReport)
		var r meter.Receipt
		if err := c.do(ctx, http.MethodPost, "/v1/pulls", nil, PullReport{Pulls: pulls[:n]}, &r); err != nil {
			return reportError(err, pulls[:n])
		}
		if took := r.Accepted + r.Duplicates + r.Late; took != n {
			return fmt.Errorf("%s answered with a receipt for %d pulls of %d: is it a server of accel?", c.base, took, n)
		}
		pulls = pulls[n:]
	}
	return nil
}

// reportError judges why a report was not taken.
func reportError(err error, pulls []accel.Pull) error {
	var a answerError
	switch {
	case !errors.As(err, &a):
		return err
	case a.status == http.StatusRequestEntityTooLarge:
		return fmt.Errorf("%w: %w", meter.ErrTooLarge, err)
	case a.kind != problemType+"invalid":
		return err
	}
	for i := range pulls {
		if strings.Contains(err.Error(), strconv.Quote(pulls[i].ID)) {
			return &meter.Refusal{ID: pulls[i].ID, Err: err}
		}
	}
	return err
}

// PullOptions select pulls; zero fields select all.
type PullOptions struct {
	Image, Node, Tenant string
	Outcome             accel.Outcome
	From, To            time.Time
}

// Pulls iterates over pulls, the latest started first, page by page. It ends at the first error.
func (c *Client) Pulls(ctx context.Context, o PullOptions) iter.Seq2[accel.Pull, error] {
	return func(yield func(accel.Pull, error) bool) {
		q := url.Values{"limit": {strconv.Itoa(meter.MaxPage)}}
		set(q, "image", o.Image)
		set(q, "node", o.Node)
		set(q, "tenant", o.Tenant)
		set(q, "outcome", string(o.Outcome))
		setTime(q, "from", o.From)
		setTime(q, "to", o.To)
		for {
			var page PullList
			if err := c.do(ctx, http.MethodGet, "/v1/pulls", q, nil, &page); err != nil {
				yield(accel.Pull{}, err)
				return
			}
			for _, p := range page.Pulls {
				if !yield(p, nil) {
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

func set(q url.Values, name, value string) {
	if value != "" {
		q.Set(name, value)
	}
}

func setTime(q url.Values, name string, t time.Time) {
	if !t.IsZero() {
		q.Set(name, t.UTC().Format(time.RFC3339Nano))
	}
}
