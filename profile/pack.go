package profile

import (
	"bytes"
	"fmt"
	"io"

	"accel"

	"github.com/klauspost/compress/gzip"
)

// Pack gzips what Encode, EncodeReport or Summary.Encode made: to a third, most often.
func Pack(encoded []byte) []byte {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, err := z.Write(encoded)
	if err == nil {
		err = z.Close()
	}
	if err != nil {
		return nil // never: memory takes all
	}
	return b.Bytes()
}

// Unpack undoes Pack, up to a size: MaxEncodedBytes, or MaxSummaryBytes. The error is an
// accel.ErrInvalid.
func Unpack(packed []byte, maxBytes int) ([]byte, error) {
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", accel.ErrInvalid, err)
	}
	b, err := io.ReadAll(io.LimitReader(z, int64(maxBytes)+1))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", accel.ErrInvalid, err)
	}
	if len(b) > maxBytes {
		return nil, fmt.Errorf("%w: packed are more than %d bytes", accel.ErrInvalid, maxBytes)
	}
	return b, nil
}
