package meter

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
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

	// Of the ledger, which keeps many. Names are those of its table, the empty text's left out.
	fieldImageName
	fieldNodeName
	fieldTenantName
	fieldSHA256 // of the digest, 32 bytes
	fieldPlace  // of outcome and mode as in a row's counts, and one more
	fieldPastID // nanoseconds from the id's millisecond to the start, and one more

	// Of lazy pulls.
	fieldFirstByte
	fieldComplete
	fieldMisses
	fieldWaited
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
	w.lazy(p.Lazy)
	return w
}

// lazy adds what only lazy pulls have.
func (w *writer) lazy(p accel.LazyPull) {
	w.number(fieldFirstByte, uint64(p.FirstByte))
	w.number(fieldComplete, uint64(p.Complete))
	w.number(fieldMisses, uint64(p.Misses))
	w.number(fieldWaited, uint64(p.Waited))
}

// encodeKept is encodePull with what the ledger can say in fewer bytes. name is the short form of a text;
// nil where it has none.
func encodeKept(p *accel.Pull, name func(string) ([]byte, error)) ([]byte, error) {
	w := make(writer, 0, 128)
	for _, t := range []struct {
		text        string
		long, short protowire.Number
	}{{p.Image, fieldImage, fieldImageName}, {p.Node, fieldNode, fieldNodeName}, {p.Tenant, fieldTenant, fieldTenantName}} {
		n, err := name(t.text)
		switch {
		case err != nil:
			return nil, err
		case n == nil:
			w.text(t.long, t.text)
		default:
			w.number(t.short, uint64(binary.BigEndian.Uint32(n)))
		}
	}
	encoded, is := strings.CutPrefix(string(p.Digest), "sha256:")
	if sum, err := hex.DecodeString(encoded); is && err == nil {
		w.bytes(fieldSHA256, sum)
	} else {
		w.text(fieldDigest, string(p.Digest))
	}
	w.number(fieldPlace, uint64(slices.Index(outcomes, p.Outcome)*placesOfMode+slices.Index(modes, p.Mode)+1))
	w.number(fieldMemory, uint64(p.MemoryBytes))
	w.number(fieldPastID, uint64(p.Start.Sub(p.Start.Truncate(time.Millisecond))+1))
	w.number(fieldDuration, uint64(p.Duration))
	w.number(fieldRegistry, uint64(p.RegistryBytes))
	w.number(fieldPeer, uint64(p.PeerBytes))
	w.number(fieldCache, uint64(p.CacheBytes))
	w.text(fieldReason, p.Reason)
	w.lazy(p.Lazy)
	return w, nil
}

// decodePull reads a pull, with the texts of names; nil: a spool, which has none.
func decodePull(key, b []byte, text func(name uint32) string) (accel.Pull, error) {
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
		case fieldImageName, fieldNodeName, fieldTenantName:
			return named(&p, field, uint32(n), text)
		case fieldSHA256:
			p.Digest = digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString(raw))
		case fieldPlace:
			outcome, mode := (n-1)/placesOfMode, (n-1)%placesOfMode
			if outcome >= numOutcomes || mode >= numModes {
				return fmt.Errorf("%w: outcome and mode %d of a pull", ErrDamaged, n)
			}
			p.Outcome, p.Mode = outcomes[outcome], modes[mode]
		case fieldPastID:
			p.Start = time.UnixMilli(int64(binary.BigEndian.Uint64(key[:8]) >> 16)).Add(time.Duration(n - 1)).UTC()
		case fieldFirstByte:
			p.Lazy.FirstByte = time.Duration(n)
		case fieldComplete:
			p.Lazy.Complete = time.Duration(n)
		case fieldMisses:
			p.Lazy.Misses = int64(n)
		case fieldWaited:
			p.Lazy.Waited = time.Duration(n)
		}
		return nil
	})
	return p, err
}

// named sets what a pull has by name.
func named(p *accel.Pull, field protowire.Number, name uint32, text func(uint32) string) error {
	if text == nil {
		return fmt.Errorf("%w: a spooled pull with a name", ErrDamaged)
	}
	switch field {
	case fieldImageName:
		p.Image = text(name)
	case fieldNodeName:
		p.Node = text(name)
	default:
		p.Tenant = text(name)
	}
	return nil
}

// keptNames calls each for the names of a pull in the ledger.
func keptNames(b []byte, each func(name uint32)) error {
	return read(b, func(field protowire.Number, _ []byte, n uint64) error {
		if field >= fieldImageName && field <= fieldTenantName {
			each(uint32(n))
		}
		return nil
	})
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
