package boltstore

import (
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// unmapPages drops the process's page table entries of the file; the map is read-only and shared, so
// nothing is lost. bt keeps bbolt from mapping the file elsewhere meanwhile.
func unmapPages(db *bbolt.DB, bt *bbolt.Tx) {
	_, _, _ = unix.Syscall(unix.SYS_MADVISE, db.Info().Data, uintptr(bt.Size()), unix.MADV_DONTNEED) // only advice
}
