package api

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"
)

type gcInput struct {
	Body GCRequest
}

// GCRequest asks for orphaned targets.
type GCRequest struct {
	DryRun bool `json:"dryRun" doc:"list only"`
}

type gcOutput struct {
	Body GCAnswer
}

// GCAnswer lists what was found.
type GCAnswer struct {
	Orphans []Orphan `json:"orphans"`
}

func (s *server) lifecycleRoutes(routes huma.API) {
	huma.Register(routes, huma.Operation{
		OperationID: "collect-garbage", Method: http.MethodPost, Path: "/v1/gc", Tags: []string{"Life cycle"}, Security: secured(ScopeWrite),
		Summary: "Remove targets whose source is gone", Errors: []int{401, 403},
	}, func(ctx context.Context, in *gcInput) (*gcOutput, error) {
		orphans, err := s.Lifecycle.GC(ctx, in.Body.DryRun)
		if err != nil {
			return nil, s.problem(err)
		}
		return &gcOutput{Body: GCAnswer{Orphans: orphans}}, nil
	})
}
