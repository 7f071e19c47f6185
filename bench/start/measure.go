package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"accel/internal/testbed"
	"accel/node"
)

const (
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
	Image   string `json:"image"`
	Variant string `json:"variant"`
	Rate    string `json:"rate"` // of the link
	// StartSeconds are from the end of the pull until the program was ready, or had ended.
	PullSeconds  float64 `json:"pullSeconds"`
	StartSeconds float64 `json:"startSeconds"`
	// By then:
	FetchedBytes     int64   `json:"fetchedBytes"`     // headers included
	DaemonCPUSeconds float64 `json:"daemonCpuSeconds"` // of containerd and its snapshotter
	// MachineCPUSeconds is what all processes and the kernel used; this program with its
	// registry and its link among them.
	MachineCPUSeconds float64 `json:"machineCpuSeconds"`
	// Reads that had to wait, how long all of them did, and the content that was fetched ahead
	// by a profile; accel tells these.
	Misses        int64   `json:"misses"`
	WaitedSeconds float64 `json:"waitedSeconds"`
	AheadBytes    int64   `json:"aheadBytes"`
}

func (s sample) total() float64 { return s.PullSeconds + s.StartSeconds }

// pull is by containerd's transfer service. ctr has to be told of the hosts.toml files that the CRI plugin finds in
// containerd's configuration.
func (h *host) pull(ctx context.Context, reference string) error {
	_, err := h.containerd.Ctr(ctx, "images", "pull", "--hosts-dir", h.hostsDir, "--snapshotter", h.snapshotter, reference)
	return h.explained(err)
}

// start starts a container of a new name and waits until its program is ready, or
// has ended; all has every file read instead.
func (h *host) start(ctx context.Context, reference string, s startable, all bool) (id string, err error) {
	id = newID()
	args := append(h.runArgs(), "--snapshotter", h.snapshotter)
	if !all && !s.ends() {
		args = append(args, "--detach")
	}
	args = append(args, reference, id)
	if all {
		args = append(args, readAll...)
	}
	if _, err = h.containerd.Ctr(ctx, args...); err == nil && !all && !s.ends() {
		err = h.untilReady(ctx, id, s.ready)
	}
	return id, h.explained(err)
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

// untilReady waits until the program of a running container is.
func (h *host) untilReady(ctx context.Context, id string, ready func(context.Context) (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	looked := time.Now()
	for {
		done, err := ready(ctx)
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
			return fmt.Errorf("the program is not ready: %w", ctx.Err())
		case <-tick.C:
		}
	}
}

// end removes a container, whose program may have ended by itself.
func (h *host) end(ctx context.Context, id string, ended bool) error {
	if !ended {
		if _, err := h.containerd.Ctr(ctx, "tasks", "rm", "--force", id); err != nil {
			return err
		}
	}
	_, err := h.containerd.Ctr(ctx, "containers", "rm", id)
	return err
}

// measured runs one start, after a pull if there is to be one, and removes the
// container again.
func (b *bed) measured(ctx context.Context, h *host, v variant, image startable, speed testbed.LinkSpeed) (s sample, err error) {
	s = sample{Image: image.name, Variant: v.name, Rate: speed.String()}
	reference := b.reference(image.name, v.form)
	used, err := h.cpu()
	if err != nil {
		return s, err
	}
	var earlier sample // starts on the same host
	if v.system == accelNode && v.at != cold {
		if err := h.told(ctx, reference, &earlier); err != nil {
			return s, err
		}
	}
	if v.at != warm {
		if err := dropCaches(); err != nil {
			return s, err
		}
	}
	b.link.Shape(speed)
	defer b.link.Shape(testbed.LinkSpeed{})
	before := b.link.DeliveredBytes()
	busy, err := machineCPU()
	if err != nil {
		return s, err
	}
	begin := time.Now()
	if v.at == cold {
		if err := h.pull(ctx, reference); err != nil {
			return s, err
		}
		s.PullSeconds = time.Since(begin).Seconds()
	}
	id, err := h.start(ctx, reference, image, v.all)
	s.StartSeconds = time.Since(begin).Seconds() - s.PullSeconds
	if err != nil {
		return s, err
	}
	s.FetchedBytes = b.link.DeliveredBytes() - before
	now, err := machineCPU()
	if err != nil {
		return s, err
	}
	s.MachineCPUSeconds = (now - busy).Seconds()
	if v.system == accelNode {
		if err := h.told(ctx, reference, &s); err != nil {
			return s, err
		}
		s.Misses -= earlier.Misses
		s.WaitedSeconds -= earlier.WaitedSeconds
		s.AheadBytes -= earlier.AheadBytes
	}
	cpu, err := h.cpu()
	if err != nil {
		return s, err
	}
	s.DaemonCPUSeconds = (cpu - used).Seconds()
	return s, h.end(ctx, id, v.all || image.ends())
}

// coldRuns runs all cold variants at all rates, interleaved.
func coldRuns(ctx context.Context, b *bed, s setting, image startable, res *results) error {
	for i := range s.runs {
		for _, n := range s.networks() {
			for _, v := range s.chosen(func(v variant) bool { return v.at == cold && n.wants(v) && (!v.all || !image.ends()) }) {
				fmt.Fprintf(os.Stderr, "run %d of %d, %s, %s: %s ... ", i+1, s.runs, image, n.speed, v.name)
				h, err := b.startHost(ctx, v.system)
				if err != nil {
					return err
				}
				one, err := b.measured(ctx, h, v, image, n.speed)
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
func warmRuns(ctx context.Context, b *bed, s setting, image startable, res *results) (err error) {
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
		if err := b.makeWarm(ctx, h, image, v.form); err != nil {
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
func (b *bed) makeWarm(ctx context.Context, h *host, image startable, f form) error {
	b.link.Shape(testbed.LinkSpeed{})
	reference := b.reference(image.name, f)
	if err := h.pull(ctx, reference); err != nil {
		return err
	}
	for _, all := range []bool{true, false} {
		id, err := h.start(ctx, reference, image, all)
		if err == nil {
			err = h.end(ctx, id, all || image.ends())
		}
		if err != nil {
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

// told adds to a sample what the node tells of the image.
func (h *host) told(ctx context.Context, reference string, s *sample) error {
	client := node.NewClient(filepath.Join(h.dir, "node.sock"))
	defer client.Close()
	images, err := client.Mounted(ctx)
	for _, m := range images {
		if m.Image != reference {
			continue
		}
		s.Misses += m.Misses
		s.WaitedSeconds += m.Waited.Seconds()
		if m.Ahead != nil {
			s.AheadBytes += m.Ahead.PlannedBytes
		}
	}
	return err
}
