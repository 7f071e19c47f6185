package accel

import (
	"errors"
	"testing"
)

func TestMatchRepository(t *testing.T) {
	for _, c := range []struct {
		glob, repository string
		want             bool
	}{
		{"r.test:5000/team/app", "r.test:5000/team/app", true},
		{"r.test:5000/team/*", "r.test:5000/team/app", true},
		{"r.test:5000/team/*", "r.test:5000/team/app/deep", false},
		{"r.test:5000/**", "r.test:5000/team/app/deep", true},
		{"r.test:5000/**", "r.test:5000", false},
		{"r.test:5000/team/**", "r.test:5000/team", false},
		{"*/**", "any.test/app", true},
		{"*/prod-*/**", "r.test/prod-1/app", true},
		{"*/prod-*/**", "r.test/dev/app", false},
		{"[x", "r.test/app", false},
		{"", "r.test/app", false},
	} {
		if got := MatchRepository(c.glob, c.repository); got != c.want {
			t.Errorf("%q on %q: %t", c.glob, c.repository, got)
		}
	}
	if err := CheckRepositoryGlob("r.test/[x/**"); !errors.Is(err, ErrInvalid) {
		t.Errorf("malformed glob: %v", err)
	}
}
