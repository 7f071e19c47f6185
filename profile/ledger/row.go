package ledger

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"accel"
	"accel/profile"

	"github.com/opencontainers/go-digest"
	"go.etcd.io/bbolt"
)

// Buckets, with their keys and values. "hash" is 16 bytes, "time" 8 bytes big-endian.
var (
	bucketImages = []byte("images") // manifest -> row as JSON
	bucketParts  = []byte("parts")  // manifest, space, kind -> what profile.Pack made; the ids seen as they are

	// What follows from the rows alone; the values are empty.
	bucketUsed         = []byte("used")          // time of the last use, manifest
	bucketDue          = []byte("due")           // time of the next publication, manifest
	bucketByImage      = []byte("by-image")      // hash(image) manifest
	bucketByRepository = []byte("by-repository") // hash(repository) time of learning, manifest

	bucketMeta = []byte("meta") // format; images; bytes
)

var buckets = [][]byte{bucketImages, bucketParts, bucketUsed, bucketDue, bucketByImage, bucketByRepository, bucketMeta}

// indexes are the buckets whose rows follow from the images.
var indexes = [][]byte{bucketUsed, bucketDue, bucketByImage, bucketByRepository}

var (
	keyImages = []byte("images")
	keyBytes  = []byte("bytes")
)

// kind is what a part is.
type kind string

const (
	partPredicted kind = "predicted"
	partInherited kind = "inherited"
	partImported  kind = "imported"
	partListed    kind = "listed"  // by the image's maker
	partPaths     kind = "paths"   // by a person
	partSummary   kind = "summary" // of the starts that count
	partNext      kind = "next"    // of those that the profile foretold badly
	partSeen      kind = "seen"    // 8 bytes for each report that counted, the newest last
	partServed    kind = "served"  // the profile that follows from these
	partPublished kind = "published"
)

var kinds = []kind{partPredicted, partInherited, partImported, partListed, partPaths, partSummary, partNext, partSeen, partServed, partPublished}

// row is what is known of one platform manifest, but for its parts.
type row struct {
	Manifest digest.Digest `json:"manifest"`
	Layers   int           `json:"layers"`
	Places   []place       `json:"places"`
	UsedAt   time.Time     `json:"usedAt"`
	// Foretold says that the prediction was tried to its end, whatever became of it.
	Foretold bool `json:"foretold,omitempty"`
	// Foretells counts the predictions that failed before.
	Foretells int `json:"foretells,omitempty"`
	// Bytes is the sum of the parts.
	Bytes int64 `json:"bytes"`

	Served servedRow `json:"served,omitzero"`
	Starts startsRow `json:"starts,omitzero"`

	// Published is the version that the places have; empty: none.
	Published   digest.Digest `json:"published,omitempty"`
	PublishedAt time.Time     `json:"publishedAt,omitzero"`
	// DueAt is when it is to be published next; zero: as things are, not.
	DueAt time.Time `json:"dueAt,omitzero"`
	// Tries counts publications that failed since the last that worked.
	Tries int `json:"tries,omitempty"`
}

// servedRow describes the profile that stands.
type servedRow struct {
	Origin    accel.ProfileOrigin `json:"origin"`
	Version   digest.Digest       `json:"version"`
	Bytes     int64               `json:"bytes"`
	Items     int                 `json:"items"`
	UpdatedAt time.Time           `json:"updatedAt"`
}

// startsRow adds up what was reported.
type startsRow struct {
	Count int64 `json:"count"`
	// Kept and Complete are the summary's.
	Kept     int `json:"kept"`
	Complete int `json:"complete"`
	// Bar is the summary's: what ranks behind it need not be added.
	Bar string `json:"bar,omitempty"`
	// Covered counts the complete starts that Share and Vain are of.
	Covered int64   `json:"covered"`
	Share   float64 `json:"share"`
	Vain    float64 `json:"vain"` // bytes
	// Answered starts, by whether a profile was fetched ahead, and their time.
	With    int64         `json:"with"`
	Without int64         `json:"without"`
	TookW   time.Duration `json:"tookWithNs"`
	TookWO  time.Duration `json:"tookWithoutNs"`
}

// place is an image that a manifest belongs to, and where its profile is published.
type place struct {
	Image
	LearnedAt time.Time `json:"learnedAt"`
	// Artifact is the published one's digest; Stale are former ones that could not be
	// deleted.
	Artifact digest.Digest   `json:"artifact,omitempty"`
	Stale    []digest.Digest `json:"stale,omitempty"`
}

const hashBytes = 16

// hash stands for names in keys.
func hash(parts ...string) []byte {
	h := sha256.New()
	for _, p := range parts {
		h.Write([]byte(p))
		h.Write([]byte{0})
	}
	return h.Sum(nil)[:hashBytes]
}

func number(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

// moment makes a time sort as a key; before 1970 is as good as 1970.
func moment(t time.Time) []byte { return number(uint64(max(0, t.UnixMicro()))) }

func timeOf(key []byte) time.Time {
	return time.UnixMicro(int64(binary.BigEndian.Uint64(key))).UTC()
}

// line is one row of an index.
type line struct{ bucket, key string }

// lines are the index rows of r.
func lines(r *row) []line {
	all := []line{{string(bucketUsed), string(moment(r.UsedAt)) + r.Manifest.String()}}
	if !r.DueAt.IsZero() {
		all = append(all, line{string(bucketDue), string(moment(r.DueAt)) + r.Manifest.String()})
	}
	images, repositories := map[string]bool{}, map[string]bool{}
	for _, p := range r.Places {
		image := string(hash(p.Digest.String())) + r.Manifest.String()
		if !images[image] {
			images[image] = true
			all = append(all, line{string(bucketByImage), image})
		}
		repository := string(hash(p.Repository)) + string(moment(p.LearnedAt)) + r.Manifest.String()
		if !repositories[repository] {
			repositories[repository] = true
			all = append(all, line{string(bucketByRepository), repository})
		}
	}
	return all
}

func partKey(manifest digest.Digest, k kind) []byte {
	return []byte(manifest.String() + " " + string(k))
}

// get reads a manifest's row. accel.ErrNotFound where there is none.
func (l *Ledger) get(bt *bbolt.Tx, manifest digest.Digest) (*row, error) {
	raw := bt.Bucket(bucketImages).Get([]byte(manifest))
	if raw == nil {
		return nil, fmt.Errorf("%w: no image with platform manifest %.100s is known", accel.ErrNotFound, manifest)
	}
	r := &row{}
	if err := json.Unmarshal(raw, r); err != nil {
		return nil, fmt.Errorf("%w: %s: image %s: %w", ErrDamaged, l.path, manifest, err)
	}
	return r, nil
}

func metaNumber(bt *bbolt.Tx, key []byte) uint64 {
	if raw := bt.Bucket(bucketMeta).Get(key); len(raw) == 8 {
		return binary.BigEndian.Uint64(raw)
	}
	return 0
}

// put replaces a manifest's row, and the parts that are given (nil takes one away). A nil r
// removes all of it.
func (l *Ledger) put(bt *bbolt.Tx, manifest digest.Digest, r *row, parts map[kind][]byte) error {
	old, err := l.get(bt, manifest)
	if err != nil && (r == nil || !errors.Is(err, accel.ErrNotFound)) {
		return err
	}
	images, bytes := metaNumber(bt, keyImages), int64(metaNumber(bt, keyBytes))
	if err == nil {
		images--
		bytes -= old.Bytes
		for _, i := range lines(old) {
			if err := bt.Bucket([]byte(i.bucket)).Delete([]byte(i.key)); err != nil {
				return err
			}
		}
	}
	if r == nil {
		for _, k := range kinds {
			if err := bt.Bucket(bucketParts).Delete(partKey(manifest, k)); err != nil {
				return err
			}
		}
		if err := bt.Bucket(bucketImages).Delete([]byte(manifest)); err != nil {
			return err
		}
		return l.putCounts(bt, images, bytes)
	}
	b := bt.Bucket(bucketParts)
	for k, content := range parts {
		key := partKey(manifest, k)
		if content == nil {
			err = b.Delete(key)
		} else {
			err = b.Put(key, content)
		}
		if err != nil {
			return err
		}
	}
	r.Bytes = 0
	for _, k := range kinds {
		r.Bytes += int64(len(b.Get(partKey(manifest, k))))
	}
	raw, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := bt.Bucket(bucketImages).Put([]byte(manifest), raw); err != nil {
		return err
	}
	for _, i := range lines(r) {
		if err := bt.Bucket([]byte(i.bucket)).Put([]byte(i.key), nil); err != nil {
			return err
		}
	}
	return l.putCounts(bt, images+1, bytes+r.Bytes)
}

func (l *Ledger) putCounts(bt *bbolt.Tx, images uint64, bytes int64) error {
	if err := bt.Bucket(bucketMeta).Put(keyImages, number(images)); err != nil {
		return err
	}
	return bt.Bucket(bucketMeta).Put(keyBytes, number(uint64(max(0, bytes))))
}

// status is what r tells.
func (r *row) status() profile.Status {
	s := profile.Status{
		Origin: r.Served.Origin, Version: r.Served.Version, Bytes: r.Served.Bytes, Items: r.Served.Items, Starts: r.Starts.Count,
		UpdatedAt: r.Served.UpdatedAt,
	}
	if r.Starts.Covered > 0 {
		s.Coverage = &profile.StatusCoverage{Share: r.Starts.Share, VainBytes: int64(r.Starts.Vain)}
	}
	s.With = mean(r.Starts.With, r.Starts.TookW)
	s.Without = mean(r.Starts.Without, r.Starts.TookWO)
	return s
}

func mean(n int64, sum time.Duration) profile.StatusStarts {
	s := profile.StatusStarts{Count: n}
	if n > 0 {
		s.MeanSeconds = sum.Seconds() / float64(n)
	}
	return s
}
