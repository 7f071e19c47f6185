package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"accel"
	"accel/webhook"

	"github.com/danielgtaylor/huma/v2"
)

type webhookInput struct {
	Source  string `path:"source" doc:"name or kind of a configured source" maxLength:"100"`
	Secret  string `path:"secret" doc:"for registries that cannot send a header" maxLength:"500"`
	RawBody []byte `contentType:"application/json"`
	header  http.Header
}

// Resolve keeps the header: each kind of source authenticates by another one.
func (in *webhookInput) Resolve(ctx huma.Context) []error {
	in.header = http.Header{}
	ctx.EachHeader(func(name, value string) { in.header.Add(name, value) })
	return nil
}

// plainWebhookInput is webhookInput without a secret in the path.
type plainWebhookInput struct {
	Source  string `path:"source" doc:"name or kind of a configured source" maxLength:"100"`
	Secret  string `query:"secret" doc:"for registries that can only be given an URL with a query" maxLength:"500"`
	RawBody []byte `contentType:"application/json"`
	header  http.Header
}

// Resolve keeps the header.
func (in *plainWebhookInput) Resolve(ctx huma.Context) []error {
	in.header = http.Header{}
	ctx.EachHeader(func(name, value string) { in.header.Add(name, value) })
	return nil
}

// Accepted is an image that a webhook or a submission brought.
type Accepted struct {
	ID     string      `json:"id"`
	Image  string      `json:"image"`
	Digest string      `json:"digest,omitempty" doc:"absent while only a tag is known"`
	State  accel.State `json:"state"`
}

func acceptedOf(r accel.Record) Accepted {
	return Accepted{ID: r.ID, Image: r.Image(), Digest: r.Digest.String(), State: r.State}
}

type webhookOutput struct {
	Status int
	Body   WebhookAnswer
}

// WebhookAnswer lists what was accepted (202), or says why nothing was (200).
type WebhookAnswer struct {
	Images  []Accepted `json:"images,omitempty"`
	Ignored string     `json:"ignored,omitempty" doc:"why there was nothing to do"`
}

func (s *server) webhookRoutes(routes huma.API) {
	op := huma.Operation{
		OperationID: "receive-webhook", Method: http.MethodPost, Path: "/v1/webhooks/{source}", Tags: []string{"Webhooks"},
		Summary:       "Take a registry's push event in",
		Description:   "Answers 202 once the event is durable, and 200 when it is about no image push. The sender authenticates in its registry's own way.",
		DefaultStatus: http.StatusAccepted, MaxBodyBytes: s.MaxBodyBytes,
		SkipValidateBody: true, // each registry has its own shape and media type; Decode judges it
		Errors:           []int{400, 401, 403, 404, 413, 503},
	}
	huma.Register(routes, op, func(ctx context.Context, in *plainWebhookInput) (*webhookOutput, error) {
		return s.receive(ctx, in.Source, in.Secret, in.header, in.RawBody)
	})
	op.OperationID, op.Path, op.Summary = "receive-webhook-with-secret", "/v1/webhooks/{source}/{secret}", "Take a push event in, with the secret in the path"
	huma.Register(routes, op, func(ctx context.Context, in *webhookInput) (*webhookOutput, error) {
		return s.receive(ctx, in.Source, in.Secret, in.header, in.RawBody)
	})
}

func (s *server) receive(ctx context.Context, name, secret string, header http.Header, body []byte) (*webhookOutput, error) {
	source, err := s.sender(ctx, name, secret, header, body)
	if err != nil {
		label := "unknown" // names from outside must not become labels
		if !errors.Is(err, accel.ErrNotFound) {
			label = name
		}
		s.metrics.intake.WithLabelValues(label, "refused").Inc()
		if !isOurs(err) {
			// The sender could not be told from an impostor just now: it should try again.
			s.Log.Warn("cannot authenticate a webhook", "source", label, "error", err)
			return nil, huma.Error503ServiceUnavailable("the sender's credential cannot be checked right now")
		}
		return nil, s.problem(err)
	}
	out, result, err := s.takeIn(ctx, source, header, body)
	s.metrics.intake.WithLabelValues(source.Name(), result).Inc()
	if err != nil {
		return nil, s.problem(err)
	}
	return out, nil
}

// sender finds the source that the request is from: of those that the path
// names, the one whose credential it has.
func (s *server) sender(ctx context.Context, name, secret string, header http.Header, body []byte) (*webhook.Source, error) {
	var refusal error
	for _, source := range s.Webhooks {
		if !source.Matches(name) {
			continue
		}
		err := source.Authenticate(ctx, header, secret, body)
		if err == nil {
			return source, nil
		}
		refusal = err
	}
	if refusal == nil {
		return nil, fmt.Errorf("%w: no webhook source %q is configured", accel.ErrNotFound, name)
	}
	return nil, refusal
}

func (s *server) takeIn(ctx context.Context, source *webhook.Source, header http.Header, body []byte) (out *webhookOutput, result string, err error) {
	decoded, err := source.Decode(header, body)
	if err != nil {
		return nil, "malformed", err
	}
	ignored := decoded.Ignored
	events := decoded.Events[:0:0]
	for _, ev := range decoded.Events {
		if ev.Registry, err = s.Canonical(ev.Registry); err != nil {
			return nil, "refused", err
		}
		ours, err := s.Tracker.Ours(ctx, ev.Registry+"/"+ev.Repository, ev.Digest)
		if err != nil {
			return nil, "error", err
		}
		if ours {
			ignored = append(ignored, "accel's own push to "+ev.Registry+"/"+ev.Repository)
			continue
		}
		events = append(events, ev)
	}
	if len(events) == 0 {
		if len(ignored) == 0 {
			ignored = []string{"no events"}
		}
		return &webhookOutput{Status: http.StatusOK, Body: WebhookAnswer{Ignored: strings.Join(ignored, "; ")}}, "ignored", nil
	}
	recs, err := s.Tracker.Push(ctx, events...)
	if err != nil {
		return nil, "error", err
	}
	out = &webhookOutput{Status: http.StatusAccepted, Body: WebhookAnswer{Ignored: strings.Join(ignored, "; ")}}
	for _, r := range recs {
		out.Body.Images = append(out.Body.Images, acceptedOf(r))
	}
	return out, "accepted", nil
}
