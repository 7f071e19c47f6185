package boltstore

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"time"

	"accel"
	"accel/readiness"

	"go.etcd.io/bbolt"
)

// Buckets, with their keys and values. "hash" is 16 bytes, "seq" and "time" are 8 bytes
// big-endian, so that keys sort by them.
var (
	bucketRecords  = []byte("records")  // seq -> entry
	bucketIDs      = []byte("ids")      // record id -> seq
	bucketDigests  = []byte("digests")  // hash(repository, digest) seq -> nothing; children too
	bucketDue      = []byte("due")      // queue time seq -> nothing
	bucketStates   = []byte("states")   // state seq -> nothing
	bucketAges     = []byte("ages")     // state time seq -> nothing, by UpdatedAt
	bucketRepos    = []byte("repos")    // hash(repository) seq -> state
	bucketUnfolded = []byte("unfolded") // hash(repository) seq -> nothing

	bucketTags     = []byte("tags")     // hash(repository, tag) -> pointer
	bucketAliases  = []byte("aliases")  // old record id -> record id
	bucketEvents   = []byte("events")   // seq -> event as JSON
	bucketMappings = []byte("mappings") // record's seq hash(manifest) -> envelope
	bucketMapped   = []byte("mapped")   // hash(manifest) record's seq -> nothing

	bucketAnnounced      = []byte("announced")       // digest -> order
	bucketAnnouncedOrder = []byte("announced-order") // order -> digest
	bucketMemos          = []byte("memos")           // key -> order value
	bucketMemosOrder     = []byte("memos-order")     // order -> key

	bucketMeta = []byte("meta") // format; "count" state -> number of records
)

var buckets = [][]byte{
	bucketRecords, bucketIDs, bucketDigests, bucketDue, bucketStates, bucketAges, bucketRepos, bucketUnfolded,
	bucketTags, bucketAliases, bucketEvents, bucketMappings, bucketMapped,
	bucketAnnounced, bucketAnnouncedOrder, bucketMemos, bucketMemosOrder, bucketMeta,
}

var (
	keyFormat = []byte("format")
	keyCount  = []byte("count")
)

// indexes are the buckets whose rows follow from the entries alone.
var indexes = [][]byte{bucketDigests, bucketDue, bucketStates, bucketAges, bucketRepos, bucketUnfolded}

// appended are the buckets whose new keys are always the last ones: their pages can be
// filled where others are split in halves. Records leave room to grow.
var appended = map[string]float64{
	string(bucketRecords): 0.75, string(bucketEvents): 0.95, string(bucketMappings): 0.95,
	string(bucketAnnouncedOrder): 0.95, string(bucketMemosOrder): 0.95,
}

const hashBytes = 16

// hash stands for names in keys. The names must contain no NUL (they are references' parts).
func hash(parts ...string) []byte {
	h := sha256.New()
	for _, p := range parts {
		h.Write([]byte(p))
		h.Write([]byte{0})
	}
	return h.Sum(nil)[:hashBytes]
}

func number(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

// moment makes a time sort as a number; before 1970 is as good as 1970.
func moment(t time.Time) []byte { return number(uint64(max(0, t.UnixNano()))) }

func join(parts ...[]byte) []byte {
	var k []byte
	for _, p := range parts {
		k = append(k, p...)
	}
	return k
}

// lastSeq is the record's number, which index keys end in.
func lastSeq(key []byte) (uint64, error) {
	if len(key) < 8 {
		return 0, fmt.Errorf("%w: an index key of %d bytes", ErrDamaged, len(key))
	}
	return binary.BigEndian.Uint64(key[len(key)-8:]), nil
}

// stateByte is a state's code in keys. Codes are never used again for another state.
func stateByte(s accel.State) ([]byte, error) {
	switch s {
	case accel.Pending:
		return []byte{1}, nil
	case accel.Converting:
		return []byte{2}, nil
	case accel.Ready:
		return []byte{3}, nil
	case accel.Failed:
		return []byte{4}, nil
	case accel.Rejected:
		return []byte{5}, nil
	case accel.Superseded:
		return []byte{6}, nil
	case accel.Stale:
		return []byte{7}, nil
	default:
		return nil, fmt.Errorf("%w: record state %q", accel.ErrInvalid, s)
	}
}

// row is one line of an index.
type row struct{ bucket, key, value string }

// rows are the index lines of e.
func rows(e *readiness.Entry) ([]row, error) {
	state, err := stateByte(e.State)
	if err != nil {
		return nil, err
	}
	seq := number(e.Seq)
	all := make([]row, 0, 8+len(e.Children))
	add := func(bucket, value []byte, key ...[]byte) {
		all = append(all, row{string(bucket), string(join(key...)), string(value)})
	}
	if e.Digest != "" {
		add(bucketDigests, nil, hash(e.Repository, string(e.Digest)), seq)
	}
	for _, d := range e.Children {
		add(bucketDigests, nil, hash(e.Repository, string(d)), seq)
	}
	if q := e.Queue(); q != 0 {
		add(bucketDue, nil, []byte{byte(q)}, moment(e.DueAt), seq)
	}
	add(bucketStates, nil, state, seq)
	add(bucketAges, nil, state, moment(e.UpdatedAt), seq)
	add(bucketRepos, state, hash(e.Repository), seq)
	if e.MayFold() {
		add(bucketUnfolded, nil, hash(e.Repository), seq)
	}
	return all, nil
}

// reindex replaces the index lines of was by those of e; either may be nil.
func (t *tx) reindex(was, e *readiness.Entry) error {
	var before, after []row
	var err error
	if was != nil {
		if before, err = rows(was); err != nil {
			return err
		}
	}
	if e != nil {
		if after, err = rows(e); err != nil {
			return err
		}
	}
	kept := make(map[row]bool, len(before))
	for _, r := range after {
		kept[r] = true
	}
	there := make(map[row]bool, len(before))
	for _, r := range before {
		there[r] = true
		if kept[r] {
			continue
		}
		if err := t.bucket([]byte(r.bucket)).Delete([]byte(r.key)); err != nil {
			return err
		}
	}
	for _, r := range after {
		if there[r] {
			continue
		}
		if err := t.bucket([]byte(r.bucket)).Put([]byte(r.key), []byte(r.value)); err != nil {
			return err
		}
	}
	return t.recount(was, e)
}

func (t *tx) recount(was, e *readiness.Entry) error {
	if was != nil && e != nil && was.State == e.State {
		return nil
	}
	step := func(s accel.State, by uint64) error {
		code, err := stateByte(s)
		if err != nil {
			return err
		}
		key := join(keyCount, code)
		return t.bucket(bucketMeta).Put(key, number(count(t.bucket(bucketMeta), key)+by))
	}
	if was != nil {
		if err := step(was.State, ^uint64(0)); err != nil { // minus one
			return err
		}
	}
	if e != nil {
		return step(e.State, 1)
	}
	return nil
}

func count(meta *bbolt.Bucket, key []byte) uint64 {
	if v := meta.Get(key); len(v) == 8 {
		return binary.BigEndian.Uint64(v)
	}
	return 0
}
