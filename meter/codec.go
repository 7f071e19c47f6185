package meter

import (
	"fmt"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/encoding/protowire"
)

// Pulls are kept in protobuf's wire format, well below half their size as JSON. Field
// numbers are never used again for something else; an unknown one is skipped, a missing
// one is the zero value. The id is the row's key.
const (
	fieldImage = iota + 1
	fieldDigest
	fieldNode
	fieldMode
	fieldTenant
	fieldMemory
	fieldStart // nanoseconds since 1970
	fieldDuration
	fieldRegistry
	fieldPeer
	fieldCache
	fieldOutcome
	fieldReason
)

func encodePull(p *accel.Pull) []byte {
	w := make(writer, 0, 256)
	w.text(fieldImage, p.Image)
	w.text(fieldDigest, string(p.Digest))
	w.text(fieldNode, p.Node)
	w.text(fieldMode, string(p.Mode))
	w.text(fieldTenant, p.Tenant)
	w.number(fieldMemory, uint64(p.MemoryBytes))
	w.number(fieldStart, uint64(p.Start.UnixNano()))
	w.number(fieldDuration, uint64(p.Duration))
	w.number(fieldRegistry, uint64(p.RegistryBytes))
	w.number(fieldPeer, uint64(p.PeerBytes))
	w.number(fieldCache, uint64(p.CacheBytes))
	w.text(fieldOutcome, string(p.Outcome))
	w.text(fieldReason, p.Reason)
	return w
}

func decodePull(key, b []byte) (accel.Pull, error) {
	id, err := keyID(key)
	p := accel.Pull{ID: id, Start: time.Unix(0, 0).UTC()}
	if err != nil {
		return p, err
	}
	err = read(b, func(field protowire.Number, raw []byte, n uint64) error {
		switch field {
		case fieldImage:
			p.Image = string(raw)
		case fieldDigest:
			p.Digest = digest.Digest(raw)
		case fieldNode:
			p.Node = string(raw)
		case fieldMode:
			p.Mode = accel.PullMode(raw)
		case fieldTenant:
			p.Tenant = string(raw)
		case fieldMemory:
			p.MemoryBytes = int64(n)
		case fieldStart:
			p.Start = time.Unix(0, int64(n)).UTC()
		case fieldDuration:
			p.Duration = time.Duration(n)
		case fieldRegistry:
			p.RegistryBytes = int64(n)
		case fieldPeer:
			p.PeerBytes = int64(n)
		case fieldCache:
			p.CacheBytes = int64(n)
		case fieldOutcome:
			p.Outcome = accel.Outcome(raw)
		case fieldReason:
			p.Reason = string(raw)
		}
		return nil
	})
	return p, err
}

// writer appends fields; those of the zero value are left out.
type writer []byte

func (w *writer) bytes(field protowire.Number, b []byte) {
	if len(b) > 0 {
		*w = protowire.AppendTag(*w, field, protowire.BytesType)
		*w = protowire.AppendBytes(*w, b)
	}
}

func (w *writer) text(field protowire.Number, s string) { w.bytes(field, []byte(s)) }

func (w *writer) number(field protowire.Number, n uint64) {
	if n != 0 {
		*w = protowire.AppendTag(*w, field, protowire.VarintType)
		*w = protowire.AppendVarint(*w, n)
	}
}

// read calls each for every field of b: with its bytes or its number.
func read(b []byte, each func(field protowire.Number, raw []byte, n uint64) error) error {
	for len(b) > 0 {
		field, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return fmt.Errorf("%w: a row: %w", ErrDamaged, protowire.ParseError(n))
		}
		b = b[n:]
		var raw []byte
		var number uint64
		switch kind {
		case protowire.BytesType:
			raw, n = protowire.ConsumeBytes(b)
		case protowire.VarintType:
			number, n = protowire.ConsumeVarint(b)
		default:
			n = protowire.ConsumeFieldValue(field, kind, b)
		}
		if n < 0 {
			return fmt.Errorf("%w: field %d of a row: %w", ErrDamaged, field, protowire.ParseError(n))
		}
		b = b[n:]
		if err := each(field, raw, number); err != nil {
			return err
		}
	}
	return nil
}
