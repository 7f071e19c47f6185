package cache

import "errors"

// Errors of the store beside accel.ErrNotFound (no such content, and no Fetcher to
// bring it), accel.ErrInvalid (a malformed digest, a wrong size) and accel.ErrConflict.
var (
	// ErrLocked: another process has the directory; the message has its pid.
	ErrLocked = errors.New("cache directory is in use by another process")
	// ErrClosed: Close was called, or Run has ended and content would have to be
	// fetched.
	ErrClosed = errors.New("cache is closed")
	// ErrDigest: the content that came does not have the digest that was asked for. It was
	// dropped; another try fetches it anew.
	ErrDigest = errors.New("content does not match its digest")
	// ErrNoSpace: the budget or the file system has no room, and nothing that may be
	// evicted. Readers are served without caching instead; Ensure fails with it.
	ErrNoSpace = errors.New("no room in the cache")
	// ErrDamaged: a file is not as it was written, or the index could not be read or
	// written. What is damaged was dropped.
	ErrDamaged = errors.New("cache is damaged")
)
