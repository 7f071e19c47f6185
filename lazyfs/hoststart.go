package lazyfs

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// holder is the one that serves new mounts; it is started where there is none.
func (h *Host) holder(ctx context.Context) (*holderLink, error) {
	unlock, err := h.starting.Lock(ctx, "")
	if err != nil {
		return nil, err
	}
	defer unlock()
	h.mu.Lock()
	r := h.running
	h.mu.Unlock()
	if r == nil || r.ctx.Err() != nil {
		return nil, fmt.Errorf("%w: Run has ended", ErrClosed)
	}
	for _, l := range h.links() {
		if l.version == h.o.Version && l.peer.alive() && !h.dead(l.name) {
			return l, nil
		}
	}
	names, err := h.holderNames()
	if err != nil {
		return nil, err
	}
	for _, name := range names { // one that took too long to start
		if strings.HasPrefix(name, h.o.Version+"@") && !h.dead(name) {
			if link, err := h.connect(r, name); err == nil {
				return link, nil
			}
		}
	}
	link, err := h.startHolder(ctx, r, names)
	if err != nil {
		return nil, fmt.Errorf("start holder: %w", err)
	}
	return link, nil
}

// startHolder starts one beside those that are there.
func (h *Host) startHolder(ctx context.Context, r *run, before []string) (*holderLink, error) {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	if _, err := os.Stat("/dev/fuse"); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	pid, err := h.spawn()
	if err != nil {
		return nil, err
	}
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for {
		names, err := h.holderNames()
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			if slices.Contains(before, name) || !strings.HasPrefix(name, h.o.Version+"@") {
				continue
			}
			if link, err := h.connect(r, name); err == nil { // else it does not listen yet
				return link, nil
			}
		}
		var status unix.WaitStatus
		// A command that starts the holder and ends well is fine.
		if got, err := unix.Wait4(pid, &status, unix.WNOHANG, nil); err == nil && got == pid && (status.Signaled() || status.ExitStatus() != 0) {
			h.mu.Lock()
			delete(h.children, pid)
			h.mu.Unlock()
			return nil, fmt.Errorf("it ended (status %d, signal %d): %s", status.ExitStatus(), status.Signal(), h.lastWords(h.o.Version))
		}
		select {
		case <-poll.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %s", context.Cause(ctx), h.lastWords(h.o.Version))
		}
	}
}

// spawn starts Options.Holder in a session of its own. Its output goes to a file: a
// pipe would break with us.
func (h *Host) spawn() (pid int, err error) {
	path, err := exec.LookPath(h.o.Holder[0])
	if err != nil {
		return 0, err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	log, err := os.OpenFile(h.logPath(h.o.Version), os.O_CREATE|os.O_WRONLY|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	process, err := os.StartProcess(path, h.o.Holder, &os.ProcAttr{
		Dir: "/", Files: []*os.File{null, log, log}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, err
	}
	pid = process.Pid
	h.mu.Lock()
	h.children[pid] = true
	h.mu.Unlock()
	return pid, process.Release() // reconnect takes its exit status
}
