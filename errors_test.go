package accel_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"accel"
)

func TestPermanent(t *testing.T) {
	base := errors.New("manifest unknown")
	rejection := &accel.Rejection{Rule: "policy.max_uncompressed_size", Detail: "12 GB of at most 10 GB"}
	for name, test := range map[string]struct {
		err  error
		want bool
	}{
		"nil":               {nil, false},
		"plain":             {base, false},
		"marked":            {accel.Permanent(base), true},
		"marked, wrapped":   {fmt.Errorf("pull: %w", accel.Permanent(base)), true},
		"marked, joined":    {errors.Join(base, accel.Permanent(base)), true},
		"rejection":         {rejection, true},
		"rejection wrapped": {fmt.Errorf("check: %w", rejection), true},
		"with a pause":      {accel.WithRetryAfter(base, time.Second), false},
		"marked and paused": {accel.WithRetryAfter(accel.Permanent(base), time.Second), true},
	} {
		if got := accel.IsPermanent(test.err); got != test.want {
			t.Errorf("%s: permanent %t", name, got)
		}
	}
	if accel.Permanent(nil) != nil {
		t.Error("no error became one")
	}
	if err := accel.Permanent(base); !errors.Is(err, base) || err.Error() != base.Error() {
		t.Errorf("the marked error hides its cause: %v", err)
	}
	if !strings.Contains(rejection.Error(), rejection.Rule) || !strings.Contains(rejection.Error(), rejection.Detail) {
		t.Errorf("the rejection does not say why: %v", rejection)
	}
}

func TestRetryAfter(t *testing.T) {
	base := errors.New("too many requests")
	err := fmt.Errorf("push: %w", accel.WithRetryAfter(base, 7*time.Second))
	if got := accel.RetryAfter(err); got != 7*time.Second {
		t.Errorf("got %v", got)
	}
	if !errors.Is(err, base) {
		t.Errorf("the error hides its cause: %v", err)
	}
	if accel.RetryAfter(base) != 0 || accel.RetryAfter(nil) != 0 || accel.WithRetryAfter(nil, time.Second) != nil {
		t.Error("a pause that nobody asked for")
	}
	if got := accel.RetryAfter(accel.Permanent(accel.WithRetryAfter(base, time.Second))); got != time.Second {
		t.Errorf("under another mark: %v", got)
	}
}

// Each sentinel is itself alone: package api maps each to a status of its own.
func TestSentinelsAreDistinct(t *testing.T) {
	all := []error{accel.ErrNotFound, accel.ErrInvalid, accel.ErrUnauthenticated, accel.ErrForbidden, accel.ErrRegistryNotAllowed, accel.ErrLeaseLost, accel.ErrConflict}
	for i, a := range all {
		for j, b := range all {
			if errors.Is(fmt.Errorf("x: %w", a), b) != (i == j) {
				t.Errorf("%v and %v", a, b)
			}
		}
	}
}
