package boltstore

import (
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"accel"
	"accel/readiness"

	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/encoding/protowire"
)

// Entries and tag pointers are kept in protobuf's wire format, a third of their size as JSON:
// what is read is mapped into memory, so the rows' size is the service's. Field
// numbers are never used again for something else; an unknown one is skipped, a
// missing one is the zero value. Times are nanoseconds since 1970.
const (
	fieldID = iota + 1
	fieldRepository
	fieldDigest
	fieldTag // repeated
	fieldMediaType
	fieldParams
	fieldOrigin
	fieldState
	fieldReason
	fieldRule
	fieldAttempts
	fieldSuccessor
	fieldCreated
	fieldUpdated
	fieldDue
	fieldLease
	fieldChecked
	fieldTargetRepository
	fieldTargetDigest
	fieldTargetTag // repeated
	fieldSourceBytes
	fieldTargetBytes
	fieldUncompressedBytes
	fieldQueued
	fieldConvert
	fieldPush
	fieldVerify
	fieldTotal
	fieldPlatform // repeated
	fieldNote     // repeated
	fieldAsked
	fieldAgain
	fieldFolded
	fieldChild // repeated
	fieldAlias // repeated
)

func encodeEntry(e *readiness.Entry) []byte {
	w := make(writer, 0, 512)
	w.text(fieldID, e.ID)
	w.text(fieldRepository, e.Repository)
	w.digest(fieldDigest, e.Digest)
	w.texts(fieldTag, e.Tags)
	w.text(fieldMediaType, e.MediaType)
	w.text(fieldParams, e.Params)
	w.text(fieldOrigin, e.Origin)
	w.text(fieldState, string(e.State))
	w.text(fieldReason, e.Reason)
	w.text(fieldRule, e.Rule)
	w.number(fieldAttempts, int64(e.Attempts))
	w.text(fieldSuccessor, e.SuccessorID)
	w.time(fieldCreated, e.CreatedAt)
	w.time(fieldUpdated, e.UpdatedAt)
	w.time(fieldDue, e.DueAt)
	w.number(fieldLease, int64(e.Lease))
	w.time(fieldChecked, e.CheckedAt)
	w.text(fieldTargetRepository, e.Target.Repository)
	w.digest(fieldTargetDigest, e.Target.Digest)
	w.texts(fieldTargetTag, e.Target.Tags)
	w.number(fieldSourceBytes, e.Result.SourceBytes)
	w.number(fieldTargetBytes, e.Result.TargetBytes)
	w.number(fieldUncompressedBytes, e.Result.UncompressedBytes)
	w.number(fieldQueued, int64(e.Result.Queued))
	w.number(fieldConvert, int64(e.Result.Convert))
	w.number(fieldPush, int64(e.Result.Push))
	w.number(fieldVerify, int64(e.Result.Verify))
	w.number(fieldTotal, int64(e.Result.Total))
	w.texts(fieldPlatform, e.Result.Platforms)
	w.texts(fieldNote, e.Result.Notes)
	w.flag(fieldAsked, e.Asked)
	w.flag(fieldAgain, e.Again)
	w.flag(fieldFolded, e.Folded)
	for _, d := range e.Children {
		w.digest(fieldChild, d)
	}
	w.texts(fieldAlias, e.Aliases)
	return w
}

func decodeEntry(seq uint64, b []byte) (readiness.Entry, error) {
	e := readiness.Entry{Seq: seq}
	err := read(b, func(field protowire.Number, v value) {
		switch field {
		case fieldID:
			e.ID = v.text()
		case fieldRepository:
			e.Repository = v.text()
		case fieldDigest:
			e.Digest = v.digest()
		case fieldTag:
			e.Tags = append(e.Tags, v.text())
		case fieldMediaType:
			e.MediaType = v.text()
		case fieldParams:
			e.Params = v.text()
		case fieldOrigin:
			e.Origin = v.text()
		case fieldState:
			e.State = accel.State(v.text())
		case fieldReason:
			e.Reason = v.text()
		case fieldRule:
			e.Rule = v.text()
		case fieldAttempts:
			e.Attempts = int(v.number())
		case fieldSuccessor:
			e.SuccessorID = v.text()
		case fieldCreated:
			e.CreatedAt = v.time()
		case fieldUpdated:
			e.UpdatedAt = v.time()
		case fieldDue:
			e.DueAt = v.time()
		case fieldLease:
			e.Lease = uint64(v.number())
		case fieldChecked:
			e.CheckedAt = v.time()
		case fieldTargetRepository:
			e.Target.Repository = v.text()
		case fieldTargetDigest:
			e.Target.Digest = v.digest()
		case fieldTargetTag:
			e.Target.Tags = append(e.Target.Tags, v.text())
		case fieldAsked:
			e.Asked = v.number() != 0
		case fieldAgain:
			e.Again = v.number() != 0
		case fieldFolded:
			e.Folded = v.number() != 0
		case fieldChild:
			e.Children = append(e.Children, v.digest())
		case fieldAlias:
			e.Aliases = append(e.Aliases, v.text())
		default:
			decodeResult(&e.Result, field, v)
		}
	})
	return e, err
}

func decodeResult(r *accel.Result, field protowire.Number, v value) {
	switch field {
	case fieldSourceBytes:
		r.SourceBytes = v.number()
	case fieldTargetBytes:
		r.TargetBytes = v.number()
	case fieldUncompressedBytes:
		r.UncompressedBytes = v.number()
	case fieldQueued:
		r.Queued = time.Duration(v.number())
	case fieldConvert:
		r.Convert = time.Duration(v.number())
	case fieldPush:
		r.Push = time.Duration(v.number())
	case fieldVerify:
		r.Verify = time.Duration(v.number())
	case fieldTotal:
		r.Total = time.Duration(v.number())
	case fieldPlatform:
		r.Platforms = append(r.Platforms, v.text())
	case fieldNote:
		r.Notes = append(r.Notes, v.text())
	}
}

const (
	fieldPointerID = iota + 1
	fieldPointerAt
	fieldPointerMoved
	fieldPointerObserved
	fieldPointerReady
	fieldPointerIntake
)

func encodePointer(p *readiness.TagPointer) []byte {
	w := make(writer, 0, 96)
	w.text(fieldPointerID, p.ID)
	w.time(fieldPointerAt, p.At)
	w.time(fieldPointerMoved, p.MovedAt)
	w.flag(fieldPointerObserved, p.Observed)
	w.text(fieldPointerReady, p.ReadyID)
	w.text(fieldPointerIntake, p.IntakeID)
	return w
}

func decodePointer(b []byte) (p readiness.TagPointer, err error) {
	err = read(b, func(field protowire.Number, v value) {
		switch field {
		case fieldPointerID:
			p.ID = v.text()
		case fieldPointerAt:
			p.At = v.time()
		case fieldPointerMoved:
			p.MovedAt = v.time()
		case fieldPointerObserved:
			p.Observed = v.number() != 0
		case fieldPointerReady:
			p.ReadyID = v.text()
		case fieldPointerIntake:
			p.IntakeID = v.text()
		}
	})
	return p, err
}

// writer appends fields; those of the zero value are left out, but never a repeated one.
type writer []byte

func (w *writer) bytes(field protowire.Number, b []byte) {
	*w = protowire.AppendTag(*w, field, protowire.BytesType)
	*w = protowire.AppendBytes(*w, b)
}

func (w *writer) text(field protowire.Number, s string) {
	if s != "" {
		w.bytes(field, []byte(s))
	}
}

func (w *writer) texts(field protowire.Number, all []string) {
	for _, s := range all {
		w.bytes(field, []byte(s))
	}
}

func (w *writer) number(field protowire.Number, n int64) {
	if n != 0 {
		*w = protowire.AppendTag(*w, field, protowire.VarintType)
		*w = protowire.AppendVarint(*w, protowire.EncodeZigZag(n))
	}
}

func (w *writer) flag(field protowire.Number, on bool) {
	if on {
		w.number(field, 1)
	}
}

func (w *writer) time(field protowire.Number, t time.Time) {
	if !t.IsZero() {
		*w = protowire.AppendTag(*w, field, protowire.Fixed64Type)
		*w = protowire.AppendFixed64(*w, uint64(t.UnixNano()))
	}
}

const (
	digestText   = 0 // the text as it is follows
	digestSHA256 = 1 // the 32 bytes follow
)

func (w *writer) digest(field protowire.Number, d digest.Digest) {
	if d == "" {
		return
	}
	if enc, ok := strings.CutPrefix(string(d), "sha256:"); ok && len(enc) == 64 && strings.ToLower(enc) == enc {
		if raw, err := hex.DecodeString(enc); err == nil {
			w.bytes(field, append([]byte{digestSHA256}, raw...))
			return
		}
	}
	w.bytes(field, append([]byte{digestText}, d...))
}

// value is one field's content; which of the two is set, its wire type says.
type value struct {
	raw []byte
	n   uint64
}

func (v value) text() string  { return string(v.raw) }
func (v value) number() int64 { return protowire.DecodeZigZag(v.n) }

func (v value) time() time.Time { return time.Unix(0, int64(v.n)).UTC() }

func (v value) digest() digest.Digest {
	switch {
	case len(v.raw) == 0:
		return ""
	case v.raw[0] == digestSHA256:
		return digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString(v.raw[1:]))
	default:
		return digest.Digest(v.raw[1:])
	}
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
		case protowire.Fixed64Type:
			v.n, n = protowire.ConsumeFixed64(b)
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
