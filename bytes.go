package accel

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

var byteUnits = []struct {
	suffix string
	bytes  float64
}{
	{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40},
	{"kB", 1e3}, {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12}, {"B", 1},
}

// ParseBytes reads a number of bytes as people write it: 10GB, 512MiB, 1.5 kB or plain. The
// error is an ErrInvalid.
func ParseBytes(text string) (int64, error) {
	t := strings.TrimSpace(text)
	factor := 1.0
	for _, u := range byteUnits {
		if n, ok := strings.CutSuffix(t, u.suffix); ok {
			t, factor = strings.TrimSpace(n), u.bytes
			break
		}
	}
	n, err := strconv.ParseFloat(t, 64)
	if err != nil || math.IsNaN(n) || n < 0 || n*factor > 1<<62 {
		return 0, fmt.Errorf("%w: size %.40q: want a number of bytes, such as 10GB or 512MiB", ErrInvalid, text)
	}
	return int64(n * factor), nil
}
