package main

import (
	"fmt"
	"os"
	"testing"
)

// TestMain keeps a node of a test from running all tests again: what it starts is this program, as its holder.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "node" && os.Args[2] == "holder" {
		fmt.Fprintln(os.Stderr, "a test started a node with a snapshotter: configure snapshotter.socket as empty")
		os.Exit(exitFailed)
	}
	os.Exit(m.Run())
}
