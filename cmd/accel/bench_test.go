package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"accel/node"

	"github.com/opencontainers/go-digest"
)

// TestBenchTurnsFetchingAheadOnAgain: also for an image that is not measured any more, and after an interruption.
func TestBenchTurnsFetchingAheadOnAgain(t *testing.T) {
	dir, err := os.MkdirTemp("", "bench") // short, for the socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	var said []node.FetchAhead
	s := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var f node.FetchAhead
		if err := json.NewDecoder(r.Body).Decode(&f); err != nil {
			t.Error(err)
		}
		said = append(said, f)
		fmt.Fprint(w, "{}")
	})}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = s.Serve(l) // until it is closed
	}()
	b := &bench{live: node.NewClient(l.Addr().String()), manifest: digest.FromString("a")}
	if err := b.fetchAhead(t.Context(), true); err != nil || len(said) > 0 {
		t.Errorf("turned on what nobody turned off: %v, %v", said, err)
	}
	if err := b.fetchAhead(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.fetchAhead(gone, true); err == nil || b.plain == "" {
		t.Errorf("what was not said counts as said: %v", err)
	}
	b.manifest = digest.FromString("b")
	if err := b.fetchAhead(t.Context(), true); err != nil || b.plain != "" {
		t.Error(err)
	}
	b.live.Close()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	<-served
	want := []node.FetchAhead{{Manifest: digest.FromString("a")}, {Manifest: digest.FromString("a"), On: true}}
	if fmt.Sprint(said) != fmt.Sprint(want) {
		t.Errorf("the node was told %v, want %v", said, want)
	}
}

func TestBenchMedians(t *testing.T) {
	r := benchRow{Runs: []benchRun{{PullSeconds: 3, StartSeconds: 1, FetchedBytes: 7}, {PullSeconds: 1, StartSeconds: 9, FetchedBytes: 5}, {PullSeconds: 2, StartSeconds: 2, FetchedBytes: 6, Misses: 4}}}
	r.summarise()
	if r.PullSeconds != 2 || r.StartSeconds != 2 || r.TotalSeconds != 4 || r.FetchedBytes != 6 || r.Misses != 0 {
		t.Errorf("medians %+v", r)
	}
	if (&benchRow{}).summarise(); medianOf(nil, func(r benchRun) int64 { return r.Misses }) != 0 {
		t.Error("a median of nothing")
	}
}

// A hostile name stays text, and what has no bytes has no bar.
func TestBenchPlot(t *testing.T) {
	drawn := plotBench([]benchRow{{Image: `<script>"&`, Way: benchFull, PullSeconds: 2, StartSeconds: 1}, {Image: `<script>"&`, Way: benchWarm, StartSeconds: 0.5}})
	if bytes.Contains(drawn, []byte("<script>")) || !bytes.Contains(drawn, []byte("&lt;script&gt;")) || !bytes.Contains(drawn, []byte("3.00 s")) {
		t.Errorf("plot:\n%s", drawn)
	}
	plotBench(nil)
}

func TestListening(t *testing.T) {
	for _, at := range []string{"127.0.0.1:0", "0.0.0.0:0", "[::1]:0"} {
		l, err := net.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		want := l.Addr().(*net.TCPAddr)
		open, err := listening(uint32(os.Getpid()))
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, o := range open {
			if o.Port != want.Port {
				continue
			}
			found = true
			if o.IP.IsLoopback() != want.IP.IsLoopback() || !holds([]uint32{uint32(os.Getpid())}, o.inode) || holds([]uint32{1 << 30}, o.inode) {
				t.Errorf("%s is seen as %+v", want, o)
			}
		}
		if !found {
			t.Errorf("%s is not among %v", want, open)
		}
	}
	for _, line := range []string{"", "0: 0100007F:2328", "0: 0100007F:2328 00000000:0000 01 a b c d e f", "0: XX:2328 00000000:0000 0A a b c d e 1", "0: 01:2328 00000000:0000 0A a b c d e 1"} {
		if at, ok := parseListener(line); ok {
			t.Errorf("%q is %v", line, at)
		}
	}
}
