package api

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"accel"
	"accel/readiness"

	"github.com/danielgtaylor/huma/v2"
)

// maxWait bounds a long poll, so that proxies do not cut it first; a client that
// wants to wait longer asks again.
const maxWait = 10 * time.Minute

type readinessInput struct {
	Image string `query:"image" required:"true" doc:"reference by tag or digest" maxLength:"1024" example:"registry.example/team/app:v1"`
	Wait  string `query:"wait" doc:"how long to wait for a final state, at most 10m; default: not at all" maxLength:"20" example:"60s"`
}

type imageOutput struct {
	Body Image
}

func (s *server) readinessRoutes(routes huma.API) {
	huma.Register(routes, huma.Operation{
		OperationID: "get-readiness", Method: http.MethodGet, Path: "/v1/readiness", Tags: []string{"Readiness"}, Security: secured(ScopeRead),
		Summary:     "Ask how an image stands, and wait for it",
		Description: "With wait it answers as soon as the state is final; an image that was not pushed yet is waited for too, and one that a newer push superseded is followed to its successor. When the time is up it answers with the state as it is.",
		Errors:      []int{400, 401, 403, 404},
	}, func(ctx context.Context, in *readinessInput) (*imageOutput, error) {
		st, err := s.readiness(ctx, in)
		if err != nil {
			return nil, s.problem(err)
		}
		out := &imageOutput{Body: statusOf(st)}
		s.withProfiles(ctx, &out.Body, out.Body.Previous)
		return out, nil
	})
}

func (s *server) readiness(ctx context.Context, in *readinessInput) (readiness.Status, error) {
	ref, err := s.reference(in.Image)
	if err != nil {
		return readiness.Status{}, err
	}
	if in.Wait == "" {
		return s.Tracker.Find(ctx, ref)
	}
	wait, err := time.ParseDuration(in.Wait)
	if err != nil || wait < 0 || wait > maxWait {
		return readiness.Status{}, fmt.Errorf("%w: wait %q: want a duration such as 60s, up to %s", accel.ErrInvalid, in.Wait, maxWait)
	}
	patience, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	defer context.AfterFunc(s.Draining, cancel)()
	st, err := s.Tracker.Wait(patience, ref)
	if err != nil && patience.Err() != nil {
		return s.Tracker.Find(ctx, ref) // not final yet: the answer says so
	}
	return st, err
}

// reference parses an image reference and brings its host to the canonical form.
func (s *server) reference(image string) (accel.Reference, error) {
	ref, err := accel.ParseReference(image)
	if err != nil {
		return ref, err
	}
	ref.Registry, err = s.Canonical(ref.Registry)
	return ref, err
}
