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
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
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
		if res, err := http.Get(p.url + "/readyz"); err == nil {
			res.Body.Close()
			if res.StatusCode == http.StatusOK {
				p.started = time.Since(begin)
				return p, nil
			}
		}
		if time.Since(begin) > time.Minute {
			break
		}
		time.Sleep(2 * time.Millisecond)
	}
	return nil, errors.Join(fmt.Errorf("accel %s did not get ready; its log:\n%s", strings.Join(args, " "), p.log.String()), p.stop())
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
