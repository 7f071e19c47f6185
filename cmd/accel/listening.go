package main

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
)

// listening are the TCP addresses on which something listens in the network namespace of a process (proc(5), /proc/net/tcp).
func listening(pid uint32) (all []net.TCPAddr, err error) {
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
			if at, ok := listener(lines.Text()); ok {
				all = append(all, at)
			}
		}
		if err := errors.Join(lines.Err(), file.Close()); err != nil {
			return nil, fmt.Errorf("look what the program listens on: %w", err)
		}
	}
	return all, nil
}

// listener reads a line: number, local address and port, remote ones, state. An address is of 32-bit words in the
// machine's byte order, which is the little one wherever accel runs.
func listener(line string) (at net.TCPAddr, ok bool) {
	const listen = "0A"
	fields := strings.Fields(line)
	if len(fields) < 4 || fields[3] != listen {
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
	return net.TCPAddr{IP: ip, Port: int(n)}, true
}
