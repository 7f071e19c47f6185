package ledger

import (
	"bytes"
	"encoding/json"
	"fmt"
	"hash/maphash"

	"github.com/opencontainers/go-digest"
	"go.etcd.io/bbolt"
)

// check reads all rows, and the sizes of all parts, and returns an ErrDamaged for the first
// that does not agree with the others. What is in the parts is looked at when it is used.
func (l *Ledger) check(bt *bbolt.Tx) error {
	bad := func(words string, args ...any) error {
		return fmt.Errorf("%w: %s: %s", ErrDamaged, l.path, fmt.Sprintf(words, args...))
	}
	for _, name := range buckets {
		if bt.Bucket(name) == nil {
			return bad("table %s is missing", name)
		}
	}
	// Index rows are compared by the sums of their hashes, which needs neither memory
	// nor a search for each.
	seed, sums := maphash.MakeSeed(), map[string]uint64{}
	images, sizes := uint64(0), int64(0)
	err := bt.Bucket(bucketImages).ForEach(func(k, v []byte) error {
		var r row
		if err := json.Unmarshal(v, &r); err != nil {
			return bad("image %q: %v", k, err)
		}
		if r.Manifest != digest.Digest(k) || r.Manifest.Validate() != nil {
			return bad("image %q has the manifest %q", k, r.Manifest)
		}
		for _, i := range lines(&r) {
			sums[i.bucket] += maphash.String(seed, i.key)
		}
		images++
		sizes += r.Bytes
		return nil
	})
	if err != nil {
		return err
	}
	for _, name := range indexes {
		c := bt.Bucket(name).Cursor()
		for k, _ := c.First(); k != nil; k, _ = c.Next() {
			sums[string(name)] -= maphash.Bytes(seed, k)
		}
		if sums[string(name)] != 0 {
			return bad("index %s does not agree with the images", name)
		}
	}
	c := bt.Bucket(bucketParts).Cursor()
	for k, v := c.First(); k != nil; k, v = c.Next() {
		manifest, _, ok := bytes.Cut(k, []byte(" "))
		if !ok || bt.Bucket(bucketImages).Get(manifest) == nil {
			return bad("part %q is of no image", k)
		}
		sizes -= int64(len(v))
	}
	if sizes != 0 {
		return bad("parts are %d bytes smaller than is told", sizes)
	}
	if n := metaNumber(bt, keyImages); n != images {
		return bad("%d images are counted, there are %d", n, images)
	}
	return nil
}
