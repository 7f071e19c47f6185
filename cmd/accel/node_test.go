package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"accel/doctor"
	"accel/install"
)

func TestNodeDocumentIsUpToDate(t *testing.T) {
	have, err := os.ReadFile("../../docs/node.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(string(have), nodeConfigDocs()) {
		t.Error("the table of docs/node.md is out of date: go run ./cmd/accel node --print-config-docs")
	}
	for _, k := range nodeKeys() {
		if k.doc == "" || strings.HasSuffix(k.path, ".") {
			t.Errorf("key %q has no doc", k.path)
		}
	}
}

// good is the least that a node needs.
const good = "registries: [{host: 'r.test:5000', plain_http: true}]\n"

func TestCheckNodeConfig(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		says string // empty: good
	}{
		"good":           {good + "labels: {zone: a}\ncache: {budget: 10GiB}\nserver: {url: 'https://a.test'}\nmetrics: {listen: '0.0.0.0:9100'}\n", ""},
		"no registry":    {"name: x\n", "registries"},
		"unknown key":    {good + "lables: {}\n", "unknown key lables"},
		"not loopback":   {good + "listen: 0.0.0.0:5555\n", "credentials"},
		"no port":        {good + "listen: localhost\n", "listen"},
		"no quiet":       {good + "pulls: {quiet: 0s}\n", "pulls.quiet"},
		"negative":       {good + "mirror: {tag_ttl: -1s}\n", "mirror.tag_ttl"},
		"no such token":  {good + "server: {url: 'https://a.test', token_file: /no/such}\n", "server.token_file"},
		"token for whom": {good + "server: {token_file: /no/such}\n", "server.url"},
		"bad server":     {good + "server: {url: a.test}\n", "server.url"},
		"bad metrics":    {good + "metrics: {listen: here}\n", "metrics.listen"},
		"relative":       {good + "containerd: {config_dir: certs.d}\n", "containerd.config_dir"},
		"no warms":       {good + "warm: {concurrency: 0}\n", "warm.concurrency"},
		"log":            {good + "log: {level: loud, format: xml}\n", "log.format"},
	} {
		t.Run(name, func(t *testing.T) {
			code, out, said := accelRun(t, "node", "--check-config", "--config", configFile(t, c.text))
			if c.says == "" {
				if code != exitOK || !strings.Contains(out, "good") {
					t.Errorf("exit %d: %s%s", code, out, said)
				}
				return
			}
			if code != exitUsage || !strings.Contains(said, c.says) {
				t.Errorf("exit %d, says %q, want 2 and %q", code, said, c.says)
			}
		})
	}
	if code, _, said := accelRun(t, "node", "--check-config", "--config", configFile(t, good), "--token", "x"); code != exitUsage || !strings.Contains(said, "token_file") && !strings.Contains(said, "token-file") {
		t.Errorf("a token on a daemon's command line: exit %d, %q", code, said)
	}
	t.Setenv("ACCEL_NODE_LABELS", "{zone: b}")
	t.Setenv("ACCEL_NODE_LISTEN", "0.0.0.0:1")
	if code, _, said := accelRun(t, "node", "--check-config", "--config", configFile(t, good)); code != exitUsage || !strings.Contains(said, "0.0.0.0:1") {
		t.Errorf("environment: exit %d, %q", code, said)
	}
	if code, _, said := accelRun(t, "node", "--check-config", "--config", configFile(t, good), "--listen", "127.0.0.1:0"); code != exitOK {
		t.Errorf("a flag counts more: exit %d, %q", code, said)
	}
}

func TestInstallByCommand(t *testing.T) {
	root, file := t.TempDir(), configFile(t, good)
	hosts := filepath.Join(root, "/etc/containerd/certs.d/r.test_5000_/hosts.toml")
	code, out, said := accelRun(t, "node", "install", "--root", root, "--config", file, "--dry-run")
	if code != exitOK || !strings.Contains(out, "create") || !strings.Contains(out, "config_path") {
		t.Errorf("dry run: exit %d, %s%s", code, out, said)
	}
	if left, _ := os.ReadDir(root); len(left) != 0 {
		t.Errorf("a dry run wrote %v", left)
	}
	for _, want := range []install.Action{install.Create, install.Keep} {
		code, out, said = accelRun(t, "node", "install", "--root", root, "--config", file, "--binary", "/usr/bin/accel", "-o", "json")
		var done installed
		if err := json.Unmarshal([]byte(out), &done); err != nil || code != exitOK || len(done.Changes) != 3 || done.Changes[0].Action != want {
			t.Fatalf("exit %d, %s%s (%v)", code, out, said, err)
		}
	}
	if unit, err := os.ReadFile(filepath.Join(root, install.UnitPath)); err != nil || !strings.Contains(string(unit), "/usr/bin/accel node --config "+file) {
		t.Errorf("unit: %s, %v", unit, err)
	}
	if err := os.WriteFile(hosts, []byte("server = 'https://mine.test'\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, out, said = accelRun(t, "node", "install", "--root", root, "--config", file); code != exitFailed || !strings.Contains(out, "conflict") || !strings.Contains(said, "left alone") {
		t.Errorf("somebody else's file: exit %d, %s%s", code, out, said)
	}
	if code, out, said = accelRun(t, "node", "uninstall", "--root", root, "--config", file); code != exitOK || !strings.Contains(out, install.UnitPath) || strings.Contains(out, "hosts.toml") {
		t.Errorf("uninstall: exit %d, %s%s", code, out, said)
	}
	if _, err := os.Stat(hosts); err != nil {
		t.Error("somebody else's file was removed")
	}
}

func TestDoctorByCommand(t *testing.T) {
	dir := t.TempDir()
	text := "registries: [{host: '127.0.0.1:1', plain_http: true}]\ndata: " + dir + "\nsocket: " + dir + "/s\ncontainerd: {config: " + dir + "/none, socket: " + dir + "/none, config_dir: " + dir + "}\n"
	code, out, said := accelRun(t, "doctor", "--config", configFile(t, text), "-o", "json")
	var found []doctor.Finding
	if err := json.Unmarshal([]byte(out), &found); err != nil || code != exitFailed || said == "" {
		t.Fatalf("exit %d, %s%s (%v)", code, out, said, err)
	}
	levels := map[string]doctor.Level{}
	for _, f := range found {
		levels[f.Area] = f.Level
	}
	if levels["node"] != doctor.Fail || levels["registry"] != doctor.Fail || levels["containerd"] != doctor.Warn || levels["server"] != doctor.Warn {
		t.Errorf("%+v", found)
	}
	if code, out, _ := accelRun(t, "doctor", "--config", configFile(t, text)); code != exitFailed || !strings.Contains(out, "-> ") {
		t.Errorf("exit %d, no word on how to mend: %s", code, out)
	}
}

func TestCacheWithoutANode(t *testing.T) {
	file := configFile(t, "data: /no/such/folder\nsocket: /no/such/socket\n")
	for _, args := range [][]string{{"ls"}, {"stat"}, {"check"}, {"gc"}, {"pin", "x:y"}, {"unpin", "x:y"}} {
		code, _, said := accelRun(t, append(append([]string{"cache"}, args...), "--config", file)...)
		if code != exitFailed || !strings.Contains(said, "--data") {
			t.Errorf("accel cache %v: exit %d, %q", args, code, said)
		}
	}
	for _, args := range [][]string{{"nonsense"}, {"pin"}, {"stat", "a", "b"}} {
		if code, _, said := accelRun(t, append([]string{"cache"}, args...)...); code != exitUsage || said == "" {
			t.Errorf("accel cache %v: exit %d, %q", args, code, said)
		}
	}
}

// TestNodeByCommand runs the daemon as a service manager does.
func TestNodeByCommand(t *testing.T) {
	dir, err := os.MkdirTemp("", "node") // short, for the sockets
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	file := configFile(t, "registries: [{host: '127.0.0.1:1', plain_http: true}]\nlisten: 127.0.0.1:0\nname: n1\ndata: "+dir+"/data\nsocket: "+dir+"/s\nmetrics: {listen: '127.0.0.1:0'}\nsnapshotter: {socket: '', runtime: "+dir+"/run}\n")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: dir + "/notify", Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	t.Setenv("NOTIFY_SOCKET", dir+"/notify")

	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	ended := make(chan int, 1)
	var said bytes.Buffer
	go func() {
		ended <- run(ctx, []string{"node", "--config", file}, strings.NewReader(""), io.Discard, &said)
		manager.SetReadDeadline(time.Now()) // whoever waits for it waits in vain
	}()
	heard := make([]byte, 100)
	n, err := manager.Read(heard)
	if err != nil || string(heard[:n]) != "READY=1" {
		t.Fatalf("the service manager heard %q, %v", heard[:n], err)
	}
	if code, _, said := accelRun(t, "node", "--config", file); code != exitFailed || !strings.Contains(said, strconv.Itoa(os.Getpid())) || !strings.Contains(said, "--data") {
		t.Errorf("a second daemon: exit %d, %q", code, said)
	}
	answers := func() (all []string) {
		for _, args := range [][]string{{"ls"}, {"check"}, {"gc"}, {"stat", "-o", "json"}} {
			code, out, said := accelRun(t, append(append([]string{"cache"}, args...), "--config", file)...)
			if code != exitOK {
				t.Errorf("accel cache %v: exit %d, %s", args, code, said)
			}
			all = append(all, out)
		}
		return all[:3] // the last has the free space, which changes
	}
	live := answers()
	stop()
	if code := <-ended; code != exitOK {
		t.Errorf("stopped, it ends with %d: %s", code, said.String())
	}
	if stopped := answers(); !slices.Equal(live, stopped) {
		t.Errorf("a live node says %q, its folder %q", live, stopped)
	}
}
