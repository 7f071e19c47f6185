package mirror

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// maxRanges of one request; with more, or with ranges that are more than the whole
// together, the whole is sent, as RFC 9110 section 14.2 allows.
const maxRanges = 64

// span is a range of bytes.
type span struct{ offset, lengthBytes int64 }

// contentRange is the header's value for a span of a blob.
func (s span) contentRange(sizeBytes int64) string {
	return fmt.Sprintf("bytes %d-%d/%d", s.offset, s.offset+s.lengthBytes-1, sizeBytes)
}

// errUnsatisfiable: no range of the request lies within the blob.
var errUnsatisfiable = errors.New("no range lies within the blob")

// parseRange reads a Range header. No spans: send the whole, also where the header is in
// another unit or malformed (RFC 9110 section 14.2). errUnsatisfiable is a 416.
func parseRange(header string, sizeBytes int64) ([]span, error) {
	set, ok := strings.CutPrefix(header, "bytes=")
	if !ok || sizeBytes == 0 {
		return nil, nil
	}
	var spans []span
	var total int64
	any := false
	for part := range strings.SplitSeq(set, ",") {
		part = strings.Trim(part, " \t")
		if part == "" {
			continue
		}
		s, ok := parseSpan(part, sizeBytes)
		if !ok {
			return nil, nil
		}
		any = true
		if s.lengthBytes == 0 {
			continue
		}
		if total += s.lengthBytes; len(spans) == maxRanges || total > sizeBytes {
			return nil, nil
		}
		spans = append(spans, s)
	}
	if any && len(spans) == 0 {
		return nil, errUnsatisfiable
	}
	return spans, nil
}

// parseSpan reads "first-last", "first-" or "-suffix"; length 0: it lies outside.
func parseSpan(part string, sizeBytes int64) (span, bool) {
	first, last, ok := strings.Cut(part, "-")
	if !ok {
		return span{}, false
	}
	if first == "" {
		n, ok := parsePlace(last)
		n = min(n, sizeBytes)
		return span{sizeBytes - n, n}, ok
	}
	start, ok := parsePlace(first)
	if !ok {
		return span{}, false
	}
	end := sizeBytes - 1
	if last != "" {
		if end, ok = parsePlace(last); !ok || end < start {
			return span{}, false
		}
		end = min(end, sizeBytes-1)
	}
	if start >= sizeBytes {
		return span{}, true
	}
	return span{start, end - start + 1}, true
}

// parsePlace reads digits alone, which strconv does not insist on.
func parsePlace(s string) (int64, bool) {
	if strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil
}
