package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// process is one running accel, with its log kept for error messages.
type process struct {
	cmd     *exec.Cmd
	url     string
	log     bytes.Buffer
	started time.Duration // from exec to the first good /readyz
}

// freeAddress picks a loopback port that was free just now.
func freeAddress(ctx context.Context) (string, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// start runs bin/accel with args, which must make it listen on address.
func start(ctx context.Context, address string, args ...string) (*process, error) {
	p := &process{cmd: exec.CommandContext(ctx, filepath.Join("bin", "accel"), args...), url: "http://" + address}
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	begin := time.Now()
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	for ctx.Err() == nil {
		if p.ready(ctx) {
			p.started = time.Since(begin)
			return p, nil
		}
		if time.Since(begin) > time.Minute {
			break
		}
		time.Sleep(2 * time.Millisecond)
	}
	return nil, errors.Join(fmt.Errorf("accel %s did not get ready; its log:\n%s", strings.Join(args, " "), p.log.String()), p.stop())
}

// ready asks /readyz once.
func (p *process) ready(ctx context.Context) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url+"/readyz", nil)
	if err != nil {
		return false
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	return res.Body.Close() == nil && res.StatusCode == http.StatusOK
}

func (p *process) stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	return p.cmd.Wait()
}

// residentMiB reads a field of /proc/PID/status, such as VmRSS or RssAnon.
func (p *process) residentMiB(field string) (float64, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(raw)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			kib, err := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 64)
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("no %s in /proc status", field)
}
