package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const megabyte = 1e6

// clockTick is of the times in /proc/PID/stat: USER_HZ, 100 on every Linux platform
// that Go has.
const clockTick = 10 * time.Millisecond

// cpuOf is what a process, and those children that it has waited for, have used.
func cpuOf(pid int) (time.Duration, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// "PID (name) state ...", and the name may have anything in it. Fields 14 to 17 are
	// utime, stime, cutime and cstime.
	fields := strings.Fields(string(raw[bytes.LastIndexByte(raw, ')')+1:]))
	var ticks int64
	for _, f := range fields[11:15] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/%d/stat: %w", pid, err)
		}
		ticks += n
	}
	return time.Duration(ticks) * clockTick, nil
}

// machineCPU is what all processes and the kernel have used since the machine started.
func machineCPU() (time.Duration, error) {
	raw, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	// "cpu user nice system idle iowait irq softirq steal ..."
	line, _, _ := strings.Cut(string(raw), "\n")
	fields := strings.Fields(line)
	if len(fields) < 8 || fields[0] != "cpu" {
		return 0, fmt.Errorf("/proc/stat begins with %.200q", line)
	}
	var ticks int64
	for i, f := range fields[1:8] {
		if i == 3 || i == 4 { // idle, and idle while a disk works
			continue
		}
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/stat: %w", err)
		}
		ticks += n
	}
	return time.Duration(ticks) * clockTick, nil
}

// anonymousMB is a process's anonymous resident memory.
func anonymousMB(pid int) (float64, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(raw)) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == "Anonymous:" {
			kib, err := strconv.ParseFloat(fields[1], 64)
			return kib * 1024 / megabyte, err
		}
	}
	return 0, fmt.Errorf("/proc/%d/smaps_rollup has no Anonymous", pid)
}

// processesNaming lists the processes that have dir in an argument, other than
// this one.
func processesNaming(dir string) ([]int, error) {
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, line := range lines {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(line)))
		if err != nil || pid == os.Getpid() {
			continue
		}
		if raw, err := os.ReadFile(line); err == nil && bytes.Contains(raw, []byte(dir)) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// dropCaches empties the page cache, and the kernel's of names and inodes.
func dropCaches() error {
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return fmt.Errorf("drop the page cache: %w", err)
	}
	return nil
}
