package api

import (
	"context"
	"fmt"
	"net/http"
	"strings"

	"accel"
	"accel/profile"
	"accel/profile/ledger"

	"github.com/danielgtaylor/huma/v2"
	"github.com/opencontainers/go-digest"
)

type profileInput struct {
	Manifest    string `path:"manifest" doc:"digest of a source PLATFORM manifest" maxLength:"200"`
	IfNoneMatch string `header:"If-None-Match" doc:"the ETag of a profile that is there already" maxLength:"1000"`
}

type profileOutput struct {
	Status      int
	ContentType string `header:"Content-Type"`
	ETag        string `header:"ETag"`
	Body        []byte
}

type profileStatusOutput struct {
	Body ProfileStatus
}

type startInput struct {
	Authorization string `header:"Authorization" hidden:"true"`
	Manifest      string `path:"manifest" doc:"digest of a source PLATFORM manifest, as in the report" maxLength:"200"`
	Node          string `query:"node" required:"true" doc:"name of the node that reports" minLength:"1" maxLength:"253"`
	RawBody       []byte
}

type startOutput struct {
	Body StartReceipt
}

type importInput struct {
	Manifest string `path:"manifest" doc:"digest of a source PLATFORM manifest" maxLength:"200"`
	RawBody  []byte `contentType:"application/vnd.dev.accel.profile.v1+json"`
}

func manifestOf(text string) (digest.Digest, error) {
	d, err := digest.Parse(text)
	if err != nil {
		return "", fmt.Errorf("%w: manifest %.100q: %w", accel.ErrInvalid, text, err)
	}
	return d, nil
}

func (s *server) profileRoutes(routes huma.API) {
	tags := []string{"Profiles"}
	huma.Register(routes, huma.Operation{
		OperationID: "get-profile", Method: http.MethodGet, Path: "/v1/profiles/{manifest}", Tags: tags, Security: secured(ScopeRead, ScopeNode),
		Summary:     "Get the profile of an image: what a start of it reads",
		Description: "The canonical form, whose digest is the ETag. A profile is a hint.",
		Errors:      []int{400, 401, 403, 404},
	}, s.getProfile)
	huma.Register(routes, huma.Operation{
		OperationID: "report-start", Method: http.MethodPost, Path: "/v1/profiles/{manifest}/starts", Tags: tags, Security: secured(ScopeNode),
		Summary:     "Report what a start of an image read",
		Description: "Nodes do this, with a token that speaks for the node. A report counts once, by its id; what is answered with 200 is durable. Only images that were converted are known.",
		// The report's own encoding is checked, byte by byte.
		SkipValidateBody: true, MaxBodyBytes: min(profile.MaxEncodedBytes, s.MaxBodyBytes), Errors: []int{400, 401, 403, 404},
	}, func(ctx context.Context, in *startInput) (*startOutput, error) {
		receipt, err := s.takeStart(ctx, in)
		if err != nil {
			return nil, s.problem(err)
		}
		return &startOutput{Body: StartReceipt{WantMore: receipt.WantMore}}, nil
	})
	huma.Register(routes, huma.Operation{
		OperationID: "import-profile", Method: http.MethodPut, Path: "/v1/profiles/{manifest}", Tags: tags, Security: secured(ScopeWrite),
		Summary:          "Give an image a profile",
		Description:      "It stands until complete starts are recorded from now on. It may be that of another image: the parts that this one does not have are passed over.",
		SkipValidateBody: true, MaxBodyBytes: min(profile.MaxEncodedBytes, s.MaxBodyBytes), Errors: []int{400, 401, 403, 404},
	}, func(ctx context.Context, in *importInput) (*profileStatusOutput, error) {
		manifest, err := manifestOf(in.Manifest)
		if err != nil {
			return nil, s.problem(err)
		}
		p, err := profile.Decode(in.RawBody)
		if err == nil {
			err = s.Profiles.Import(ctx, manifest, p)
		}
		return s.profileStatus(ctx, manifest, err)
	})
	huma.Register(routes, huma.Operation{
		OperationID: "remove-profile", Method: http.MethodDelete, Path: "/v1/profiles/{manifest}", Tags: tags, Security: secured(ScopeWrite),
		Summary: "Forget the profile of an image, with all recorded starts", DefaultStatus: http.StatusOK, Errors: []int{400, 401, 403, 404},
	}, func(ctx context.Context, in *profileInput) (*profileStatusOutput, error) {
		manifest, err := manifestOf(in.Manifest)
		if err == nil {
			err = s.Profiles.Remove(ctx, manifest)
		}
		return s.profileStatus(ctx, manifest, err)
	})
}

func (s *server) getProfile(ctx context.Context, in *profileInput) (*profileOutput, error) {
	manifest, err := manifestOf(in.Manifest)
	if err != nil {
		return nil, s.problem(err)
	}
	encoded, version, err := s.Profiles.Profile(ctx, manifest)
	if err != nil {
		return nil, s.problem(err)
	}
	out := &profileOutput{Status: http.StatusOK, ContentType: profile.MediaType, ETag: `"` + version.String() + `"`, Body: encoded}
	for tag := range strings.SplitSeq(in.IfNoneMatch, ",") {
		if tag = strings.TrimPrefix(strings.TrimSpace(tag), "W/"); tag == out.ETag || tag == "*" {
			out.Status, out.Body = http.StatusNotModified, nil
		}
	}
	return out, nil
}

func (s *server) takeStart(ctx context.Context, in *startInput) (ledger.Receipt, error) {
	if err := s.speaks(in.Authorization, in.Node); err != nil {
		return ledger.Receipt{}, err
	}
	r, err := profile.DecodeReport(in.RawBody)
	if err != nil {
		return ledger.Receipt{}, err
	}
	if r.Manifest.String() != in.Manifest {
		return ledger.Receipt{}, fmt.Errorf("%w: the path names manifest %.100q, the report %s", accel.ErrInvalid, in.Manifest, r.Manifest)
	}
	r.Node = in.Node
	return s.Profiles.Report(ctx, r)
}

func (s *server) profileStatus(ctx context.Context, manifest digest.Digest, err error) (*profileStatusOutput, error) {
	if err != nil {
		return nil, s.problem(err)
	}
	st, err := s.Profiles.Status(ctx, manifest)
	if err != nil {
		return nil, s.problem(err)
	}
	return &profileStatusOutput{Body: profileStatusOf(st)}, nil
}

func profileStatusOf(st ledger.ManifestStatus) ProfileStatus {
	return ProfileStatus{Manifest: st.Manifest.String(), Platform: st.Platform, Status: st.Status}
}

// withProfiles adds what is known of an image's profiles. That it is not known is no reason to
// answer nothing.
func (s *server) withProfiles(ctx context.Context, images ...*Image) {
	if s.Profiles == nil {
		return
	}
	for _, i := range images {
		if i == nil || i.Digest == "" {
			continue
		}
		all, err := s.Profiles.OfImage(ctx, digest.Digest(i.Digest))
		if err != nil {
			s.Log.Error("cannot read the profiles of an image", "image", i.Image, "error", err)
			return
		}
		for _, st := range all {
			i.Profiles = append(i.Profiles, profileStatusOf(st))
		}
	}
}
