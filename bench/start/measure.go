package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"accel/internal/testbed"
	"accel/node"
)

const (
	programURL = "http://127.0.0.1:9000/"
	// pollEvery is how often the program is asked; a start is known to as much.
	pollEvery = 5 * time.Millisecond
	// startPatience is ten times what the slowest peer needs over the slowest link.
	startPatience = 20 * time.Minute
	// aliveEvery is how often a start that takes long is checked to go on.
	aliveEvery = 5 * time.Second
	// A link is quiet when it has delivered nothing for so long.
	quietTime     = 3 * time.Second
	quietPatience = 15 * time.Minute
)

// readAll is the program that reads every file of the image; its exit code says
// whether every read went well.
var readAll = []string{"sh", "-c", "find / -xdev -type f -exec cat {} + >/dev/null"}

// sample is one run.
type sample struct {
	Image, Variant string
	Rate           string        // of the link
	Pull, Start    time.Duration // Start from the end of the pull until the program answered, or ended
	FetchedBytes   int64         // by then, headers included
	DaemonCPU      time.Duration // of containerd and its snapshotter, by then
	Misses         int64         // reads that had to wait, by then; accel tells them
	Waited         time.Duration // how long all of them did
}

func (s sample) total() time.Duration { return s.Pull + s.Start }

// pull is by containerd's transfer service.
func (h *host) pull(ctx context.Context, reference string) error {
	_, err := h.containerd.Ctr(ctx, "images", "pull", "--snapshotter", h.snapshotter, reference)
	return h.explained(err)
}

// start starts a container of a new name and waits until its program answers, or
// has read everything and ended.
func (h *host) start(ctx context.Context, reference string, all bool) (id string, err error) {
	id = newID()
	args := append(h.runArgs(), "--snapshotter", h.snapshotter)
	if all {
		_, err := h.containerd.Ctr(ctx, append(append(args, reference, id), readAll...)...)
		return id, h.explained(err)
	}
	if _, err := h.containerd.Ctr(ctx, append(args, "--detach", reference, id)...); err != nil {
		return id, h.explained(err)
	}
	return id, h.explained(h.untilAnswers(ctx, id))
}

// runArgs are of ctr; runc's own state is for all containerds of a machine else.
func (h *host) runArgs() []string {
	return []string{"run", "--null-io", "--net-host", "--runc-root", filepath.Join(h.dir, "runc")}
}

// newID is of a container; cgroups are the machine's too.
func newID() string { return "bench-" + rand.Text() }

// explained adds the daemons' words to an error.
func (h *host) explained(err error) error {
	if err == nil || h.daemon == nil {
		return err
	}
	return fmt.Errorf("%w\nthe snapshotter's log ends with:\n%s", err, h.daemon.said())
}

// untilAnswers waits until the program of a running container gives the answer that
// is right.
func (h *host) untilAnswers(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	looked := time.Now()
	for {
		done, err := answers(ctx, client)
		if done || err != nil {
			return err
		}
		if time.Since(looked) > aliveEvery {
			looked = time.Now()
			said, err := h.containerd.Ctr(ctx, "tasks", "ls")
			if err != nil {
				return err
			}
			if !strings.Contains(said, "RUNNING") {
				return fmt.Errorf("container %s does not run any more: %s", id, said)
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the program does not answer: %w", ctx.Err())
		case <-tick.C:
		}
	}
}

func answers(ctx context.Context, client *http.Client) (bool, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, programURL, nil)
	if err != nil {
		return false, err
	}
	res, err := client.Do(req)
	if err != nil {
		return false, nil //nolint:nilerr // not yet
	}
	body, err := io.ReadAll(res.Body)
	if err := errors.Join(err, res.Body.Close()); err != nil {
		return false, err
	}
	if res.StatusCode != http.StatusOK || string(body) != "45" { // the sum of 0 to 9
		return false, fmt.Errorf("the program answers %s: %.200q", res.Status, body)
	}
	return true, nil
}

// end removes a container.
func (h *host) end(ctx context.Context, id string, all bool) error {
	if !all {
		if _, err := h.containerd.Ctr(ctx, "tasks", "rm", "--force", id); err != nil {
			return err
		}
	}
	_, err := h.containerd.Ctr(ctx, "containers", "rm", id)
	return err
}

// measured runs one start, after a pull if there is to be one, and removes the
// container again.
func (b *bed) measured(ctx context.Context, h *host, v variant, image string, speed testbed.LinkSpeed) (s sample, err error) {
	s = sample{Image: image, Variant: v.name, Rate: speed.String()}
	reference := b.reference(image, v.form)
	used, err := h.cpu()
	if err != nil {
		return s, err
	}
	if v.at != warm {
		if err := dropCaches(); err != nil {
			return s, err
		}
	}
	b.link.Shape(speed)
	defer b.link.Shape(testbed.LinkSpeed{})
	before := b.link.DeliveredBytes()
	begin := time.Now()
	if v.at == cold {
		if err := h.pull(ctx, reference); err != nil {
			return s, err
		}
		s.Pull = time.Since(begin)
	}
	id, err := h.start(ctx, reference, v.all)
	s.Start = time.Since(begin) - s.Pull
	if err != nil {
		return s, err
	}
	s.FetchedBytes = b.link.DeliveredBytes() - before
	if v.system == accelNode {
		if s.Misses, s.Waited, err = h.misses(ctx, reference); err != nil {
			return s, err
		}
	}
	if s.DaemonCPU, err = h.cpu(); err != nil {
		return s, err
	}
	s.DaemonCPU -= used
	return s, h.end(ctx, id, v.all)
}

// coldRuns runs all cold variants at all rates, interleaved.
func coldRuns(ctx context.Context, b *bed, s setting, image string, res *results) error {
	chosen := s.chosen(func(v variant) bool { return v.at == cold })
	for i := range s.runs {
		for _, speed := range s.rates {
			for _, v := range chosen {
				fmt.Fprintf(os.Stderr, "run %d of %d, %s, %s: %s ... ", i+1, s.runs, image, speed, v.name)
				h, err := b.startHost(ctx, v.system)
				if err != nil {
					return err
				}
				one, err := b.measured(ctx, h, v, image, speed)
				if err := errors.Join(err, h.close()); err != nil {
					return fmt.Errorf("%s: %w", v.name, err)
				}
				res.add(one)
			}
		}
	}
	return nil
}

// warmRuns starts containers on hosts that have everything, interleaved.
func warmRuns(ctx context.Context, b *bed, s setting, image string, res *results) (err error) {
	hosts := map[system]*host{}
	defer func() {
		for _, h := range hosts {
			err = errors.Join(err, h.close())
		}
	}()
	chosen := s.chosen(func(v variant) bool { return v.at != cold })
	for _, v := range chosen {
		if hosts[v.system] != nil {
			continue
		}
		fmt.Fprintf(os.Stderr, "%s: making a host of %s warm\n", image, v.system)
		h, err := b.startHost(ctx, v.system)
		if err != nil {
			return err
		}
		hosts[v.system] = h
		if err := b.makeWarm(ctx, h, b.reference(image, v.form)); err != nil {
			return fmt.Errorf("%s: %w", v.name, err)
		}
	}
	for _, at := range []moment{warm, coldCache} {
		runs := s.warmRuns
		if at == coldCache {
			runs = s.runs
		}
		for i := range runs {
			for _, v := range chosen {
				if v.at != at {
					continue
				}
				fmt.Fprintf(os.Stderr, "start %d of %d, %s: %s ... ", i+1, runs, image, v.name)
				one, err := b.measured(ctx, hosts[v.system], v, image, s.rates[0])
				if err != nil {
					return fmt.Errorf("%s: %w", v.name, err)
				}
				res.add(one)
			}
		}
	}
	return nil
}

// makeWarm brings all of an image onto a host, and starts it once.
func (b *bed) makeWarm(ctx context.Context, h *host, reference string) error {
	b.link.Shape(testbed.LinkSpeed{})
	if err := h.pull(ctx, reference); err != nil {
		return err
	}
	for _, all := range []bool{true, false} {
		id, err := h.start(ctx, reference, all)
		if err := errors.Join(err, h.end(ctx, id, all)); err != nil {
			return err
		}
	}
	return b.untilQuiet(ctx)
}

// untilQuiet waits until nobody fetches anything.
func (b *bed) untilQuiet(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, quietPatience)
	defer cancel()
	for last := int64(-1); last != b.link.DeliveredBytes(); {
		last = b.link.DeliveredBytes()
		select {
		case <-ctx.Done():
			return fmt.Errorf("the link does not get quiet: %w", ctx.Err())
		case <-time.After(quietTime):
		}
	}
	return nil
}

// misses of an image, as the node tells them.
func (h *host) misses(ctx context.Context, reference string) (n int64, waited time.Duration, err error) {
	client := node.NewClient(filepath.Join(h.dir, "node.sock"))
	defer client.Close()
	images, err := client.Mounted(ctx)
	for _, m := range images {
		if m.Image == reference {
			n, waited = n+m.Misses, waited+m.Waited
		}
	}
	return n, waited, err
}
