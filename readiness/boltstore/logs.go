package boltstore

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"

	"accel"
	"accel/readiness"

	"github.com/opencontainers/go-digest"
)

func (t *tx) Tag(repository, tag string) (readiness.TagPointer, error) {
	v := t.bucket(bucketTags).Get(hash(repository, tag))
	if v == nil {
		return readiness.TagPointer{}, fmt.Errorf("%w: tag %s:%s", accel.ErrNotFound, repository, tag)
	}
	return decodePointer(v)
}

func (t *tx) PutTag(repository, tag string, p readiness.TagPointer) error {
	if err := t.write(); err != nil {
		return err
	}
	return t.bucket(bucketTags).Put(hash(repository, tag), encodePointer(&p))
}

func (t *tx) DeleteTag(repository, tag string) error {
	if err := t.write(); err != nil {
		return err
	}
	return t.bucket(bucketTags).Delete(hash(repository, tag))
}

func (t *tx) Alias(id string) (string, error) {
	v := t.bucket(bucketAliases).Get([]byte(id))
	if v == nil {
		return "", fmt.Errorf("%w: alias %q", accel.ErrNotFound, id)
	}
	return string(v), nil
}

func (t *tx) PutAlias(id, heir string) error {
	b := t.bucket(bucketAliases)
	if heir == "" && b.Get([]byte(id)) == nil {
		return nil
	}
	if err := t.write(); err != nil {
		return err
	}
	if heir == "" {
		return b.Delete([]byte(id))
	}
	return b.Put([]byte(id), []byte(heir))
}

func (t *tx) AppendEvent(e readiness.Event) (uint64, error) {
	if err := t.write(); err != nil {
		return 0, err
	}
	b := t.bucket(bucketEvents)
	var err error
	if e.Seq, err = b.NextSequence(); err != nil {
		return 0, err
	}
	v, err := json.Marshal(e)
	if err != nil {
		return 0, err
	}
	if e.Seq > readiness.EventsKept {
		if err := b.Delete(number(e.Seq - readiness.EventsKept)); err != nil {
			return 0, err
		}
	}
	return e.Seq, b.Put(number(e.Seq), v)
}

func (t *tx) Events(after uint64, limit int) (evs []readiness.Event, first uint64, err error) {
	c := t.bucket(bucketEvents).Cursor()
	k, v := c.First()
	if k == nil {
		return nil, 0, nil
	}
	if first, err = lastSeq(k); err != nil {
		return nil, 0, err
	}
	if after >= first {
		if after == ^uint64(0) {
			return nil, first, nil
		}
		k, v = c.Seek(number(after + 1))
	}
	for ; k != nil && len(evs) < limit; k, v = c.Next() {
		var e readiness.Event
		if err := json.Unmarshal(v, &e); err != nil {
			return nil, 0, fmt.Errorf("%w: an event: %w", ErrDamaged, err)
		}
		evs = append(evs, e)
	}
	return evs, first, nil
}

func (t *tx) PutMapping(id string, manifest digest.Digest, envelope []byte) error {
	if err := t.write(); err != nil {
		return err
	}
	seq, ok, err := t.seqOf(id)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("%w: record %q", accel.ErrNotFound, id)
	}
	return t.putMapping(seq, hash(string(manifest)), envelope)
}

func (t *tx) putMapping(seq uint64, manifest, envelope []byte) error {
	if err := t.bucket(bucketMapped).Put(join(manifest, number(seq)), nil); err != nil {
		return err
	}
	return t.bucket(bucketMappings).Put(join(number(seq), manifest), envelope)
}

func (t *tx) Mapping(repository string, manifest digest.Digest) ([]byte, error) {
	var envelope []byte
	h := hash(string(manifest))
	err := t.newest(bucketMapped, h, 0, func(seq uint64, _ []byte) (bool, error) {
		if repository != "" {
			e, err := t.bySeq(seq)
			if err != nil || e.Repository != repository {
				return true, err
			}
		}
		envelope = bytes.Clone(t.bucket(bucketMappings).Get(join(number(seq), h)))
		return false, nil
	})
	if err == nil && envelope == nil {
		err = fmt.Errorf("%w: no mapping for %s", accel.ErrNotFound, manifest)
	}
	return envelope, err
}

func (t *tx) MoveMappings(from, to string) error {
	seq, ok, err := t.seqOf(from)
	if err != nil || !ok {
		return err
	}
	var heir uint64
	if to != "" {
		if heir, ok, err = t.seqOf(to); err != nil {
			return err
		} else if !ok {
			return fmt.Errorf("%w: record %q", accel.ErrNotFound, to)
		}
	}
	prefix := number(seq)
	type mapping struct{ manifest, envelope []byte }
	var all []mapping // a cursor does not stand changes
	c := t.bucket(bucketMappings).Cursor()
	for k, v := c.Seek(prefix); bytes.HasPrefix(k, prefix); k, v = c.Next() {
		all = append(all, mapping{bytes.Clone(k[len(prefix):]), bytes.Clone(v)})
	}
	if len(all) == 0 || from == to {
		return nil
	}
	if err := t.write(); err != nil {
		return err
	}
	for _, m := range all {
		if err := t.bucket(bucketMappings).Delete(join(prefix, m.manifest)); err != nil {
			return err
		}
		if err := t.bucket(bucketMapped).Delete(join(m.manifest, prefix)); err != nil {
			return err
		}
		if to == "" {
			continue
		}
		if err := t.putMapping(heir, m.manifest, m.envelope); err != nil {
			return err
		}
	}
	return nil
}

func (t *tx) Announce(d digest.Digest) error {
	return t.remember(bucketAnnounced, bucketAnnouncedOrder, []byte(d), nil, readiness.AnnouncedKept)
}

func (t *tx) Announced(d digest.Digest) (bool, error) {
	return d != "" && t.bucket(bucketAnnounced).Get([]byte(d)) != nil, nil
}

func (t *tx) Memo(key string) ([]byte, error) {
	v := t.bucket(bucketMemos).Get([]byte(key))
	if len(v) < 8 {
		return nil, fmt.Errorf("%w: memo %q", accel.ErrNotFound, key)
	}
	return bytes.Clone(v[8:]), nil
}

func (t *tx) PutMemo(key string, value []byte) error {
	return t.remember(bucketMemos, bucketMemosOrder, []byte(key), value, readiness.MemosKept)
}

// remember stores key and value with the next order number, and forgets what was
// written more than keep writes ago.
func (t *tx) remember(values, orders, key, value []byte, keep uint64) error {
	if err := t.write(); err != nil {
		return err
	}
	v, o := t.bucket(values), t.bucket(orders)
	if old := v.Get(key); len(old) >= 8 {
		if err := o.Delete(bytes.Clone(old[:8])); err != nil {
			return err
		}
	}
	order, err := o.NextSequence()
	if err != nil {
		return err
	}
	if err := o.Put(number(order), key); err != nil {
		return err
	}
	if err := v.Put(key, join(number(order), value)); err != nil {
		return err
	}
	if order <= keep {
		return nil
	}
	k, old := o.Cursor().First()
	if k == nil || binary.BigEndian.Uint64(k) > order-keep {
		return nil
	}
	if err := v.Delete(bytes.Clone(old)); err != nil {
		return err
	}
	return o.Delete(bytes.Clone(k))
}
