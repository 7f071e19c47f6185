package boltstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"accel"
	"accel/readiness"

	"github.com/opencontainers/go-digest"
	"go.etcd.io/bbolt"
)

// tx is one readiness.Tx. Several updates that are committed together share one, one
// after the other.
type tx struct {
	ctx    context.Context
	bt     *bbolt.Tx
	writes int // writes begun so far; an update that fails after one spoils the transaction
}

var errReadOnly = errors.New("write in a View of the store")

// bucket returns one that Open has made sure of.
func (t *tx) bucket(name []byte) *bbolt.Bucket {
	b := t.bt.Bucket(name)
	if fill, ok := appended[string(name)]; ok {
		b.FillPercent = fill
	}
	return b
}

// write is called before each write.
func (t *tx) write() error {
	if !t.bt.Writable() {
		return errReadOnly
	}
	t.writes++
	return nil
}

func (t *tx) seqOf(id string) (uint64, bool, error) {
	v := t.bucket(bucketIDs).Get([]byte(id))
	if v == nil {
		return 0, false, nil
	}
	seq, err := lastSeq(v)
	return seq, true, err
}

func (t *tx) bySeq(seq uint64) (readiness.Entry, error) {
	v := t.bucket(bucketRecords).Get(number(seq))
	if v == nil {
		return readiness.Entry{}, fmt.Errorf("%w: an index names record number %d, which is not there", ErrDamaged, seq)
	}
	return decodeEntry(seq, v)
}

func (t *tx) Get(id string) (readiness.Entry, error) {
	seq, ok, err := t.seqOf(id)
	if err != nil {
		return readiness.Entry{}, err
	}
	if !ok {
		return readiness.Entry{}, fmt.Errorf("%w: record %q", accel.ErrNotFound, id)
	}
	return t.bySeq(seq)
}

func (t *tx) Put(e readiness.Entry) error {
	if err := t.write(); err != nil {
		return err
	}
	if e.ID == "" {
		return fmt.Errorf("%w: record without an id", accel.ErrInvalid)
	}
	seq, known, err := t.seqOf(e.ID)
	if err != nil {
		return err
	}
	var was *readiness.Entry
	if known {
		old, err := t.bySeq(seq)
		if err != nil {
			return err
		}
		was = &old
	} else {
		if seq, err = t.bucket(bucketRecords).NextSequence(); err != nil {
			return err
		}
		if err := t.bucket(bucketIDs).Put([]byte(e.ID), number(seq)); err != nil {
			return err
		}
	}
	e.Seq = seq
	if err := t.reindex(was, &e); err != nil {
		return err
	}
	return t.bucket(bucketRecords).Put(number(seq), encodeEntry(&e))
}

func (t *tx) Delete(id string) error {
	if err := t.write(); err != nil {
		return err
	}
	e, err := t.Get(id)
	if err != nil {
		return err
	}
	if err := t.reindex(&e, nil); err != nil {
		return err
	}
	if err := t.MoveMappings(id, ""); err != nil {
		return err
	}
	if err := t.bucket(bucketIDs).Delete([]byte(id)); err != nil {
		return err
	}
	return t.bucket(bucketRecords).Delete(number(e.Seq))
}

// newest calls each with the record numbers of the keys with the prefix, largest first, below
// before (zero: all), until it returns false. The prefix is all of the key but the number.
func (t *tx) newest(bucket, prefix []byte, before uint64, each func(seq uint64, value []byte) (bool, error)) error {
	c := t.bucket(bucket).Cursor()
	if before == 0 {
		before = ^uint64(0)
	}
	var v []byte
	k, _ := c.Seek(join(prefix, number(before)))
	if k == nil {
		k, v = c.Last()
	} else {
		k, v = c.Prev()
	}
	for ; k != nil && bytes.HasPrefix(k, prefix); k, v = c.Prev() {
		if err := t.ctx.Err(); err != nil {
			return err
		}
		seq, err := lastSeq(k)
		if err != nil {
			return err
		}
		if more, err := each(seq, v); !more || err != nil {
			return err
		}
	}
	return nil
}

func (t *tx) ByDigest(repository string, d digest.Digest, limit int) ([]readiness.Entry, error) {
	var es []readiness.Entry
	err := t.newest(bucketDigests, hash(repository, string(d)), 0, func(seq uint64, _ []byte) (bool, error) {
		if len(es) >= limit {
			return false, nil
		}
		e, err := t.bySeq(seq)
		es = append(es, e)
		return true, err
	})
	return es, err
}

func (t *tx) Next(q readiness.Queue) (readiness.Entry, error) {
	prefix := []byte{byte(q)}
	k, _ := t.bucket(bucketDue).Cursor().Seek(prefix)
	if !bytes.HasPrefix(k, prefix) {
		return readiness.Entry{}, fmt.Errorf("%w: the queue is empty", accel.ErrNotFound)
	}
	seq, err := lastSeq(k)
	if err != nil {
		return readiness.Entry{}, err
	}
	return t.bySeq(seq)
}

func (t *tx) Unfolded(repository string) (bool, error) {
	prefix := hash(repository)
	k, _ := t.bucket(bucketUnfolded).Cursor().Seek(prefix)
	return bytes.HasPrefix(k, prefix), nil
}

func (t *tx) List(state accel.State, repository string, before uint64, limit int) ([]readiness.Entry, error) {
	var code []byte
	if state != "" {
		var err error
		if code, err = stateByte(state); err != nil {
			return nil, err
		}
	}
	bucket, prefix := bucketRecords, []byte(nil)
	switch {
	case repository != "":
		bucket, prefix = bucketRepos, hash(repository)
	case state != "":
		bucket, prefix = bucketStates, code
	}
	var es []readiness.Entry
	err := t.newest(bucket, prefix, before, func(seq uint64, value []byte) (bool, error) {
		if len(es) >= limit {
			return false, nil
		}
		if repository != "" && state != "" && !bytes.Equal(value, code) {
			return true, nil
		}
		e, err := t.bySeq(seq)
		es = append(es, e)
		return true, err
	})
	return es, err
}

func (t *tx) Counts() (map[accel.State]readiness.StateCount, error) {
	counts := map[accel.State]readiness.StateCount{}
	for _, s := range accel.States {
		code, err := stateByte(s)
		if err != nil {
			return nil, err
		}
		n := count(t.bucket(bucketMeta), join(keyCount, code))
		k, _ := t.bucket(bucketAges).Cursor().Seek(code)
		if n == 0 || !bytes.HasPrefix(k, code) {
			continue
		}
		seq, err := lastSeq(k)
		if err != nil {
			return nil, err
		}
		e, err := t.bySeq(seq)
		if err != nil {
			return nil, err
		}
		counts[s] = readiness.StateCount{Count: int(n), Oldest: e.UpdatedAt}
	}
	return counts, nil
}
