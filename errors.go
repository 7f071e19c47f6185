package accel

import (
	"errors"
	"fmt"
	"time"
)

// Sentinel errors. Test with errors.Is; package api maps each to an HTTP status
// and its client rebuilds them.
var (
	// ErrNotFound: no such record, tag, manifest or blob.
	ErrNotFound = errors.New("not found")
	// ErrInvalid: the input is malformed; the message says where.
	ErrInvalid = errors.New("invalid input")
	// ErrUnauthenticated: no credential, or one that does not hold.
	ErrUnauthenticated = errors.New("not authenticated")
	// ErrForbidden: the credential holds but does not permit this.
	ErrForbidden = errors.New("forbidden")
	// ErrRegistryNotAllowed: the registry is not on the allowlist.
	ErrRegistryNotAllowed = errors.New("registry not on the allowlist")
	// ErrLeaseLost: another worker holds the record now, or it is gone; stop.
	ErrLeaseLost = errors.New("lease lost")
	// ErrConflict: the record's state does not allow the transition.
	ErrConflict = errors.New("state conflict")
)

// Rejection is a policy's no: final for the image as it is.
type Rejection struct {
	Rule   string // the rule's name as in the configuration, e.g. "policy.max_uncompressed_size"
	Detail string // the figure or name that broke it
}

func (r *Rejection) Error() string { return fmt.Sprintf("rejected by %s: %s", r.Rule, r.Detail) }

// permanent marks an error that another try will not mend.
type permanent struct{ error }

func (p permanent) Unwrap() error { return p.error }

// Permanent marks err as not worth another try. A nil err stays nil.
func Permanent(err error) error {
	if err == nil {
		return nil
	}
	return permanent{err}
}

// IsPermanent reports whether another try is pointless: err was marked by
// Permanent or is a Rejection.
func IsPermanent(err error) bool {
	var p permanent
	var r *Rejection
	return errors.As(err, &p) || errors.As(err, &r)
}

// retryAfter carries the time that a peer asked us to wait.
type retryAfter struct {
	error
	after time.Duration
}

func (r retryAfter) Unwrap() error { return r.error }

// WithRetryAfter notes that the peer asked for a pause of d before another try.
func WithRetryAfter(err error, d time.Duration) error {
	if err == nil {
		return nil
	}
	return retryAfter{err, d}
}

// RetryAfter is the pause that err asks for, zero where it asks for none.
func RetryAfter(err error) time.Duration {
	var r retryAfter
	if errors.As(err, &r) {
		return r.after
	}
	return 0
}
