package fleet

import (
	"bytes"
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"accel"

	"go.etcd.io/bbolt"
)

// Buckets, with their keys and values. "hash" is 16 bytes, "time" 8 bytes big-endian,
// "order" is the time of creation and the id, so that keys sort by them.
var (
	bucketNodes = []byte("nodes") // name -> node as JSON
	bucketWarms = []byte("warms") // id -> warm as JSON

	// What follows from the warms alone; the values are empty.
	bucketAll      = []byte("all")      // order
	bucketByNode   = []byte("by-node")  // hash(node) order
	bucketByImage  = []byte("by-image") // hash(image) order; by what was asked for, and by digest
	bucketPending  = []byte("pending")  // hash(node) order
	bucketFetching = []byte("fetching") // hash(node) order
	bucketFinished = []byte("finished") // time of the last change, id

	bucketReady      = []byte("ready")       // hash(repository, tag or digest) -> time, ready image as JSON
	bucketReadyOrder = []byte("ready-order") // time, key of bucketReady -> nothing

	bucketMeta = []byte("meta") // format; position; "count" state -> number of warms
)

var buckets = [][]byte{
	bucketNodes, bucketWarms, bucketAll, bucketByNode, bucketByImage, bucketPending, bucketFetching, bucketFinished,
	bucketReady, bucketReadyOrder, bucketMeta,
}

// indexes are the buckets whose rows follow from the warms.
var indexes = [][]byte{bucketAll, bucketByNode, bucketByImage, bucketPending, bucketFetching, bucketFinished}

var (
	keyPosition = []byte("position")
	keyCount    = []byte("count ")
)

var warmStates = []accel.WarmState{accel.WarmPending, accel.WarmFetching, accel.WarmDone, accel.WarmFailed}

const (
	hashBytes  = 16
	idBytes    = 26
	orderBytes = 8 + idBytes
)

// hash stands for names in keys.
func hash(parts ...string) []byte {
	h := sha256.New()
	for _, p := range parts {
		h.Write([]byte(p))
		h.Write([]byte{0})
	}
	return h.Sum(nil)[:hashBytes]
}

// warmID derives Warm.ID.
func warmID(node, image string) string {
	return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(hash(node, image)))
}

func number(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

// moment makes a time sort as a key.
func moment(t time.Time) []byte { return number(micros(t)) }

// micros makes a time a number; before 1970 is as good as 1970.
func micros(t time.Time) uint64 { return uint64(max(0, t.UnixMicro())) }

// order sorts warms by their creation.
func order(w *accel.Warm) []byte { return append(moment(w.CreatedAt), w.ID...) }

// line is one row of an index.
type line struct{ bucket, key string }

// lines are the index rows of w.
func lines(w *accel.Warm) []line {
	at := order(w)
	all := make([]line, 0, 5)
	add := func(bucket []byte, key ...[]byte) {
		all = append(all, line{string(bucket), string(bytes.Join(key, nil))})
	}
	add(bucketAll, at)
	add(bucketByNode, hash(w.Node), at)
	add(bucketByImage, hash(w.Image), at)
	if by := digestName(w); by != w.Image {
		add(bucketByImage, hash(by), at)
	}
	switch w.State {
	case accel.WarmPending:
		add(bucketPending, hash(w.Node), at)
	case accel.WarmFetching:
		add(bucketFetching, hash(w.Node), at)
	default:
		add(bucketFinished, moment(w.UpdatedAt), []byte(w.ID))
	}
	return all
}

// digestName is w's image by digest, as far as that is known.
func digestName(w *accel.Warm) string {
	if w.Digest == "" {
		return w.Image
	}
	repository, _, _ := strings.Cut(w.Image, "@")
	if colon := strings.LastIndexByte(repository, ':'); colon > strings.LastIndexByte(repository, '/') {
		repository = repository[:colon]
	}
	return repository + "@" + w.Digest.String()
}

// warm reads a row; false where there is none.
func (c *change) warm(id string) (w accel.Warm, ok bool, err error) {
	v := c.bt.Bucket(bucketWarms).Get([]byte(id))
	if v == nil {
		return w, false, nil
	}
	if err := json.Unmarshal(v, &w); err != nil {
		return w, false, fmt.Errorf("%w: %s: warm %q: %w", ErrDamaged, c.path, id, err)
	}
	return w, true, nil
}

// put stores w in place of was (nil: it is new), and keeps indexes and counts in step.
func (c *change) put(was, w *accel.Warm) error {
	var before, after []line
	if was != nil {
		before = lines(was)
	}
	if w != nil {
		after = lines(w)
	}
	for _, l := range before {
		if slices.Contains(after, l) {
			continue
		}
		if err := c.bt.Bucket([]byte(l.bucket)).Delete([]byte(l.key)); err != nil {
			return err
		}
	}
	for _, l := range after {
		if slices.Contains(before, l) {
			continue
		}
		if err := c.bt.Bucket([]byte(l.bucket)).Put([]byte(l.key), nil); err != nil {
			return err
		}
	}
	if err := c.recount(was, w); err != nil {
		return err
	}
	if w == nil {
		return c.bt.Bucket(bucketWarms).Delete([]byte(was.ID))
	}
	v, err := json.Marshal(w)
	if err != nil {
		return err
	}
	return c.bt.Bucket(bucketWarms).Put([]byte(w.ID), v)
}

func (c *change) recount(was, w *accel.Warm) error {
	if was != nil && w != nil && was.State == w.State {
		return nil
	}
	step := func(s accel.WarmState, by uint64) error {
		return c.bt.Bucket(bucketMeta).Put(countKey(s), number(count(c.bt, s)+by))
	}
	if was != nil {
		if err := step(was.State, ^uint64(0)); err != nil { // minus one
			return err
		}
	}
	if w != nil {
		return step(w.State, 1)
	}
	return nil
}

func countKey(s accel.WarmState) []byte { return append(slices.Clone(keyCount), s...) }

func count(bt *bbolt.Tx, s accel.WarmState) uint64 { return readNumber(bt, countKey(s)) }

func readNumber(bt *bbolt.Tx, key []byte) uint64 {
	if v := bt.Bucket(bucketMeta).Get(key); len(v) == 8 {
		return binary.BigEndian.Uint64(v)
	}
	return 0
}

// idOf is the id that an index key ends in.
func (c *change) idOf(key []byte) (string, error) {
	if len(key) < orderBytes {
		return "", fmt.Errorf("%w: %s: an index key of %d bytes", ErrDamaged, c.path, len(key))
	}
	return string(key[len(key)-idBytes:]), nil
}

// led reads the warm that an index key leads to.
func (c *change) led(key []byte) (accel.Warm, error) {
	id, err := c.idOf(key)
	if err != nil {
		return accel.Warm{}, err
	}
	w, ok, err := c.warm(id)
	if err == nil && !ok {
		err = fmt.Errorf("%w: %s: an index leads to warm %q, which is not there", ErrDamaged, c.path, id)
	}
	return w, err
}

// oldest lists up to limit warms of an index with the prefix, oldest first.
func (c *change) oldest(bucket, prefix []byte, limit int) ([]accel.Warm, error) {
	var all []accel.Warm
	cur := c.bt.Bucket(bucket).Cursor()
	for k, _ := cur.Seek(prefix); k != nil && bytes.HasPrefix(k, prefix) && len(all) < limit; k, _ = cur.Next() {
		w, err := c.led(k)
		if err != nil {
			return nil, err
		}
		all = append(all, w)
	}
	return all, nil
}

// atLeast reports whether an index has n rows with the prefix.
func (c *change) atLeast(bucket, prefix []byte, n int) bool {
	cur := c.bt.Bucket(bucket).Cursor()
	for k, _ := cur.Seek(prefix); k != nil && bytes.HasPrefix(k, prefix); k, _ = cur.Next() {
		if n--; n <= 0 {
			return true
		}
	}
	return false
}
