package lazyfs

import "errors"

// Test with errors.Is.
var (
	// ErrDamaged: a file of a layer is not what was written; build the layer anew.
	ErrDamaged = errors.New("damaged layer file")
	// ErrDigest: bytes that do not have their chunk's digest.
	ErrDigest = errors.New("chunk does not match its digest")
	// ErrUnsupported: a layer, or a kernel, that lazy mounts cannot do.
	ErrUnsupported = errors.New("not supported for lazy mounts")
	// ErrUnknown: no such layer was added.
	ErrUnknown = errors.New("unknown layer")
	// ErrInUse: the layer has mounts, or has them somewhere that we do not see.
	ErrInUse = errors.New("layer in use")
	// ErrIncomplete: the layer still has holes, or chunks that are not synced.
	ErrIncomplete = errors.New("layer incomplete")
	// ErrClosed: the layer or the host was closed or removed.
	ErrClosed = errors.New("closed")
)
