package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"text/tabwriter"
	"time"

	"accel"
	"accel/lazy"
	"accel/node"

	"github.com/spf13/cobra"
)

const (
	// accelSnapshotter is the node's name in containerd's configuration, as `accel node install` writes it.
	accelSnapshotter = "accel"
	// recordNamespace is containerd's, for what is started to be recorded.
	recordNamespace = "accel-record"
	// recordedTime is how long the node may take to make its report of a start.
	recordedTime = time.Minute
)

// recorded is what `accel profile record` prints.
type recorded struct {
	Image string `json:"image"`
	// PullSeconds is until the image is mounted, CreateSeconds until the container can be started, AnswerSeconds from the
	// making of its snapshot to the program's first answer.
	PullSeconds   float64     `json:"pullSeconds"`
	CreateSeconds float64     `json:"createSeconds"`
	AnswerSeconds float64     `json:"answerSeconds"`
	Start         *lazy.Start `json:"start"`
}

func newProfileRecord(g *globals) *cobra.Command {
	var port int
	var limit time.Duration
	cmd := &cobra.Command{
		Use: "record IMAGE [-- ARG...]", Short: "Start an image on this machine, and record what it reads until it answers",
		Long: `Pulls the image through this machine's node, starts it on the machine's network, waits until it
answers HTTP on the port, and takes it away again. What it read until then is its recording: the
node keeps it, and reports it to the server. Arguments take the place of the image's command.
It is recorded also where there are recordings enough for now. A recording is complete where nothing
of the image was mounted before. The program has to listen on
more than 127.0.0.1. Exit codes: 0 recorded, 1 it did not answer in time or could not be recorded, 2 wrong usage.`,
		Example: "  accel profile record registry.example/team/app:v1 --port 9000\n  accel profile record registry.example/team/app:v1 --port 8080 -- serve --addr 0.0.0.0:8080",
		Args: func(cmd *cobra.Command, args []string) error {
			if n := cmd.ArgsLenAtDash(); len(args) == 0 || n == 0 || n < 0 && len(args) > 1 || n > 1 {
				return usage(fmt.Errorf("%s wants one IMAGE, and what it is to run behind --; see %s --help", cmd.CommandPath(), cmd.CommandPath()))
			}
			return nil
		},
	}
	flags := bindNode(cmd.Flags(), "socket", "containerd.socket")
	cmd.Flags().IntVar(&port, "port", 9000, "port on which the program answers HTTP")
	cmd.Flags().DurationVar(&limit, "startup-timeout", 2*time.Minute, "how long the program may take to answer")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		conf, err := g.loadNode(cmd, flags)
		if err != nil {
			return usage(err)
		}
		if port < 1 || port > 65535 || limit <= 0 {
			return usage(fmt.Errorf("--port %d, --startup-timeout %s: want a port and a time", port, limit))
		}
		r, err := conf.record(cmd.Context(), args[0], args[1:], port, limit, func(line string) { fmt.Fprintln(cmd.ErrOrStderr(), line) })
		if err != nil {
			return err
		}
		return g.print(cmd, r, func(w *tabwriter.Writer) { showRecorded(w, r) })
	}
	return cmd
}

// record starts an image once and has its start recorded. Nothing of that stays.
func (c *nodeConfig) record(ctx context.Context, image string, args []string, port int, limit time.Duration, say func(string)) (r recorded, err error) {
	live := node.NewClient(c.Socket)
	defer live.Close()
	if _, err := live.Starts(ctx); err != nil {
		return r, fmt.Errorf("a start is recorded by this machine's node: %w (--socket)", err)
	}
	all, ctx, err := c.containers(ctx, recordNamespace, live, say)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, all.close()) }()
	if err := free(ctx, port); err != nil { // what was left may have had it
		return r, err
	}
	name, err := pullName(image)
	if err != nil {
		return r, err
	}
	if err := live.RecordNext(ctx, node.RecordNext{Image: name}); err != nil {
		return r, fmt.Errorf("a start of %s cannot be recorded: %w", name, err)
	}
	began := time.Now()
	img, err := all.pull(ctx, image, accelSnapshotter)
	if err != nil {
		return r, err
	}
	r = recorded{Image: image, PullSeconds: time.Since(began).Seconds()}
	defer func() { err = errors.Join(err, all.remove(context.WithoutCancel(ctx), img)) }()
	id := "record-" + rand.Text()
	s, err := all.start(ctx, img, accelSnapshotter, id, args)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, s.end(ctx)) }()
	r.CreateSeconds = s.created.Seconds()
	took, err := s.answers(ctx, port, limit)
	r.AnswerSeconds = took.Seconds()
	if err != nil {
		if e := live.Answered(context.WithoutCancel(ctx), node.Answered{Container: id, Failed: true}); e != nil && !errors.Is(e, accel.ErrNotFound) {
			err = errors.Join(err, e)
		}
		return r, err
	}
	switch err := live.Answered(ctx, node.Answered{Container: id}); {
	case errors.Is(err, accel.ErrNotFound):
		return r, fmt.Errorf("it answers, but its start was not recorded: %w", err)
	case err != nil:
		return r, err
	}
	r.Start, err = awaitStart(ctx, live, id)
	return r, err
}

// awaitStart waits for a recording that is over.
func awaitStart(ctx context.Context, live *node.Client, container string) (*lazy.Start, error) {
	ctx, cancel := context.WithTimeout(ctx, recordedTime)
	defer cancel()
	for {
		starts, err := live.Starts(ctx)
		if err != nil {
			return nil, err
		}
		for _, s := range starts {
			if s.Is(container) && (s.End != "" || s.Problem != "") {
				if s.Problem != "" {
					return &s, fmt.Errorf("the recording is lost: %s", s.Problem)
				}
				return &s, nil
			}
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return nil, fmt.Errorf("the node does not end the recording: %w", ctx.Err())
		}
	}
}

func showRecorded(w *tabwriter.Writer, r recorded) {
	fmt.Fprintf(w, "pull\t%.3f s\n", r.PullSeconds)
	fmt.Fprintf(w, "create\t%.3f s\n", r.CreateSeconds)
	fmt.Fprintf(w, "start to answer\t%.3f s\n", r.AnswerSeconds)
	what := "complete"
	if !r.Start.Complete {
		what = "in part: some of it was mounted, or read by others, before"
	}
	fmt.Fprintf(w, "recorded\t%s in %d files, %s\n", bytesText(r.Start.Bytes), r.Start.Files, what)
	fmt.Fprintf(w, "reads that waited\t%d, for %s, %.3f s together\n", r.Start.Misses, bytesText(r.Start.MissBytes), r.Start.Waited.Seconds())
	fmt.Fprintf(w, "fetched ahead\t%s\n", aheadText(r.Start.Ahead))
}
