package accel

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
)

// Profile says which parts of an image's files a start reads, in the order of
// their first use, so that a node can fetch them before they are missed. It is a
// hint: a wrong one costs bounded bytes and nothing else. Package profile makes
// and encodes it.
type Profile struct {
	// Manifest is the source PLATFORM manifest's digest.
	Manifest digest.Digest `json:"manifest"`
	Origin   ProfileOrigin `json:"origin"`
	// Starts is how many recorded starts it was folded from; 0 for any other Origin.
	Starts int `json:"starts,omitempty"`
	// RecordedAt is when the newest of these began, in whole seconds UTC; zero where
	// Starts is 0.
	RecordedAt time.Time `json:"recordedAt,omitzero"`
	// Items do not overlap.
	Items []ProfileItem `json:"items"`
}

// ProfileItem is one run of bytes of one file.
type ProfileItem struct {
	// Layer counts the image's layers from the lowest, which is 0.
	Layer int `json:"layer"`
	// Path is the file's name in that layer, clean, relative to the root:
	// "usr/bin/python3.11".
	Path   string `json:"path"`
	Offset int64  `json:"offset"` // in the file
	Bytes  int64  `json:"bytes"`  // more than 0
	// Content tells whether another image's file of that name is the same.
	Content ContentID `json:"content,omitzero"`
}

// ContentID is the beginning of the SHA-256 of a whole file; all zero: unknown.
// Twelve bytes do: two files that are taken for the same cost a fetch in vain.
type ContentID [12]byte

// ContentIDOf is d's, unknown unless d is a SHA-256.
func ContentIDOf(d digest.Digest) (id ContentID) {
	if d.Validate() != nil || d.Algorithm() != digest.SHA256 {
		return id
	}
	var sum [sha256.Size]byte
	if _, err := hex.Decode(sum[:], []byte(d.Encoded())); err != nil {
		return id
	}
	copy(id[:], sum[:])
	return id
}

// IsZero reports whether the content is unknown.
func (id ContentID) IsZero() bool { return id == ContentID{} }

func (id ContentID) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(id[:])), nil }

// UnmarshalText reads what MarshalText writes. The error is an ErrInvalid.
func (id *ContentID) UnmarshalText(text []byte) error {
	if len(text) != hex.EncodedLen(len(id)) {
		return fmt.Errorf("%w: content id %.40q: want %d hexadecimal digits", ErrInvalid, text, hex.EncodedLen(len(id)))
	}
	if _, err := hex.Decode(id[:], text); err != nil {
		return fmt.Errorf("%w: content id %.40q: %w", ErrInvalid, text, err)
	}
	return nil
}

// ProfileOrigin is how a profile came about.
type ProfileOrigin string

const (
	// ProfileRecorded: folded from what starts on nodes read.
	ProfileRecorded ProfileOrigin = "recorded"
	// ProfilePredicted: read from the image itself, nothing was run.
	ProfilePredicted ProfileOrigin = "predicted"
	// ProfileInherited: an older image's, for the files that are the same.
	ProfileInherited ProfileOrigin = "inherited"
	// ProfileImported: given as a profile by a person or another service.
	ProfileImported ProfileOrigin = "imported"
	// ProfileListed: from a list of paths that the image's maker wrote.
	ProfileListed ProfileOrigin = "listed"
)

// Valid reports whether o is one of the above.
func (o ProfileOrigin) Valid() bool {
	switch o {
	case ProfileRecorded, ProfilePredicted, ProfileInherited, ProfileImported, ProfileListed:
		return true
	}
	return false
}

// Bytes is the sum of the items.
func (p Profile) Bytes() (n int64) {
	for _, i := range p.Items {
		n += i.Bytes
	}
	return n
}
