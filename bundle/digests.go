package bundle

import (
	"bytes"
	"encoding/hex"
	"fmt"

	"accel"

	"github.com/opencontainers/go-digest"
)

// Half of a packed TOC is digests: 64 hexadecimal digits that nothing packs to less than 32 bytes, and that spoil the
// statistics of what is around them. So they stand apart, as bytes. In the text one byte is left for each,
// of those that JSON never has; most files have their digest twice, as a file's and as its only chunk's.
const (
	nextSum byte = 0 // the next digest
	sameSum byte = 1 // the last one again

	sumBytes = 32
)

var sumPrefix = []byte("sha256:")

// splitDigests appends JSON to text, and the digests in it to sums. ErrFormat where a byte is in it that JSON has not.
func splitDigests(json, text, sums []byte) (newText, newSums []byte, err error) {
	if bytes.IndexByte(json, nextSum) >= 0 || bytes.IndexByte(json, sameSum) >= 0 {
		return nil, nil, formatError("a TOC with control characters")
	}
	var last, sum [sumBytes]byte
	known := false
	for {
		at := bytes.Index(json, sumPrefix)
		if at < 0 {
			return append(text, json...), sums, nil
		}
		text, json = append(text, json[:at]...), json[at+len(sumPrefix):]
		if !lowerHex(json) {
			text = append(text, sumPrefix...)
			continue
		}
		if _, err := hex.Decode(sum[:], json[:2*sumBytes]); err != nil {
			return nil, nil, err
		}
		json = json[2*sumBytes:]
		if known && sum == last {
			text = append(text, sameSum)
			continue
		}
		text, sums = append(text, nextSum), append(sums, sum[:]...)
		last, known = sum, true
	}
}

// lowerHex reports whether b begins with a digest's digits.
func lowerHex(b []byte) bool {
	if len(b) < 2*sumBytes {
		return false
	}
	for _, c := range b[:2*sumBytes] {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// joinDigests makes JSON of sizeBytes of a text's beginning, and returns what is left of text and sums.
func joinDigests(text, sums []byte, sizeBytes int64) (json, restText, restSums []byte, err error) {
	json = make([]byte, 0, sizeBytes)
	var last []byte
	for int64(len(json)) < sizeBytes {
		plain := text[:min(int64(len(text)), sizeBytes-int64(len(json)))]
		at := markAt(plain)
		if at < 0 {
			at = len(plain)
		}
		json, text = append(json, plain[:at]...), text[at:]
		if int64(len(json)) == sizeBytes {
			break
		}
		if len(text) == 0 || sizeBytes-int64(len(json)) < int64(len(sumPrefix)+2*sumBytes) {
			return nil, nil, nil, formatError("a TOC ends early")
		}
		if text[0] == nextSum {
			if len(sums) < sumBytes {
				return nil, nil, nil, formatError("a digest is missing")
			}
			last, sums = sums[:sumBytes], sums[sumBytes:]
		}
		if last == nil {
			return nil, nil, nil, formatError("a digest is missing")
		}
		json = hex.AppendEncode(append(json, sumPrefix...), last)
		text = text[1:]
	}
	return json, text, sums, nil
}

// markAt is where the first mark of a digest is in b, or -1.
func markAt(b []byte) int {
	for i, c := range b {
		if c <= sameSum {
			return i
		}
	}
	return -1
}

func rawDigest(d digest.Digest) ([]byte, error) {
	if d.Validate() != nil || d.Algorithm() != digest.SHA256 {
		return nil, fmt.Errorf("%w: %q: %w", accel.ErrInvalid, d, errDigest)
	}
	return hex.DecodeString(d.Encoded())
}
