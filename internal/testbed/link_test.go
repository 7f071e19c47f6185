package testbed

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestParseLinkSpeed(t *testing.T) {
	for text, want := range map[string]LinkSpeed{
		"1gbit:10ms":   {1e9, 10 * time.Millisecond},
		"100mbit:50ms": {1e8, 50 * time.Millisecond},
		"25mbit:0s":    {25e6, 0},
	} {
		got, err := ParseLinkSpeed(text)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
		if got.String() != text {
			t.Errorf("%s: written as %s", text, got)
		}
	}
	for _, text := range []string{"", "1gbit", "1:10ms", "0mbit:1ms", "-1mbit:1ms", "1gbit:x", "1gbit:-1ms"} {
		if got, err := ParseLinkSpeed(text); err == nil {
			t.Errorf("%q: taken for %+v", text, got)
		}
	}
}

// linkTo serves h behind a link of speed s.
func linkTo(t *testing.T, h http.HandlerFunc, s LinkSpeed) (*Link, *http.Client) {
	t.Helper()
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	l, err := StartLink(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	l.Shape(s)
	client := &http.Client{Transport: &http.Transport{DisableCompression: true}}
	t.Cleanup(func() {
		client.CloseIdleConnections()
		for range 2 {
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	return l, client
}

func get(client *http.Client, l *Link) (int64, error) {
	req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, "http://"+l.Host(), nil)
	if err != nil {
		return 0, err
	}
	res, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	n, err := io.Copy(io.Discard, res.Body)
	return n, errors.Join(err, res.Body.Close())
}

// The least that a link takes is certain on any machine; how close a machine comes to it is
// logged, and the benchmark's business.
func TestLinkBounds(t *testing.T) {
	const size = 12_500_000
	for _, c := range []struct {
		speed   string
		streams int64
		least   time.Duration // of all the bytes, without queueTime
	}{
		{"1gbit:10ms", 1, 100 * time.Millisecond},
		{"1gbit:10ms", 4, 400 * time.Millisecond},
		{"200mbit:50ms", 2, time.Second},
	} {
		t.Run(c.speed, func(t *testing.T) {
			speed, err := ParseLinkSpeed(c.speed)
			if err != nil {
				t.Fatal(err)
			}
			block := make([]byte, size)
			l, client := linkTo(t, func(w http.ResponseWriter, _ *http.Request) { w.Write(block) }, speed) //nolint:errcheck // the client tells
			began := time.Now()
			var group errgroup.Group
			for range c.streams {
				group.Go(func() error {
					n, err := get(client, l)
					if n != size {
						t.Errorf("%d bytes, want %d", n, size)
					}
					return err
				})
			}
			if err := group.Wait(); err != nil {
				t.Fatal(err)
			}
			took, least := time.Since(began), c.least+2*speed.RoundTrip
			if took < least {
				t.Errorf("%s is quicker than the link, %s", took, least)
			}
			if n := l.DeliveredBytes(); n < size*c.streams {
				t.Errorf("%d bytes counted of %d", n, size*c.streams)
			}
			t.Logf("%d streams: %s, %.1f %% above %s", c.streams, took, 100*(took.Seconds()/least.Seconds()-1), least)
		})
	}
}

func TestLinkRoundTrips(t *testing.T) {
	const trip = 20 * time.Millisecond
	l, client := linkTo(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) }, LinkSpeed{1e9, trip})
	for i, least := range []time.Duration{2 * trip, trip, trip} { // the first connects
		began := time.Now()
		if _, err := get(client, l); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took < least {
			t.Errorf("request %d took %s, less than %s", i, took, least)
		} else {
			t.Logf("request %d: %s above %s", i, took-least, least)
		}
	}
}

func TestLinkPassesOnEnds(t *testing.T) {
	server, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	l, err := StartLink(server.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	l.Shape(LinkSpeed{1e9, 10 * time.Millisecond})
	dial := func() (client, accepted *net.TCPConn) {
		t.Helper()
		c, err := net.Dial("tcp", l.Host())
		if err != nil {
			t.Fatal(err)
		}
		s, err := server.Accept()
		if err != nil {
			t.Fatal(err)
		}
		return c.(*net.TCPConn), s.(*net.TCPConn)
	}
	// The client ends its half, and is still answered.
	c, s := dial()
	if _, err := c.Write([]byte("question")); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(s); string(got) != "question" || err != nil {
		t.Fatalf("the server read %q, %v", got, err)
	}
	if _, err := s.Write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if got, err := io.ReadAll(c); string(got) != "answer" || err != nil {
		t.Fatalf("the client read %q, %v", got, err)
	}
	c.Close()
	// The client goes away in the middle: the server's writing fails, and does not hang.
	c, s = dial()
	go func(c net.Conn) {
		io.CopyN(io.Discard, c, 1<<20) //nolint:errcheck // it goes away in any case
		c.Close()
	}(c)
	block := make([]byte, 1<<20)
	for err == nil {
		_, err = s.Write(block)
	}
	s.Close()
	// The link is cut with connections open.
	c, s = dial()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(s); err != nil {
		t.Logf("the server's end: %v", err)
	}
	s.Close()
	c.Close()
}
