package api

import (
	"context"
	"fmt"
	"net/http"

	"accel"
	"accel/trust"

	"github.com/danielgtaylor/huma/v2"
	"github.com/opencontainers/go-digest"
)

// KeySet is the public keys that mappings are signed with.
type KeySet struct {
	Keys []trust.Key `json:"keys" doc:"the active one signs; the others still verify"`
	PEM  string      `json:"pem" doc:"all of them as PEM blocks"`
}

type keysOutput struct {
	Body KeySet
}

type mappingInput struct {
	Digest     string `path:"digest" doc:"of the source PLATFORM manifest" maxLength:"200"`
	Repository string `query:"repository" doc:"host/path of the source; default: any" maxLength:"512"`
}

type mappingOutput struct {
	ContentType string `header:"Content-Type"`
	Body        []byte
}

func (s *server) trustRoutes(routes huma.API) {
	tags := []string{"Trust"}
	huma.Register(routes, huma.Operation{
		OperationID: "list-keys", Method: http.MethodGet, Path: "/v1/keys", Tags: tags,
		Summary: "Get the public keys that mappings are signed with",
	}, func(context.Context, *struct{}) (*keysOutput, error) {
		return &keysOutput{Body: KeySet{Keys: s.Keys.List(), PEM: string(s.Keys.Export())}}, nil
	})
	huma.Register(routes, huma.Operation{
		OperationID: "get-mapping", Method: http.MethodGet, Path: "/v1/mappings/{digest}", Tags: tags, Security: secured(ScopeRead, ScopeNode),
		Summary:     "Get the signed mapping of a source manifest",
		Description: "A DSSE envelope whose payload maps the source's manifest and layers to the converted ones.",
		Errors:      []int{400, 401, 403, 404},
	}, func(ctx context.Context, in *mappingInput) (*mappingOutput, error) {
		d, err := digest.Parse(in.Digest)
		if err != nil {
			return nil, s.problem(fmt.Errorf("%w: digest %q: %w", accel.ErrInvalid, in.Digest, err))
		}
		envelope, err := s.Tracker.Mapping(ctx, in.Repository, d)
		if err != nil {
			return nil, s.problem(err)
		}
		return &mappingOutput{ContentType: "application/vnd.dsse.envelope.v1+json", Body: envelope}, nil
	})
}
