// Package killtest kills processes at random instants, for the tests of what has
// to survive that.
package killtest

import (
	"bufio"
	"io"
	"math/rand/v2"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// Run starts cmd, which says a line on its standard output when it is at work, kills
// it at some instant within the time after that, and returns all whole lines that it said.
func Run(t testing.TB, cmd *exec.Cmd, within time.Duration) []string {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	first, err := lines.ReadString('\n')
	if err != nil {
		_ = cmd.Wait() // it ended by itself; what it said why is on its standard error
		t.Fatalf("%v ended before it was killed: %v", cmd.Args, err)
	}
	kill := time.AfterFunc(rand.N(within), func() { _ = cmd.Process.Kill() })
	rest, err := io.ReadAll(lines)
	kill.Stop()
	_ = cmd.Wait() // killed
	if err != nil {
		t.Fatal(err)
	}
	all := first + string(rest)
	var said []string
	for line := range strings.Lines(all[:strings.LastIndexByte(all, '\n')+1]) {
		said = append(said, strings.TrimSpace(line))
	}
	return said
}
