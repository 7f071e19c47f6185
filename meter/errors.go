package meter

import "accel/internal/boltfile"

// Errors that OpenSpool, OpenLedger and their methods return beside those of package accel.
var (
	// ErrLocked: another process has the file open.
	ErrLocked = boltfile.ErrLocked
	// ErrDamaged: the file was cut or overwritten. A spool sets it aside by itself.
	ErrDamaged = boltfile.ErrDamaged
	// ErrFull: the disk has no room. Nothing was changed, and it passes when there is room again.
	ErrFull = boltfile.ErrFull
	// ErrClosed: Close was called before.
	ErrClosed = boltfile.ErrClosed
)
