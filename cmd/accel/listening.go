package main

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// listener is a TCP address on which something listens, and the socket's inode.
type listener struct {
	net.TCPAddr
	inode string
}

// listening are those in the network namespace of a process (proc(5), /proc/net/tcp).
func listening(pid uint32) (all []listener, err error) {
	for _, table := range []string{"tcp", "tcp6"} {
		file, err := os.Open(fmt.Sprintf("/proc/%d/net/%s", pid, table))
		if errors.Is(err, fs.ErrNotExist) && table == "tcp6" {
			continue // a kernel without IPv6
		}
		if err != nil {
			return nil, fmt.Errorf("look what the program listens on: %w", err)
		}
		lines := bufio.NewScanner(file)
		for lines.Scan() {
			if at, ok := parseListener(lines.Text()); ok {
				all = append(all, at)
			}
		}
		if err := errors.Join(lines.Err(), file.Close()); err != nil {
			return nil, fmt.Errorf("look what the program listens on: %w", err)
		}
	}
	return all, nil
}

// parseListener reads a line: number, local address and port, remote ones, state, and six more before the inode. An address is of
// 32-bit words in the machine's byte order, which is the little one wherever accel runs.
func parseListener(line string) (at listener, ok bool) {
	const listen = "0A"
	fields := strings.Fields(line)
	if len(fields) < 10 || fields[3] != listen {
		return at, false
	}
	address, port, _ := strings.Cut(fields[1], ":")
	ip, err := hex.DecodeString(address)
	n, portErr := strconv.ParseUint(port, 16, 16)
	if err != nil || portErr != nil || len(ip) != net.IPv4len && len(ip) != net.IPv6len {
		return at, false
	}
	for word := range slices.Chunk(ip, 4) {
		slices.Reverse(word)
	}
	return listener{net.TCPAddr{IP: ip, Port: int(n)}, fields[9]}, true
}

// holds reports whether one of the processes has a socket open.
func holds(pids []uint32, inode string) bool {
	for _, pid := range pids {
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue // it has just ended
		}
		for _, e := range entries {
			if to, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil && to == "socket:["+inode+"]" {
				return true
			}
		}
	}
	return false
}
