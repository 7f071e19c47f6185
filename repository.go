package accel

import (
	"fmt"
	"path"
	"strings"
)

// Globs over repositories ("host/path") stand in configurations: * matches within one
// path element, and a trailing /** everything below.

// CheckRepositoryGlob returns an ErrInvalid for a glob that is malformed.
func CheckRepositoryGlob(glob string) error {
	if _, err := path.Match(strings.TrimSuffix(glob, "/**"), ""); err != nil {
		return fmt.Errorf("%w: glob %q: %w", ErrInvalid, glob, err)
	}
	return nil
}

// MatchRepository reports whether the glob matches. A malformed one matches nothing.
func MatchRepository(glob, repository string) bool {
	if base, ok := strings.CutSuffix(glob, "/**"); ok {
		depth := strings.Count(base, "/") + 1
		parts := strings.Split(repository, "/")
		if len(parts) <= depth {
			return false
		}
		glob, repository = base, strings.Join(parts[:depth], "/")
	}
	ok, err := path.Match(glob, repository)
	return err == nil && ok
}
