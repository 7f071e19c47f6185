package accel_test

import (
	"errors"
	"testing"

	"accel"
)

func TestParseBytes(t *testing.T) {
	for text, want := range map[string]int64{"1GiB": 1 << 30, " 1.5 kB ": 1500, "0": 0, "2TB": 2e12, "7B": 7} { //nolint:gocritic // the spaces are the case
		if n, err := accel.ParseBytes(text); err != nil || n != want {
			t.Errorf("%q is %d, %v; want %d", text, n, err, want)
		}
	}
	for _, text := range []string{"", "GB", "-1GB", "1e30GB", "NaN", "Inf", "ten", "1GiBB"} {
		if n, err := accel.ParseBytes(text); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%q was taken as %d, %v", text, n, err)
		}
	}
}
