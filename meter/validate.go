package meter

import (
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"accel"

	"github.com/oklog/ulid/v2"
)

// Bounds of what a pull may say. They are far above what is real, so that sums stay
// within their types whatever is reported.
const (
	maxNodeBytes   = 253
	maxTenantBytes = 128
	maxReasonBytes = 1024
	maxMemory      = 1 << 50 // 1 PiB
	maxBytes       = 1 << 50 // of one kind in one pull
	maxDuration    = 7 * 24 * time.Hour
	// maxAhead is how far a node's clock may be ahead of the server's.
	maxAhead = 24 * time.Hour
)

// oldest is the earliest start that is believed.
var oldest = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// Validate says what is wrong with a reported pull; the error is an accel.ErrInvalid.
func Validate(p accel.Pull, now time.Time) error {
	bad := func(what string, args ...any) error {
		return fmt.Errorf("%w: pull %.40q: %s", accel.ErrInvalid, p.ID, fmt.Sprintf(what, args...))
	}
	id, err := ulid.ParseStrict(p.ID)
	if err != nil || id.String() != p.ID {
		return bad("the id is no ULID (26 characters, upper case)")
	}
	switch {
	case p.Start.Before(oldest) || p.Start.After(now.Add(maxAhead)):
		return bad("start %s is not between %s and a day from now; is the node's clock right?", p.Start.Format(time.RFC3339), oldest.Format(time.DateOnly))
	case int64(id.Time()) != p.Start.UnixMilli():
		return bad("the id's time %d is not the start's %d", id.Time(), p.Start.UnixMilli())
	case p.Duration < 0 || p.Duration > maxDuration:
		return bad("duration %s is not between 0 and %s", p.Duration, maxDuration)
	case p.MemoryBytes < 0 || p.MemoryBytes > maxMemory:
		return bad("memoryBytes %d is not between 0 and %d", p.MemoryBytes, int64(maxMemory))
	case min(p.RegistryBytes, p.PeerBytes, p.CacheBytes) < 0 || max(p.RegistryBytes, p.PeerBytes, p.CacheBytes) > maxBytes:
		return bad("a number of bytes is not between 0 and %d", int64(maxBytes))
	case !isName(p.Node, maxNodeBytes) || p.Node == "":
		return bad("node %.64q is not 1 to %d printable characters without a space", p.Node, maxNodeBytes)
	case !isName(strings.ReplaceAll(p.Tenant, " ", "_"), maxTenantBytes):
		return bad("tenant %.64q is not up to %d printable characters", p.Tenant, maxTenantBytes)
	case len(p.Reason) > maxReasonBytes || !utf8.ValidString(p.Reason):
		return bad("reason is longer than %d bytes or not UTF-8", maxReasonBytes)
	}
	switch p.Mode {
	case accel.PullFull, accel.PullLazy, accel.PullMirror:
	default:
		return bad("mode %.20q: want full, lazy or mirror", p.Mode)
	}
	z := p.Lazy
	if z != (accel.LazyPull{}) && p.Mode != accel.PullLazy {
		return bad("lazy is for pulls of mode lazy")
	}
	if min(z.FirstByte, z.Complete, z.Waited) < 0 || max(z.FirstByte, z.Complete) > maxDuration || z.Misses < 0 || z.Misses > maxBytes {
		return bad("a figure of lazy is not between 0 and its bound")
	}
	switch p.Outcome {
	case accel.OutcomePartial, accel.OutcomeMiss, accel.OutcomeError:
	case accel.OutcomeHit:
		if p.RegistryBytes != 0 {
			return bad("a hit has no bytes from the registry, this one has %d", p.RegistryBytes)
		}
	default:
		return bad("outcome %.20q: want hit, partial, miss or error", p.Outcome)
	}
	if _, err := accel.ParseReference(p.Image); err != nil {
		return bad("%v", err)
	}
	if p.Digest != "" {
		if err := p.Digest.Validate(); err != nil {
			return bad("digest %.100q: %v", p.Digest, err)
		}
	}
	return nil
}

// isName reports whether s is short printable ASCII without a space, or empty.
func isName(s string, max int) bool {
	return len(s) <= max && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
}

// idKey is an id as key: 16 bytes that sort by time.
func idKey(id string) ([]byte, error) {
	u, err := ulid.ParseStrict(id)
	if err != nil {
		return nil, fmt.Errorf("%w: id %.40q of a pull: %w", accel.ErrInvalid, id, err)
	}
	return u.Bytes(), nil
}

func keyID(key []byte) (string, error) {
	var u ulid.ULID
	if err := u.UnmarshalBinary(key); err != nil {
		return "", fmt.Errorf("%w: key %x of a pull: %w", ErrDamaged, key, err)
	}
	return u.String(), nil
}

// timeKey is the least key of a pull that started at t or later.
func timeKey(t time.Time) []byte {
	var u ulid.ULID
	if ms := t.UnixMilli(); ms > 0 && uint64(ms) <= ulid.MaxTime() {
		_ = u.SetTime(uint64(ms)) // within its bounds
	} else if ms > 0 {
		return append(u[:0:0], []byte(strings.Repeat("\xff", len(u)))...)
	}
	return u.Bytes()
}
