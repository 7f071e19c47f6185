package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"accel"
	"accel/profile"

	"github.com/danielgtaylor/huma/v2"
	"github.com/opencontainers/go-digest"
)

// Lister finds out what lists of paths mean in an image, and keeps that; package worker does it.
type Lister interface {
	ListPaths(ctx context.Context, manifest digest.Digest, paths []string) (unmatched []string, err error)
}

// maxListBodyBytes holds MaxListedBytes of paths with what JSON puts around them.
const maxListBodyBytes = 2 * profile.MaxListedBytes

// maxUnmatchedTold bounds how many lines are named that mean nothing.
const maxUnmatchedTold = 20

// PathList is what a person lists of a start.
type PathList struct {
	// At most profile.MaxListed; each at most the kernel's PATH_MAX.
	Paths []string `json:"paths" maxItems:"16384" nullable:"false" doc:"names in the image of files or directories, which mean all files in them, or patterns (* ? [a-z], none matches a slash); an empty list takes an earlier one away" example:"[\"/usr/lib/app/*.so\",\"/etc/app\"]"`
}

// ListedProfile is how a profile stands that paths were listed for.
type ListedProfile struct {
	ProfileStatus
	// Unmatched are the first lines that mean no file with content in the image, UnmatchedCount is all of them.
	Unmatched      []string `json:"unmatched,omitempty" doc:"the first of the paths that mean no file with content in the image"`
	UnmatchedCount int      `json:"unmatchedCount" doc:"how many of them there are"`
}

type pathListInput struct {
	Manifest string `path:"manifest" doc:"digest of a source PLATFORM manifest" maxLength:"200"`
	Body     PathList
}

type pathListOutput struct {
	Body ListedProfile
}

func (s *server) listRoute(routes huma.API) {
	huma.Register(routes, huma.Operation{
		OperationID: "list-profile-paths", Method: http.MethodPut, Path: "/v1/profiles/{manifest}/paths", Tags: []string{"Profiles"}, Security: secured(ScopeWrite),
		Summary: "List files that a start of an image reads",
		Description: "They become part of its profile for good, whatever is recorded, behind what is known otherwise, as those do that the image's label dev.accel.prefetch lists. " +
			"The list takes the place of the one that was given before.",
		MaxBodyBytes: min(maxListBodyBytes, s.MaxBodyBytes), Errors: []int{400, 401, 403, 404, 502, 503},
	}, s.listPaths)
}

func (s *server) listPaths(ctx context.Context, in *pathListInput) (*pathListOutput, error) {
	manifest, err := manifestOf(in.Manifest)
	if err == nil {
		err = checkPaths(in.Body.Paths)
	}
	if err != nil {
		return nil, s.problem(err)
	}
	unmatched, err := s.Lister.ListPaths(ctx, manifest, in.Body.Paths)
	if err != nil {
		return nil, s.listProblem(err)
	}
	st, err := s.Profiles.Status(ctx, manifest)
	if err != nil {
		return nil, s.problem(err)
	}
	return &pathListOutput{Body: ListedProfile{
		ProfileStatus: profileStatusOf(st), Unmatched: unmatched[:min(len(unmatched), maxUnmatchedTold)], UnmatchedCount: len(unmatched),
	}}, nil
}

// listProblem tells the caller's faults from the registry's, whose refusals are none of the caller's token.
func (s *server) listProblem(err error) error {
	switch {
	case errors.Is(err, accel.ErrNotFound), errors.Is(err, accel.ErrInvalid):
		return s.problem(err)
	case errors.Is(err, context.DeadlineExceeded):
		return huma.Error503ServiceUnavailable("the image's tables of contents did not come in time; try again")
	default:
		s.Log.Error("cannot look paths up in an image", "error", err)
		return huma.Error502BadGateway("the image's tables of contents cannot be had from its registry; the server's log has the cause")
	}
}

// checkPaths refuses what can be no name. That nothing leaves the image needs no check: names are looked up in it alone.
func checkPaths(paths []string) error {
	bytes := 0
	for n, p := range paths {
		if bytes += len(p); bytes > profile.MaxListedBytes {
			return fmt.Errorf("%w: the paths have more than %d bytes", accel.ErrInvalid, profile.MaxListedBytes)
		}
		if strings.TrimSpace(p) == "" || len(p) > profile.MaxPathBytes || strings.ContainsRune(p, 0) {
			return fmt.Errorf("%w: path %d, %.100q, is empty, longer than %d bytes or holds a zero byte", accel.ErrInvalid, n+1, p, profile.MaxPathBytes)
		}
	}
	return nil
}
