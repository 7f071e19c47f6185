package api

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"io"
	"mime"
	"net/http"
	"net/url"
	"reflect"
	"strconv"
	"strings"
	"time"

	"accel"
	"accel/meter"

	"github.com/danielgtaylor/huma/v2"
)

// UsageLine adds up the pulls of one image, tenant, node or day, or all.
type UsageLine struct {
	Key             string  `json:"key" doc:"the image, tenant, node or day (UTC); empty for pulls of no tenant, and for the total"`
	Pulls           int64   `json:"pulls"`
	Hits            int64   `json:"hits" doc:"nothing from the registry"`
	Partial         int64   `json:"partial" doc:"some from the registry, or fetched by another pull just then"`
	Misses          int64   `json:"misses" doc:"all from the registry"`
	Errors          int64   `json:"errors" doc:"the client did not get what it asked for"`
	Lazy            int64   `json:"lazy" doc:"of the pulls: those mounted before their content was there"`
	HitRatio        float64 `json:"hitRatio" doc:"hits to the pulls that were no error; 0 where there are none"`
	HitRatioBytes   float64 `json:"hitRatioBytes" doc:"layer bytes that did not come from the registry to all; 0 where there are none"`
	RegistryBytes   int64   `json:"registryBytes"`
	PeerBytes       int64   `json:"peerBytes"`
	CacheBytes      int64   `json:"cacheBytes"`
	Seconds         float64 `json:"seconds" doc:"summed duration of the pulls that were no error"`
	P50Seconds      float64 `json:"p50Seconds" doc:"percentile of these durations, within 1 %"`
	P90Seconds      float64 `json:"p90Seconds"`
	P99Seconds      float64 `json:"p99Seconds"`
	GBSecondsBilled float64 `json:"gbSecondsBilled" doc:"billed duration times memory, where a GB is 2^30 bytes"`
	GBSecondsSaved  float64 `json:"gbSecondsSaved" doc:"estimate of what hits, partial and lazy pulls would have cost more without accel; negative where they were slower"`
	NoBaseline      int64   `json:"noBaseline" doc:"pulls of which it is not known what they would have cost; they count as having saved nothing"`
}

// UsageReport is what was used in some days.
type UsageReport struct {
	By          string      `json:"by" enum:"image,tenant,node,day"`
	From        *time.Time  `json:"from,omitempty" doc:"midnight (UTC) of the first day that was added up; absent where there is none"`
	To          *time.Time  `json:"to,omitempty" doc:"midnight after the last day"`
	MemoryBytes int64       `json:"memoryBytes" doc:"memory of pulls for which the platform passed none"`
	Lines       []UsageLine `json:"lines" doc:"those with most pulls first, days in their order"`
	More        int         `json:"more,omitempty" doc:"lines above the limit; the total has them"`
	Total       UsageLine   `json:"total"`
}

type usageInput struct {
	By     string `query:"by" enum:"image,tenant,node,day" default:"image" doc:"what is added up"`
	Memory string `query:"memory" default:"1GiB" doc:"memory of pulls for which the platform passed none" maxLength:"40" example:"512MiB"`
	From   string `query:"from" doc:"first day (UTC): a date, or a time of which the day counts; default: the first that is kept, and for which this can be told" maxLength:"40" example:"2026-01-01"`
	To     string `query:"to" doc:"day after the last; a time within a day takes this day in; default: after the newest" maxLength:"40" example:"2026-02-01"`
	Image  string `query:"image" doc:"only of this image, or of this repository (host/path)" maxLength:"1024"`
	Tenant string `query:"tenant" doc:"only of this tenant" maxLength:"128"`
	Node   string `query:"node" doc:"only on this node" maxLength:"253"`
	Limit  int    `query:"limit" minimum:"1" maximum:"20000" default:"1000" doc:"lines"`
	Format string `query:"format" enum:"json,csv" doc:"default: csv where Accept asks for text/csv, else json"`
	Accept string `header:"Accept"`
}

const csvType = "text/csv"

func (s *server) usageRoutes(routes huma.API) {
	schema := routes.OpenAPI().Components.Schemas.Schema(reflect.TypeFor[UsageReport](), true, "UsageReport")
	huma.Register(routes, huma.Operation{
		OperationID: "get-usage", Method: http.MethodGet, Path: "/v1/usage", Tags: []string{"Pulls"}, Security: secured(ScopeRead),
		Summary: "Add up pulls: how many, how fast, from where, and what they cost",
		Description: `Adds up whole days (UTC); a pull belongs to the day on which it started.

Days that are older than the service is configured to keep in detail are folded: they can be asked for by image, by tenant and by node, but not by node together with another of them, and by image and tenant together for whole months only; what cannot be told is a 400. Their percentiles are those of whole months, but for those of all pulls, and what they saved was estimated when they were folded.

**Billed** are the billed duration of each pull times its memory, in GB-seconds (a GB is 2^30 bytes). The memory is what the platform passed with the pull, else what the query names. Which outcomes are free (by default a full hit), the step to which durations are rounded up and their minimum are configured; a changed rule holds for the pulls that come after it.

**Saved** is an estimate: what hits, partial and lazy pulls would have been billed as whole downloads from the registry, less what they were billed. Such a download takes the median duration of those of the same image (outcome miss, not lazy) in the days that are asked for and the 30 days before; where an image has none, the pull's layer bytes divided by the median throughput of the fleet's downloads in that time. Where there is no download at all the pull counts in noBaseline and saved nothing.`,
		Errors: []int{400, 401, 403},
		Responses: map[string]*huma.Response{"200": {Description: "OK", Content: map[string]*huma.MediaType{
			"application/json": {Schema: schema},
			csvType:            {Schema: &huma.Schema{Type: huma.TypeString, Description: "a line with the names of the columns, which are those of the JSON, and one for each line; no total"}},
		}}},
	}, func(ctx context.Context, in *usageInput) (*huma.StreamResponse, error) {
		u, err := s.usage(ctx, in)
		if err != nil {
			return nil, s.problem(err)
		}
		var body bytes.Buffer // an error must not come after a good status
		kind := "application/json"
		if in.Format == "csv" || in.Format == "" && accepts(in.Accept, csvType) {
			kind = csvType + "; charset=utf-8"
			err = u.WriteCSV(&body)
		} else {
			err = json.NewEncoder(&body).Encode(u)
		}
		if err != nil {
			return nil, s.problem(err)
		}
		return &huma.StreamResponse{Body: func(hc huma.Context) {
			hc.SetHeader("Vary", "Accept")
			hc.SetHeader("Content-Type", kind)
			if _, err := hc.BodyWriter().Write(body.Bytes()); err != nil {
				s.Log.Debug("cannot answer", "error", err)
			}
		}}, nil
	})
}

// accepts reports whether a header asks for the type by name.
func accepts(header, wanted string) bool {
	for part := range strings.SplitSeq(header, ",") {
		if t, _, err := mime.ParseMediaType(part); err == nil && t == wanted {
			return true
		}
	}
	return false
}

func (s *server) usage(ctx context.Context, in *usageInput) (UsageReport, error) {
	memory, err := accel.ParseBytes(in.Memory)
	if err != nil {
		return UsageReport{}, err
	}
	q := meter.Query{By: in.By, Image: in.Image, Tenant: in.Tenant, Node: in.Node, MemoryBytes: memory, Limit: in.Limit}
	if q.From, q.To, err = period(in.From, in.To); err != nil {
		return UsageReport{}, err
	}
	u, err := s.Ledger.Usage(ctx, q)
	if err != nil {
		return UsageReport{}, err
	}
	out := UsageReport{By: in.By, MemoryBytes: memory, Lines: make([]UsageLine, 0, len(u.Lines)), More: u.More, Total: lineOf(u.Total)}
	if !u.To.IsZero() {
		out.From, out.To = &u.From, &u.To
	}
	for _, l := range u.Lines {
		out.Lines = append(out.Lines, lineOf(l))
	}
	return out, nil
}

func lineOf(l meter.UsageLine) UsageLine {
	return UsageLine{
		Key: l.Key, Pulls: l.Pulls, Hits: l.Hits, Partial: l.Partial, Misses: l.Misses, Errors: l.Errors, Lazy: l.Lazy,
		HitRatio: l.HitRatio, HitRatioBytes: l.HitRatioBytes, RegistryBytes: l.RegistryBytes, PeerBytes: l.PeerBytes, CacheBytes: l.CacheBytes,
		Seconds: l.Seconds, P50Seconds: l.P50, P90Seconds: l.P90, P99Seconds: l.P99,
		GBSecondsBilled: l.GBSecondsBilled, GBSecondsSaved: l.GBSecondsSaved, NoBaseline: l.NoBaseline,
	}
}

// WriteCSV writes a line with the names of the columns, and one for each line of u. The
// first column is named by what was added up.
func (u UsageReport) WriteCSV(out io.Writer) error {
	w := csv.NewWriter(out)
	t := reflect.TypeFor[UsageLine]()
	row := make([]string, t.NumField())
	for i := range row {
		row[i] = t.Field(i).Tag.Get("json")
	}
	row[0] = u.By
	if err := w.Write(row); err != nil {
		return err
	}
	for _, l := range u.Lines {
		v := reflect.ValueOf(l)
		for i := range row {
			switch f := v.Field(i); f.Kind() {
			case reflect.Float64:
				row[i] = strconv.FormatFloat(f.Float(), 'f', -1, 64)
			case reflect.Int64:
				row[i] = strconv.FormatInt(f.Int(), 10)
			default:
				row[i] = f.String()
			}
		}
		if err := w.Write(row); err != nil {
			return err
		}
	}
	w.Flush()
	return w.Error()
}

// UsageOptions say what is added up. Zero fields take the API's defaults.
type UsageOptions struct {
	By                  string // image, tenant, node or day
	MemoryBytes         int64
	From, To            time.Time
	Image, Tenant, Node string
	Limit               int
}

// Usage adds up pulls.
func (c *Client) Usage(ctx context.Context, o UsageOptions) (u UsageReport, err error) {
	q := url.Values{"format": {"json"}}
	set(q, "by", o.By)
	set(q, "image", o.Image)
	set(q, "tenant", o.Tenant)
	set(q, "node", o.Node)
	setTime(q, "from", o.From)
	setTime(q, "to", o.To)
	if o.MemoryBytes != 0 {
		q.Set("memory", strconv.FormatInt(o.MemoryBytes, 10))
	}
	if o.Limit != 0 {
		q.Set("limit", strconv.Itoa(o.Limit))
	}
	return u, c.do(ctx, http.MethodGet, "/v1/usage", q, nil, &u)
}
