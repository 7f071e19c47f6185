// Command serve measures the service as a process: durable webhook intake,
// readiness reads and start-up over 100,000 records, and the time from a push
// to Ready next to the same conversion without a service. `make bench` runs it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"

	"accel/bench/report"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp("", "accel-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	r := report.New("serve")
	for _, step := range []func(context.Context, string, *report.Report) error{intake, reads, pushToReady} {
		if err := step(ctx, dir, r); err != nil {
			return err
		}
	}
	return r.Close()
}
