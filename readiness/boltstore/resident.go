package boltstore

import (
	"bytes"
	"os"
	"strconv"
	"sync/atomic"
)

const (
	// lookEvery is after how many transactions the resident memory is looked at. One
	// touches about five pages, and each page fault maps the 16 pages around it.
	lookEvery = 64
	// keepMappedBytes is how much of the file may be resident beside what the
	// process has of other files (its own code).
	keepMappedBytes = 64 << 20
)

// residency bounds what of the mapped file counts as the process's memory. The kernel maps
// 64 KiB around each page that is read and takes nothing back while memory is
// plenty, so the process would seem to hold the whole file in the end.
type residency struct {
	calls atomic.Uint64
	floor atomic.Int64 // file-backed bytes that were resident right after the last trim
}

// trim lets go of the mapped file's pages when they are many. They stay in the kernel's page cache, so reading
// one again costs no disk access.
func (s *Store) trim() {
	if s.resident.calls.Add(1)%lookEvery != 0 {
		return
	}
	if have := fileBackedBytes(); have < s.resident.floor.Load()+keepMappedBytes {
		return
	}
	bt, err := s.begin(false) // while it is open, the map stays where it is
	if err != nil {
		return
	}
	unmapPages(s.db, bt)
	_ = bt.Rollback() // of a read: nothing to fail
	s.resident.floor.Store(fileBackedBytes())
}

// fileBackedBytes is the resident memory that files back (proc_pid_statm(5), "shared"), zero where
// the system does not tell.
func fileBackedBytes() int64 {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	fields := bytes.Fields(b)
	if len(fields) < 3 {
		return 0
	}
	pages, err := strconv.ParseInt(string(fields[2]), 10, 64)
	if err != nil {
		return 0
	}
	return pages * int64(os.Getpagesize())
}
