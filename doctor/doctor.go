// Package doctor examines a machine that runs, or is to run, a node: kernel, containerd and
// its hosts.toml files, disk, registries, server, clock, the daemon itself, and what lazy mounts
// need. Each finding says how to mend it. It changes nothing.
package doctor

import (
	"cmp"
	"context"
	"net/http"
	"slices"
	"sync"
	"time"

	"accel/install"
	"accel/node"
	"accel/registry"
)

// Level says how bad a finding is.
type Level string

// Levels of a Finding.
const (
	OK   Level = "ok"
	Warn Level = "warn" // it works, but not all of it, or not for long
	Fail Level = "fail" // pulls do not go through the node, the node cannot run, or containers cannot start
)

// Finding is one thing that was looked at.
type Finding struct {
	Area   string `json:"area"` // kernel, containerd, hosts.toml, disk, registry, server, clock, node, lazy
	Level  Level  `json:"level"`
	Detail string `json:"detail"`
	Mend   string `json:"mend,omitempty"` // what to do about it; empty when OK
}

// Options say what belongs to the machine.
type Options struct {
	// Root stands for /; other than empty in tests only.
	Root string
	// Install is the installation as it should be; its Unit is not looked at. Without a
	// Snapshotter images are not mounted lazily, and what that needs is not looked at either.
	Install install.Options
	// Lazy: images may be mounted lazily.
	Lazy bool
	// RuntimeDir is the folder of the process that serves lazy mounts.
	RuntimeDir string
	// KeysFile has public keys whose mappings are believed; empty: none.
	KeysFile string
	// ContainerdConfig and ContainerdSocket are containerd's.
	ContainerdConfig, ContainerdSocket string
	// Dir is the node's folder, with the bounds of its store.
	Dir                         string
	BudgetBytes, FreeFloorBytes int64
	// Registries are asked through Client, which should not try for long.
	Registries []registry.Host
	Client     *registry.Client
	// Node asks the daemon.
	Node *node.Client
	// Server is the server's URL, Token what it is asked with; empty: there is none.
	Server, Token string
	NodeName      string
	HTTP          *http.Client // for the server and clocks; nil: http.DefaultClient
	// Patience bounds each question to another machine; default 10 s.
	Patience time.Duration
	Now      func() time.Time // nil: time.Now
}

// Examine looks at everything, in the order in which things depend on each other.
func Examine(ctx context.Context, o Options) []Finding {
	if o.HTTP == nil {
		o.HTTP = http.DefaultClient
	}
	if o.Patience <= 0 {
		o.Patience = 10 * time.Second
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	parts := []func(context.Context) []Finding{o.kernel, o.containerd, o.disk, o.daemon, o.lazy, o.registries, o.server, o.clock}
	found := make([][]Finding, len(parts))
	var wg sync.WaitGroup
	for i, examine := range parts {
		wg.Go(func() { found[i] = examine(ctx) })
	}
	wg.Wait()
	return slices.Concat(found...)
}

// Worst is the worst level of findings; OK without any.
func Worst(findings []Finding) Level {
	rank := map[Level]int{OK: 0, Warn: 1, Fail: 2}
	worst := OK
	for _, f := range findings {
		if cmp.Compare(rank[f.Level], rank[worst]) > 0 {
			worst = f.Level
		}
	}
	return worst
}

func ok(area, detail string) Finding { return Finding{Area: area, Level: OK, Detail: detail} }

func warn(area, detail, mend string) Finding {
	return Finding{Area: area, Level: Warn, Detail: detail, Mend: mend}
}

func fail(area, detail, mend string) Finding {
	return Finding{Area: area, Level: Fail, Detail: detail, Mend: mend}
}
