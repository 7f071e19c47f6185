package profile

import (
	"fmt"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

// MediaType is that of an encoded profile.
const MediaType = accel.MediaTypeProfile

type wireProfile struct {
	Version    int                 `json:"v"`
	Manifest   digest.Digest       `json:"manifest"`
	Origin     accel.ProfileOrigin `json:"origin"`
	Starts     int                 `json:"starts,omitempty"`
	RecordedAt int64               `json:"recordedAt,omitempty"` // Unix seconds
	Layers     []wireLayer         `json:"layers"`
	Items      []int64             `json:"items"`
}

// Encode is p in canonical form: equal profiles give equal bytes. The error is an
// accel.ErrInvalid: an item out of bounds or said twice, no manifest, no origin.
func Encode(p accel.Profile) ([]byte, error) {
	if err := checkHead(p.Manifest, p.RecordedAt); err != nil {
		return nil, err
	}
	if !p.Origin.Valid() || p.Starts < 0 || (p.Origin != accel.ProfileRecorded && p.Starts > 0) || (p.Starts == 0 && !p.RecordedAt.IsZero()) {
		return nil, fmt.Errorf("%w: a profile of origin %.20q with %d starts, the newest at %v", accel.ErrInvalid, p.Origin, p.Starts, p.RecordedAt)
	}
	if err := checkAll(p.Items); err != nil {
		return nil, err
	}
	t := tableOf(p.Items)
	b := marshal(wireProfile{
		Version: wireVersion, Manifest: p.Manifest, Origin: p.Origin, Starts: p.Starts, RecordedAt: unix(p.RecordedAt),
		Layers: t.encode(), Items: t.numbers(p.Items),
	})
	if len(b) > MaxEncodedBytes {
		return nil, fmt.Errorf("%w: a profile of %d bytes is larger than %d", accel.ErrInvalid, len(b), MaxEncodedBytes)
	}
	return b, nil
}

// Decode reads what Encode wrote, from whoever sent it. The error is an
// accel.ErrInvalid that says where.
func Decode(b []byte) (accel.Profile, error) {
	var w wireProfile
	p, err := func() (p accel.Profile, err error) {
		if err := unmarshal(b, MaxEncodedBytes, &w); err != nil {
			return p, err
		}
		if w.Version != wireVersion {
			return p, fmt.Errorf("%w: version %d", accel.ErrInvalid, w.Version)
		}
		p = accel.Profile{Manifest: w.Manifest, Origin: w.Origin, Starts: w.Starts, RecordedAt: fromUnix(w.RecordedAt)}
		files, err := decodeFiles(w.Layers, maxPathsBytes)
		if err != nil {
			return p, err
		}
		if p.Items, err = itemsOf(files, w.Items, MaxItems); err != nil {
			return p, err
		}
		again, err := Encode(p)
		if err != nil {
			return p, err
		}
		return p, canonical(b, again)
	}()
	if err != nil {
		return accel.Profile{}, fmt.Errorf("profile: %w", err)
	}
	return p, nil
}

// Version is the digest of p's canonical form, empty where it has none.
func Version(p accel.Profile) digest.Digest {
	b, err := Encode(p)
	if err != nil {
		return ""
	}
	return digest.FromBytes(b)
}

func checkHead(manifest digest.Digest, at time.Time) error {
	if err := manifest.Validate(); err != nil {
		return fmt.Errorf("%w: manifest %.100q: %w", accel.ErrInvalid, manifest, err)
	}
	if !at.IsZero() && (at.Unix() <= 0 || at.Unix() > maxUnix || at.Nanosecond() != 0) {
		return fmt.Errorf("%w: recorded at %v", accel.ErrInvalid, at)
	}
	return nil
}

// maxUnix is the year 9999, the last that JSON's times know.
const maxUnix = 253402300799

func unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

func fromUnix(s int64) time.Time {
	if s == 0 {
		return time.Time{}
	}
	return time.Unix(s, 0).UTC()
}
