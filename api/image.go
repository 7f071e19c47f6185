package api

import (
	"time"

	"accel"
	"accel/readiness"
)

// Image is how an image stands, as the API tells it.
type Image struct {
	ID         string          `json:"id"`
	Image      string          `json:"image" doc:"the source by digest, or by tag while the digest is not known" example:"registry.example/team/app@sha256:..."`
	Repository string          `json:"repository" doc:"host and path"`
	Digest     string          `json:"digest,omitempty" doc:"of the source manifest or index; absent while only a tag is known"`
	Tags       []string        `json:"tags,omitempty" doc:"source tags that point to the digest now"`
	MediaType  string          `json:"mediaType,omitempty"`
	State      accel.State     `json:"state" enum:"Pending,Converting,Ready,Failed,Rejected,Superseded,Stale"`
	Final      bool            `json:"final" doc:"nothing more will happen by itself"`
	Reason     string          `json:"reason,omitempty" doc:"why it is in this state"`
	Rule       string          `json:"rule,omitempty" doc:"the policy rule that rejected it"`
	Origin     string          `json:"origin" doc:"what brought it first: a webhook source, api or reconcile"`
	Attempts   int             `json:"attempts" doc:"conversions begun since the last push or retry"`
	NextTry    *time.Time      `json:"nextTry,omitempty" doc:"when a Failed or Pending image is tried again"`
	Successor  string          `json:"successor,omitempty" doc:"id of the image that took over from a Superseded one"`
	CreatedAt  time.Time       `json:"createdAt"`
	UpdatedAt  time.Time       `json:"updatedAt" doc:"of the last change of state"`
	CheckedAt  *time.Time      `json:"checkedAt,omitempty" doc:"when the target was last seen in the registry"`
	Params     string          `json:"params" doc:"conversion parameters"`
	Target     *Target         `json:"target,omitempty"`
	Sizes      *Sizes          `json:"sizes,omitempty"`
	Timings    *Timings        `json:"timings,omitempty"`
	Platforms  []string        `json:"platforms,omitempty"`
	Notes      []string        `json:"notes,omitempty" doc:"what was carried over or dropped, and by which rule"`
	Profiles   []ProfileStatus `json:"profiles,omitempty" doc:"what is known of the starts of each platform"`
	Previous   *Image          `json:"previous,omitempty" doc:"the Ready image that the tag had before, while a newer push is in work"`
}

// Target is where the converted image is.
type Target struct {
	Image      string   `json:"image" doc:"by digest"`
	Repository string   `json:"repository"`
	Digest     string   `json:"digest"`
	Tags       []string `json:"tags,omitempty"`
}

// Sizes in bytes: source and target compressed over all platforms, uncompressed
// of the largest platform.
type Sizes struct {
	SourceBytes       int64 `json:"sourceBytes"`
	TargetBytes       int64 `json:"targetBytes"`
	UncompressedBytes int64 `json:"uncompressedBytes"`
}

// Timings in seconds: waiting for a worker, the phases after it, and all of it.
type Timings struct {
	QueuedSeconds  float64 `json:"queuedSeconds"`
	ConvertSeconds float64 `json:"convertSeconds"`
	PushSeconds    float64 `json:"pushSeconds"`
	VerifySeconds  float64 `json:"verifySeconds"`
	TotalSeconds   float64 `json:"totalSeconds"`
}

func imageOf(r accel.Record) Image {
	i := Image{
		ID: r.ID, Image: r.Image(), Repository: r.Repository, Digest: r.Digest.String(), Tags: r.Tags, MediaType: r.MediaType,
		State: r.State, Final: r.Final(), Reason: r.Reason, Rule: r.Rule, Origin: r.Origin, Attempts: r.Attempts,
		Successor: r.SuccessorID, CreatedAt: r.CreatedAt, UpdatedAt: r.UpdatedAt, Params: r.Params,
		Platforms: r.Result.Platforms, Notes: r.Result.Notes,
	}
	if (r.State == accel.Failed || r.State == accel.Pending) && !r.DueAt.IsZero() {
		i.NextTry = &r.DueAt
	}
	if !r.CheckedAt.IsZero() {
		i.CheckedAt = &r.CheckedAt
	}
	if r.Target.Digest != "" {
		i.Target = &Target{
			Image: r.Target.Repository + "@" + r.Target.Digest.String(), Repository: r.Target.Repository,
			Digest: r.Target.Digest.String(), Tags: r.Target.Tags,
		}
		i.Sizes = &Sizes{SourceBytes: r.Result.SourceBytes, TargetBytes: r.Result.TargetBytes, UncompressedBytes: r.Result.UncompressedBytes}
		i.Timings = &Timings{
			QueuedSeconds: r.Result.Queued.Seconds(), ConvertSeconds: r.Result.Convert.Seconds(), PushSeconds: r.Result.Push.Seconds(),
			VerifySeconds: r.Result.Verify.Seconds(), TotalSeconds: r.Result.Total.Seconds(),
		}
	}
	return i
}

func statusOf(s readiness.Status) Image {
	i := imageOf(s.Record)
	if s.Previous != nil {
		p := imageOf(*s.Previous)
		i.Previous = &p
	}
	return i
}
