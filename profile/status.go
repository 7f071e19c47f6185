package profile

import (
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

// Status is what the service tells of an image's profile beside the profile itself.
type Status struct {
	Origin accel.ProfileOrigin `json:"origin,omitempty" doc:"how it came about: recorded, imported, inherited, predicted or listed; absent where there is none"`
	// Version is the digest of the profile's canonical form.
	Version digest.Digest `json:"version,omitempty" doc:"digest of the profile; it is the ETag too"`
	Bytes   int64         `json:"bytes" doc:"content that it names"`
	Items   int           `json:"items" doc:"parts of files that it names"`
	// Starts is how many starts were reported in all, of which a sample is kept.
	Starts int64 `json:"starts" doc:"starts that nodes reported"`
	// Coverage compares the profile that stood at each of the latest starts with what was
	// read then, newer ones weighing more; nil before the first.
	Coverage *StatusCoverage `json:"coverage,omitempty"`
	// With and Without are the starts that answered, by whether a profile was fetched ahead.
	With    StatusStarts `json:"withProfile" doc:"starts that were measured until the answer, with a profile fetched ahead"`
	Without StatusStarts `json:"withoutProfile" doc:"those without"`
	// UpdatedAt is when the profile became what it is.
	UpdatedAt time.Time `json:"updatedAt,omitzero"`
}

// StatusCoverage is a moving figure over starts.
type StatusCoverage struct {
	Share     float64 `json:"share" doc:"of the bytes that complete starts read, those that the profile named"`
	VainBytes int64   `json:"vainBytes" doc:"bytes that the profile named and a start did not read, on average"`
}

// StatusStarts adds starts up.
type StatusStarts struct {
	Count       int64   `json:"count"`
	MeanSeconds float64 `json:"meanSeconds" doc:"from the mount to the program's answer; 0 where there is none"`
}
