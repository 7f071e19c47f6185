package registry

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"accel"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

const (
	// maxErrorBytes bounds what is read of an answer that is not the content
	// asked for, as go-containerregistry bounds it.
	maxErrorBytes = 64 << 10
	// maxMessageBytes of a registry's own words go into an error.
	maxMessageBytes = 1 << 10
	// maxRetryAfter bounds the pause that a registry may ask for.
	maxRetryAfter = time.Hour
)

// responseError is an answer other than the one hoped for. It wraps the
// sentinel of package accel that its status stands for, if there is one.
type responseError struct {
	answer   *transport.Error
	sentinel error
	after    time.Duration // what Retry-After said
	// challenge is a 401's WWW-Authenticate, where it was the registry's own.
	challenge []string
}

// Error is the answer in the registry's own words, cut to a bearable length.
func (e *responseError) Error() string {
	msg := e.answer.Error()
	if len(msg) > maxMessageBytes {
		msg = strings.ToValidUTF8(msg[:maxMessageBytes], "") + "..."
	}
	if e.sentinel != nil {
		return e.sentinel.Error() + ": " + msg
	}
	return msg
}

func (e *responseError) Unwrap() error { return e.sentinel }

// has reports whether the registry gave one of the codes.
func (e *responseError) has(codes ...transport.ErrorCode) bool {
	return slices.ContainsFunc(e.answer.Errors, func(d transport.Diagnostic) bool { return slices.Contains(codes, d.Code) })
}

// ChallengeOf is the registry's WWW-Authenticate that came with err, if one did.
func ChallengeOf(err error) []string {
	var e *responseError
	if errors.As(err, &e) {
		return e.challenge
	}
	return nil
}

// StatusOf is the HTTP status that err is about, 0 where the registry did not answer.
func StatusOf(err error) int {
	var e *responseError
	if errors.As(err, &e) {
		return e.answer.StatusCode
	}
	return 0
}

// statusError makes an error of an unexpected answer, whose body it reads but
// does not close. The meaning that its status has for the queue is left out.
func statusError(resp *http.Response) *responseError {
	// A body that is too long or breaks off does not change the status.
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBytes))
	copied := *resp
	copied.Body = io.NopCloser(bytes.NewReader(body))
	e := &responseError{after: retryAfter(resp.Header)}
	if !errors.As(transport.CheckError(&copied), &e.answer) { // no status is fine here
		e.answer = &transport.Error{StatusCode: resp.StatusCode, Request: resp.Request}
	}
	return e
}

// refusal is the meaning of an answer on the way to being authenticated. Only a
// refusal has one: "not found" there says nothing of the image that was meant.
func refusal(e *responseError) error {
	switch e.answer.StatusCode {
	case http.StatusUnauthorized:
		e.sentinel = accel.ErrUnauthenticated
	case http.StatusForbidden:
		e.sentinel = accel.ErrForbidden
	}
	return e
}

// classify gives an answer of the registry the meaning that the queue acts on.
func classify(e *responseError) error {
	switch e.answer.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
		return refusal(e)
	case http.StatusNotFound:
		// A forgotten upload is begun again; the repository may well be there.
		if !e.has(transport.BlobUploadUnknownErrorCode) {
			e.sentinel = accel.ErrNotFound
		}
	case http.StatusBadRequest, http.StatusMethodNotAllowed, http.StatusRequestEntityTooLarge,
		http.StatusRequestURITooLong, http.StatusUnsupportedMediaType, http.StatusUnprocessableEntity:
		// The same request would be refused again, unless it is the state of the
		// registry that the answer is about.
		if !e.has(transport.ManifestBlobUnknownErrorCode, transport.ManifestUnknownErrorCode, transport.BlobUnknownErrorCode,
			transport.BlobUploadInvalidErrorCode, transport.BlobUploadUnknownErrorCode, transport.DigestInvalidErrorCode,
			transport.TooManyRequestsErrorCode, transport.UnknownErrorCode, transport.UnavailableErrorCode) {
			return accel.Permanent(e)
		}
	}
	return e
}

// retryAfter reads the header (RFC 9110 section 10.2.3): seconds or a date.
func retryAfter(header http.Header) time.Duration {
	value := header.Get("Retry-After")
	if value == "" {
		return 0
	}
	var d time.Duration
	if seconds, err := strconv.ParseInt(value, 10, 32); err == nil {
		d = time.Duration(seconds) * time.Second
	} else if at, err := http.ParseTime(value); err == nil {
		d = time.Until(at)
	}
	return min(max(d, 0), maxRetryAfter)
}

// sourceError is an error of what was to be uploaded, not of the upload.
type sourceError struct{ error }

func (e sourceError) Unwrap() error { return e.error }

// spentError: the call's attempts are used up already.
type spentError struct{ error }

func (e spentError) Unwrap() error { return e.error }

// corruptError: bytes that came do not have the digest or size asked for.
type corruptError struct{ what string }

func (e *corruptError) Error() string { return e.what }

// refusedError: a redirect or upload location that is not followed.
type refusedError struct{ what string }

func (e *refusedError) Error() string { return e.what }

// retryable reports whether a second attempt within the same call may help.
// Errors that a person has to mend are left to the queue's own pace.
func retryable(err error) bool {
	var (
		answer  *responseError
		source  sourceError
		spent   spentError
		refused *refusedError
		cert    *tls.CertificateVerificationError
		unknown x509.UnknownAuthorityError
		record  tls.RecordHeaderError
	)
	switch {
	case err == nil, accel.IsPermanent(err), errors.As(err, &source), errors.As(err, &spent), errors.As(err, &refused):
		return false
	case errors.Is(err, accel.ErrRegistryNotAllowed), errors.Is(err, accel.ErrInvalid):
		return false
	case errors.As(err, &cert), errors.As(err, &unknown), errors.As(err, &record):
		return false
	case errors.As(err, &answer):
		return retryableStatus(answer)
	case errors.Is(err, accel.ErrUnauthenticated), errors.Is(err, accel.ErrForbidden), errors.Is(err, accel.ErrNotFound):
		return false
	case errors.Is(err, context.Canceled) && !errors.Is(err, errStalled):
		return false
	default:
		return true // a broken connection, a stall, damaged bytes
	}
}

func retryableStatus(e *responseError) bool {
	status := e.answer.StatusCode
	return status == http.StatusRequestTimeout || status == http.StatusTooManyRequests ||
		status == 499 || // nginx: the client went away, said by a proxy in between
		status >= 500 && status != http.StatusNotImplemented ||
		e.has(transport.BlobUploadInvalidErrorCode, transport.BlobUploadUnknownErrorCode, transport.DigestInvalidErrorCode)
}
