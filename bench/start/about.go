package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"accel/internal/testbed"

	"golang.org/x/sys/unix"
)

// about says where, when and with what was measured.
type about struct {
	Began       time.Time         `json:"began"`
	Ended       time.Time         `json:"ended"`
	Rates       []string          `json:"rates"` // without the one that round trips are counted by
	Runs        int               `json:"runs"`
	WarmRuns    int               `json:"warmRuns"`
	Cores       int               `json:"cores"`
	Processor   string            `json:"processor"`
	MemoryBytes int64             `json:"memoryBytes"`
	Kernel      string            `json:"kernel"`
	Versions    map[string]string `json:"versions"`
	// Load is the load average of a minute before the first run and after the last one: another
	// program's work is in the figures, too.
	Load [2]float64 `json:"load"`
}

// aboutHere looks at the machine.
func aboutHere(ctx context.Context, s setting) (a about, err error) {
	a = about{Began: time.Now().UTC().Round(time.Second), Runs: s.runs, WarmRuns: s.warmRuns, Cores: runtime.NumCPU(), Versions: map[string]string{}}
	for _, r := range s.rates {
		a.Rates = append(a.Rates, r.String())
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return a, err
	}
	a.Kernel = unix.ByteSliceToString(name.Release[:])
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return a, err
	}
	a.MemoryBytes = int64(info.Totalram) * int64(info.Unit) //nolint:unconvert // not on every platform
	if a.Processor, err = processor(); err != nil {
		return a, err
	}
	a.Load[0] = loadAverage()
	a.Versions["containerd"] = testbed.Containerd2
	for what, command := range map[string][]string{
		"accel": {accelProgram, "version"}, "runc": {"runc", "--version"}, "commit": {"git", "describe", "--always", "--dirty"},
	} {
		out, err := exec.CommandContext(ctx, command[0], command[1:]...).Output()
		if err != nil {
			a.Versions[what] = "unknown"
			continue
		}
		first, _, _ := strings.Cut(string(out), "\n")
		a.Versions[what] = strings.TrimPrefix(strings.TrimSpace(first), "runc version ")
	}
	build, ok := debug.ReadBuildInfo()
	if !ok {
		return a, nil
	}
	a.Versions["go"] = strings.TrimPrefix(build.GoVersion, "go")
	for _, m := range build.Deps {
		switch m.Path {
		case "github.com/containerd/stargz-snapshotter", "github.com/containerd/stargz-snapshotter/estargz", "github.com/distribution/distribution/v3":
			a.Versions[strings.TrimPrefix(m.Path, "github.com/")] = m.Version
		}
	}
	return a, nil
}

// end notes what there is to note after the last run.
func (a *about) end() {
	a.Ended = time.Now().UTC().Round(time.Second)
	a.Load[1] = loadAverage()
}

// join takes in what is said of a later session on the same machine.
func (a *about) join(o about) {
	if a.Began.IsZero() {
		*a = o
		return
	}
	if o.Began.Before(a.Began) {
		a.Began, a.Load[0] = o.Began, o.Load[0]
	}
	if o.Ended.After(a.Ended) {
		a.Ended, a.Load[1] = o.Ended, o.Load[1]
	}
	a.Runs, a.WarmRuns = max(a.Runs, o.Runs), max(a.WarmRuns, o.WarmRuns)
	for _, r := range o.Rates {
		if !slices.Contains(a.Rates, r) {
			a.Rates = append(a.Rates, r)
		}
	}
	for what, v := range o.Versions {
		if was := a.Versions[what]; was != v {
			a.Versions[what] = strings.TrimPrefix(was+" and "+v, " and ")
		}
	}
}

// speeds are the networks.
func (a *about) speeds() ([]testbed.LinkSpeed, error) {
	var speeds []testbed.LinkSpeed
	for _, text := range a.Rates {
		s, err := testbed.ParseLinkSpeed(text)
		if err != nil {
			return nil, err
		}
		speeds = append(speeds, s)
	}
	return speeds, nil
}

func processor() (string, error) {
	f, err := os.Open(filepath.Join("/proc", "cpuinfo"))
	if err != nil {
		return "", err
	}
	defer f.Close() // read only
	for in := bufio.NewScanner(f); in.Scan(); {
		if name, value, ok := strings.Cut(in.Text(), ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value), nil
		}
	}
	return runtime.GOARCH, nil
}

// loadAverage is of the last minute; 0 where nobody knows.
func loadAverage() (load float64) {
	raw, err := os.ReadFile("/proc/loadavg")
	if err == nil {
		_, err = fmt.Sscan(string(raw), &load)
	}
	if err != nil {
		return 0
	}
	return load
}
