package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"accel/readiness"

	"github.com/danielgtaylor/huma/v2"
)

const (
	// heartbeat keeps proxies from closing a stream in which nothing happens.
	heartbeat = 15 * time.Second
	// eventBatch is how many events are read from the store at a time.
	eventBatch = 256
)

type eventsInput struct {
	LastEventID uint64 `header:"Last-Event-ID" doc:"number of the last event that was seen; the stream goes on after it"`
	After       uint64 `query:"after" doc:"the same as Last-Event-ID, for clients that cannot send headers"`
}

func (s *server) eventRoutes(routes huma.API) {
	huma.Register(routes, huma.Operation{
		OperationID: "stream-events", Method: http.MethodGet, Path: "/v1/events", Tags: []string{"Readiness"}, Security: secured(ScopeRead),
		Summary:     "Stream changes of state",
		Description: "Server-sent events: `state` for each change, with its number as id; `reset` where events after Last-Event-ID are no longer kept, so that the reader should list the images anew.",
		Responses:   map[string]*huma.Response{"200": {Description: "the stream", Content: map[string]*huma.MediaType{"text/event-stream": {}}}},
		Errors:      []int{401, 403},
	}, func(_ context.Context, in *eventsInput) (*huma.StreamResponse, error) {
		after := max(in.LastEventID, in.After)
		return &huma.StreamResponse{Body: func(ctx huma.Context) { s.stream(ctx, after) }}, nil
	})
}

func (s *server) stream(hctx huma.Context, after uint64) {
	hctx.SetHeader("Content-Type", "text/event-stream")
	hctx.SetHeader("Cache-Control", "no-store")
	hctx.SetStatus(http.StatusOK)
	out := hctx.BodyWriter()
	flush := func() error { return nil }
	if w, ok := out.(http.ResponseWriter); ok {
		flush = http.NewResponseController(w).Flush
	}
	ctx, cancel := context.WithCancel(hctx.Context())
	defer cancel()
	defer context.AfterFunc(s.Draining, cancel)()
	if err := flush(); err != nil {
		return
	}
	for ctx.Err() == nil {
		wait, done := context.WithTimeout(ctx, heartbeat)
		evs, first, err := s.Tracker.NextEvents(wait, after, eventBatch)
		done()
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			if ctx.Err() == nil {
				s.Log.Error("event stream ends", "error", err)
			}
			return
		}
		if after > 0 && first > after+1 {
			_, err = fmt.Fprintf(out, "event: reset\nid: %d\ndata: {\"first\":%d}\n\n", first-1, first)
		} else if len(evs) == 0 {
			_, err = fmt.Fprint(out, ": still here\n\n")
		} else {
			err = nil
		}
		for _, e := range evs {
			if err == nil {
				err = writeEvent(out, e)
			}
			after = e.Seq
		}
		if err == nil {
			err = flush()
		}
		if err != nil {
			return // the reader is gone
		}
	}
}

func writeEvent(out interface{ Write([]byte) (int, error) }, e readiness.Event) error {
	data, err := json.Marshal(e)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "event: state\nid: %d\ndata: %s\n\n", e.Seq, data)
	return err
}
