package cache

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/encoding/protowire"
)

// Rows of the index are a checksum over table, key and content, then the content in protobuf's
// wire format. The checksum makes a flipped bit in a bitmap of parts, which would
// serve a hole as content, a damaged index instead. Field numbers are never used
// again for something else; an unknown one is skipped, a missing one is the zero value.
const (
	fieldSize = iota + 1
	fieldAllocated
	fieldSeq
	fieldUsedAt
	fieldVisited
	fieldComplete
	fieldParts
	fieldMediaType
	fieldRaw
	fieldDigest // repeated
	fieldAt
)

// checksumBytes stand before each row's content.
const checksumBytes = 4

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(table, key string, content []byte) uint32 {
	sum := crc32.Update(0, castagnoli, []byte(table))
	sum = crc32.Update(sum, castagnoli, []byte(key))
	return crc32.Update(sum, castagnoli, content)
}

func sealRow(table, key string, content []byte) []byte {
	row := make([]byte, checksumBytes, checksumBytes+len(content))
	binary.LittleEndian.PutUint32(row, checksum(table, key, content))
	return append(row, content...)
}

func openRow(table, key string, row []byte) ([]byte, error) {
	if len(row) < checksumBytes || binary.LittleEndian.Uint32(row) != checksum(table, key, row[checksumBytes:]) {
		return nil, fmt.Errorf("%w: a row of table %s has a wrong checksum", ErrDamaged, table)
	}
	return row[checksumBytes:], nil
}

// blobRow is what the index has of a blob.
type blobRow struct {
	size, allocated int64
	seq             uint64
	usedAt          int64 // nanoseconds since 1970
	visited         bool
	complete        bool
	parts           bitmap // nil when complete
}

func (r *blobRow) encode() []byte {
	w := make(writer, 0, 48+len(r.parts)*8)
	w.number(fieldSize, uint64(r.size))
	w.number(fieldAllocated, uint64(r.allocated))
	w.number(fieldSeq, r.seq)
	w.number(fieldUsedAt, uint64(r.usedAt))
	w.flag(fieldVisited, r.visited)
	w.flag(fieldComplete, r.complete)
	if !r.complete {
		w.bytes(fieldParts, r.parts.bytes(partsOf(r.size)))
	}
	return w
}

func decodeBlob(b []byte) (r blobRow, err error) {
	var parts []byte
	err = read(b, func(field protowire.Number, v value) {
		switch field {
		case fieldSize:
			r.size = int64(v.n)
		case fieldAllocated:
			r.allocated = int64(v.n)
		case fieldSeq:
			r.seq = v.n
		case fieldUsedAt:
			r.usedAt = int64(v.n)
		case fieldVisited:
			r.visited = v.n != 0
		case fieldComplete:
			r.complete = v.n != 0
		case fieldParts:
			parts = v.raw
		}
	})
	if err != nil {
		return r, err
	}
	if r.size <= 0 || r.size > maxBlobBytes || r.allocated < 0 || r.allocated > 2*maxBlobBytes {
		return r, fmt.Errorf("%w: a blob of %d bytes in %d", ErrDamaged, r.size, r.allocated)
	}
	if !r.complete {
		r.parts, err = bitmapOf(parts, partsOf(r.size))
	}
	return r, err
}

// datedRow is a row of tags, lists of referrers, links and grants.
type datedRow struct {
	seq    uint64 // which of two was put later
	digest digest.Digest
	at     time.Time
}

func (r datedRow) encode() []byte {
	w := make(writer, 0, 96)
	w.number(fieldSeq, r.seq)
	if r.digest != "" {
		w.bytes(fieldDigest, []byte(r.digest))
	}
	if !r.at.IsZero() {
		w.number(fieldAt, uint64(r.at.UnixNano()))
	}
	return w
}

func decodeDated(b []byte) (r datedRow, err error) {
	err = read(b, func(field protowire.Number, v value) {
		switch field {
		case fieldSeq:
			r.seq = v.n
		case fieldDigest:
			r.digest = digest.Digest(v.raw)
		case fieldAt:
			r.at = time.Unix(0, int64(v.n)).UTC()
		}
	})
	if err == nil && r.digest != "" {
		_, err = keyOf(r.digest)
	}
	return r, err
}

type manifestRow struct {
	seq       uint64
	mediaType string
	raw       []byte
}

func (r manifestRow) encode() []byte {
	w := make(writer, 0, len(r.raw)+128)
	w.number(fieldSeq, r.seq)
	w.bytes(fieldMediaType, []byte(r.mediaType))
	w.bytes(fieldRaw, r.raw)
	return w
}

// decodeManifest's raw is a part of b.
func decodeManifest(b []byte) (r manifestRow, err error) {
	err = read(b, func(field protowire.Number, v value) {
		switch field {
		case fieldSeq:
			r.seq = v.n
		case fieldMediaType:
			r.mediaType = string(v.raw)
		case fieldRaw:
			r.raw = v.raw
		}
	})
	return r, err
}

func encodePins(digests []digest.Digest) []byte {
	var w writer
	for _, d := range digests {
		w.bytes(fieldDigest, []byte(d))
	}
	return w
}

func decodePins(b []byte) (digests []digest.Digest, err error) {
	var bad error
	err = read(b, func(field protowire.Number, v value) {
		if field != fieldDigest {
			return
		}
		if _, err := keyOf(digest.Digest(v.raw)); err != nil {
			bad = err
		}
		digests = append(digests, digest.Digest(v.raw))
	})
	if err == nil {
		err = bad
	}
	return digests, err
}

// Digests in keys: a byte for the algorithm, then the hash.
const (
	keySHA256 = 1
	keySHA512 = 2
)

// keyOf also is the check that a digest from outside is well-formed, and so can be
// a file's name.
func keyOf(d digest.Digest) (string, error) {
	if err := d.Validate(); err != nil {
		return "", fmt.Errorf("%w: digest %.80q: %w", accel.ErrInvalid, string(d), err)
	}
	var alg byte
	switch d.Algorithm() {
	case digest.SHA256:
		alg = keySHA256
	case digest.SHA512:
		alg = keySHA512
	default:
		return "", fmt.Errorf("%w: digest %.80q: only sha256 and sha512 are kept", accel.ErrInvalid, string(d))
	}
	raw, err := hex.DecodeString(d.Encoded())
	if err != nil {
		return "", fmt.Errorf("%w: digest %.80q: %w", accel.ErrInvalid, string(d), err)
	}
	return string(append([]byte{alg}, raw...)), nil
}

func digestOf(key string) (digest.Digest, error) {
	if len(key) > 0 {
		switch raw := key[1:]; {
		case key[0] == keySHA256 && len(raw) == digest.SHA256.Size():
			return digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString([]byte(raw))), nil
		case key[0] == keySHA512 && len(raw) == digest.SHA512.Size():
			return digest.NewDigestFromEncoded(digest.SHA512, hex.EncodeToString([]byte(raw))), nil
		}
	}
	return "", fmt.Errorf("%w: %d bytes that are no digest", ErrDamaged, len(key))
}

// writer appends fields; numbers of the zero value are left out.
type writer []byte

func (w *writer) bytes(field protowire.Number, b []byte) {
	*w = protowire.AppendTag(*w, field, protowire.BytesType)
	*w = protowire.AppendBytes(*w, b)
}

func (w *writer) number(field protowire.Number, n uint64) {
	if n != 0 {
		*w = protowire.AppendTag(*w, field, protowire.VarintType)
		*w = protowire.AppendVarint(*w, n)
	}
}

func (w *writer) flag(field protowire.Number, on bool) {
	if on {
		w.number(field, 1)
	}
}

// value is one field's content; which of the two is set, its wire type says.
type value struct {
	raw []byte
	n   uint64
}

// read calls each for every field of b.
func read(b []byte, each func(protowire.Number, value)) error {
	for len(b) > 0 {
		field, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return fmt.Errorf("%w: a row: %w", ErrDamaged, protowire.ParseError(n))
		}
		b = b[n:]
		var v value
		switch kind {
		case protowire.BytesType:
			v.raw, n = protowire.ConsumeBytes(b)
		case protowire.VarintType:
			v.n, n = protowire.ConsumeVarint(b)
		default:
			n = protowire.ConsumeFieldValue(field, kind, b)
		}
		if n < 0 {
			return fmt.Errorf("%w: field %d of a row: %w", ErrDamaged, field, protowire.ParseError(n))
		}
		b = b[n:]
		each(field, v)
	}
	return nil
}
