package api

import (
	"context"
	"net/http"

	"accel"
	"accel/readiness"

	"github.com/danielgtaylor/huma/v2"
)

type listInput struct {
	State      string `query:"state" enum:"Pending,Converting,Ready,Failed,Rejected,Superseded,Stale" doc:"only images in this state"`
	Repository string `query:"repository" doc:"only images of this repository, host/path" maxLength:"512"`
	Cursor     string `query:"cursor" doc:"next of the page before" maxLength:"200"`
	Limit      int    `query:"limit" minimum:"1" maximum:"500" default:"50" doc:"images per page"`
}

// ImagePage is one page of images, newest first.
type ImagePage struct {
	Images []Image `json:"images"`
	Next   string  `json:"next,omitempty" doc:"cursor of the next page; absent on the last"`
}

type pageOutput struct {
	Body ImagePage
}

type idInput struct {
	ID string `path:"id" maxLength:"100" doc:"id of an image; ids of images that were merged lead to the one that took over"`
}

type submitInput struct {
	Body Submission
}

// Submission asks for an image to be converted.
type Submission struct {
	Image string `json:"image" doc:"reference by tag or digest" minLength:"1" maxLength:"1024" example:"registry.example/team/app:v1"`
}

type acceptedOutput struct {
	Body Accepted
}

type deleteInput struct {
	ID     string `path:"id" maxLength:"100"`
	Target bool   `query:"target" doc:"remove the converted image from the registry too; the source is never touched"`
}

func (s *server) imageRoutes(routes huma.API) {
	tags := []string{"Images"}
	huma.Register(routes, huma.Operation{
		OperationID: "list-images", Method: http.MethodGet, Path: "/v1/images", Tags: tags, Security: secured(ScopeRead),
		Summary: "List images, newest first", Errors: []int{400, 401, 403},
	}, s.listImages)
	huma.Register(routes, huma.Operation{
		OperationID: "submit-image", Method: http.MethodPost, Path: "/v1/images", Tags: tags, Security: secured(ScopeWrite),
		Summary: "Ask for an image to be converted", DefaultStatus: http.StatusAccepted, MaxBodyBytes: s.MaxBodyBytes, Errors: []int{400, 401, 403},
	}, s.submit)
	huma.Register(routes, huma.Operation{
		OperationID: "get-image", Method: http.MethodGet, Path: "/v1/images/{id}", Tags: tags, Security: secured(ScopeRead),
		Summary: "Get an image by id", Errors: []int{401, 403, 404},
	}, func(ctx context.Context, in *idInput) (*imageOutput, error) {
		rec, err := s.Tracker.Get(ctx, in.ID)
		return s.answer(ctx, rec, err)
	})
	huma.Register(routes, huma.Operation{
		OperationID: "retry-image", Method: http.MethodPost, Path: "/v1/images/{id}/retry", Tags: tags, Security: secured(ScopeWrite),
		Summary: "Try an image again now", Description: "For one that Failed, was Rejected or Superseded, or waits for its next try.",
		DefaultStatus: http.StatusAccepted, Errors: []int{401, 403, 404, 409},
	}, func(ctx context.Context, in *idInput) (*imageOutput, error) {
		rec, err := s.Tracker.Retry(ctx, in.ID)
		return s.answer(ctx, rec, err)
	})
	huma.Register(routes, huma.Operation{
		OperationID: "delete-image", Method: http.MethodDelete, Path: "/v1/images/{id}", Tags: tags, Security: secured(ScopeWrite),
		Summary: "Forget an image", Description: "With target=true its converted form is removed from the registry first. In a reconciled repository the image comes back for as long as its tag stands.",
		DefaultStatus: http.StatusOK, Errors: []int{401, 403, 404},
	}, s.deleteImage)
}

func (s *server) answer(ctx context.Context, rec accel.Record, err error) (*imageOutput, error) {
	if err != nil {
		return nil, s.problem(err)
	}
	out := &imageOutput{Body: imageOf(rec)}
	s.withProfiles(ctx, &out.Body)
	return out, nil
}

func (s *server) listImages(ctx context.Context, in *listInput) (*pageOutput, error) {
	p, err := s.Tracker.List(ctx, readiness.Filter{State: accel.State(in.State), Repository: in.Repository, Cursor: in.Cursor, Limit: in.Limit})
	if err != nil {
		return nil, s.problem(err)
	}
	out := &pageOutput{Body: ImagePage{Images: make([]Image, 0, len(p.Records)), Next: p.Next}}
	for _, r := range p.Records {
		out.Body.Images = append(out.Body.Images, imageOf(r))
		s.withProfiles(ctx, &out.Body.Images[len(out.Body.Images)-1])
	}
	return out, nil
}

func (s *server) submit(ctx context.Context, in *submitInput) (*acceptedOutput, error) {
	ref, err := s.reference(in.Body.Image)
	if err != nil {
		return nil, s.problem(err)
	}
	ev := accel.PushEvent{Source: accel.OriginAPI, Registry: ref.Registry, Repository: ref.Repository, Tag: ref.Tag, Digest: ref.Digest}
	if ref.Digest != "" {
		ev.Tag = "" // the digest is what is asked for; the tag may be elsewhere by now
	}
	recs, err := s.Tracker.Push(ctx, ev)
	if err != nil {
		return nil, s.problem(err)
	}
	return &acceptedOutput{Body: acceptedOf(recs[0])}, nil
}

func (s *server) deleteImage(ctx context.Context, in *deleteInput) (*imageOutput, error) {
	if in.Target {
		rec, err := s.Tracker.Get(ctx, in.ID)
		if err == nil {
			err = s.Lifecycle.DeleteTarget(ctx, rec)
		}
		if err != nil {
			return nil, s.problem(err)
		}
	}
	rec, err := s.Tracker.Delete(ctx, in.ID)
	return s.answer(ctx, rec, err)
}
