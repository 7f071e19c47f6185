package fleet

import (
	"encoding/json"
	"fmt"
	"hash/maphash"

	"accel"

	"go.etcd.io/bbolt"
)

// check reads everything and returns an ErrDamaged for the first row that does not agree
// with the others.
func (f *Fleet) check(bt *bbolt.Tx) error {
	bad := func(words string, args ...any) error {
		return fmt.Errorf("%w: %s: %s", ErrDamaged, f.path, fmt.Sprintf(words, args...))
	}
	for _, name := range buckets {
		if bt.Bucket(name) == nil {
			return bad("table %s is missing", name)
		}
	}
	// Index rows are compared by the sums of their hashes, which needs neither memory
	// nor a search for each.
	seed, sums := maphash.MakeSeed(), map[string]uint64{}
	counts := map[accel.WarmState]uint64{}
	err := bt.Bucket(bucketWarms).ForEach(func(k, v []byte) error {
		var w accel.Warm
		if err := json.Unmarshal(v, &w); err != nil {
			return bad("warm %q: %v", k, err)
		}
		if w.ID != string(k) || len(w.ID) != idBytes {
			return bad("warm %q has the id %q", k, w.ID)
		}
		counts[w.State]++
		for _, l := range lines(&w) {
			sums[l.bucket] += maphash.String(seed, l.key)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, name := range indexes {
		cur := bt.Bucket(name).Cursor()
		for k, _ := cur.First(); k != nil; k, _ = cur.Next() {
			sums[string(name)] -= maphash.Bytes(seed, k)
		}
		if sums[string(name)] != 0 {
			return bad("index %s does not agree with the warms", name)
		}
	}
	for _, s := range warmStates {
		if n := count(bt, s); n != counts[s] {
			return bad("%d warms are counted as %s, there are %d", n, s, counts[s])
		}
	}
	err = bt.Bucket(bucketReady).ForEach(func(k, v []byte) error {
		if len(k) != hashBytes || len(v) < 8 || json.Unmarshal(v[8:], new(readyImage)) != nil {
			return bad("ready image %x makes no sense", k)
		}
		return nil
	})
	if err == nil && rows(bt.Bucket(bucketReady)) != rows(bt.Bucket(bucketReadyOrder)) {
		err = bad("ready images and their order differ")
	}
	return err
}

func rows(b *bbolt.Bucket) int {
	n := 0
	cur := b.Cursor()
	for k, _ := cur.First(); k != nil; k, _ = cur.Next() {
		n++
	}
	return n
}
