// Command accel is the whole service in one binary: `accel up` runs it with a
// registry of its own, `accel serve` beside registries that exist, and the other
// verbs ask and steer it. One file for each verb; service.go wires the parts.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"accel/api"
)

// Exit codes, as every verb's --help tells.
const (
	exitOK      = 0
	exitFailed  = 1 // it did not work, or the image Failed or was Rejected
	exitUsage   = 2 // the command line or the configuration is wrong
	exitTimeout = 3 // `wait` only
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// After the first signal a second one ends the process at once.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run is main without the process: tests share the wiring.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	var coded exitError
	if !errors.As(err, &coded) {
		coded = exitError{err, exitFailed}
		if api.Refused(err) {
			coded.code = exitUsage
		}
	}
	fmt.Fprintln(stderr, "accel:", coded.error)
	return coded.code
}

// exitError carries an exit code other than 1.
type exitError struct {
	error
	code int
}

func (e exitError) Unwrap() error { return e.error }

// usage marks an error as the caller's.
func usage(err error) error {
	if err == nil {
		return nil
	}
	return exitError{err, exitUsage}
}
