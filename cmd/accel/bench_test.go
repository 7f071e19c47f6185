package main

import (
	"bytes"
	"net"
	"os"
	"testing"
)

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
