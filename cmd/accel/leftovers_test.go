package main

import (
	"testing"
)

// TestOnlyWhatTheDeadLeftIsTaken: an owner's things are his as long as he holds his name.
func TestOnlyWhatTheDeadLeftIsTaken(t *testing.T) {
	o, err := newOwner(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	labels := map[string]string{labelOwner: o.name}
	taken := 0
	take := func(labels map[string]string, want bool) {
		t.Helper()
		before := taken
		was, err := gone(t.Context(), labels, func() error {
			taken++
			// One at a time takes what is left.
			again, err := gone(t.Context(), labels, func() error { taken++; return nil })
			if again || err != nil {
				t.Errorf("taken twice, %v", err)
			}
			return nil
		})
		if err != nil || was != want || (taken == before+1) != want {
			t.Errorf("%v: taken: %v, %v; want %v", labels, was, err, want)
		}
	}
	take(labels, false)
	if err := o.close(); err != nil {
		t.Fatal(err)
	}
	take(labels, true)
	for _, none := range []string{"", "@", "accel-owner-x"} {
		take(map[string]string{labelOwner: none}, false)
	}
	take(nil, false)
}
