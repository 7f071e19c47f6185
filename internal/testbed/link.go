package testbed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// A parcel, the piece that a link carries at a time, takes it parcelTime, within
	// these bounds: small enough that connections share fairly, large enough that a
	// fast link costs little CPU.
	parcelTime     = time.Millisecond
	minParcelBytes = 2 << 10
	maxParcelBytes = 128 << 10
	// queueTime is how far ahead of the clock a connection may book the link, as a
	// short queue in a router does: a wake-up that comes so late leaves no gap.
	queueTime = 5 * time.Millisecond
	// lateTime is how much later still a wake-up may come: a busy machine, whose
	// processors the link shares with those that it measures, slows no network down.
	lateTime = 100 * time.Millisecond
	// windowBytes are under way at most on one connection and direction, as TCP's
	// receive window has it by default on Linux.
	windowBytes = 4 << 20
	// quickRead is what reading a parcel takes where its bytes had been waiting.
	quickRead = 200 * time.Microsecond
	// roughSleep is what the runtime's timers may oversleep.
	roughSleep = 1500 * time.Microsecond
)

// LinkSpeed is what a link's network is like. The zero value is no network at
// all: bytes pass as they come.
type LinkSpeed struct {
	BitsPerSecond int64         // in each direction, of all connections together; 0: unlimited
	RoundTrip     time.Duration // half of it is added each way, and all of it to connecting
}

var bitUnits = []struct {
	suffix string
	bits   int64
}{{"gbit", 1e9}, {"mbit", 1e6}, {"kbit", 1e3}}

// ParseLinkSpeed reads "RATE:ROUNDTRIP" such as "100mbit:50ms".
func ParseLinkSpeed(text string) (LinkSpeed, error) {
	wrong := func(why error) (LinkSpeed, error) {
		return LinkSpeed{}, fmt.Errorf("link speed %q: want one such as 100mbit:50ms: %w", text, why)
	}
	rate, trip, ok := strings.Cut(text, ":")
	if !ok {
		return wrong(errors.New("no colon"))
	}
	for _, u := range bitUnits {
		number, ok := strings.CutSuffix(rate, u.suffix)
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(number, 10, 32)
		if err != nil || n <= 0 {
			return wrong(fmt.Errorf("rate %q: %w", rate, errors.Join(err, strconv.ErrRange)))
		}
		d, err := time.ParseDuration(trip)
		if err != nil || d < 0 {
			return wrong(fmt.Errorf("round trip %q: %w", trip, errors.Join(err, strconv.ErrRange)))
		}
		return LinkSpeed{n * u.bits, d}, nil
	}
	return wrong(fmt.Errorf("no unit of gbit, mbit or kbit in %q", rate))
}

// String is what ParseLinkSpeed reads.
func (s LinkSpeed) String() string {
	for _, u := range bitUnits {
		if s.BitsPerSecond >= u.bits && s.BitsPerSecond%u.bits == 0 {
			return fmt.Sprintf("%d%s:%s", s.BitsPerSecond/u.bits, u.suffix, s.RoundTrip)
		}
	}
	return fmt.Sprintf("%dbit:%s", s.BitsPerSecond, s.RoundTrip)
}

func (s LinkSpeed) parcelBytes() int {
	if s.BitsPerSecond == 0 {
		return maxParcelBytes
	}
	return int(min(max(s.BitsPerSecond/8*int64(parcelTime)/int64(time.Second), minParcelBytes), maxParcelBytes))
}

// Link is a stretch of network on loopback in front of a TCP server: clients that
// connect to Host get the server, as slow and as far away as Shape says. It knows no
// slow start and loses nothing. Close ends it.
type Link struct {
	target   string
	listener net.Listener
	speed    atomic.Pointer[LinkSpeed]
	up, down lane
	buffers  sync.Pool // *[maxParcelBytes]byte
	running  sync.WaitGroup

	mu     sync.Mutex
	open   map[net.Conn]struct{}
	closed bool
}

// lane is one direction, which all connections share.
type lane struct {
	delivered atomic.Int64 // bytes

	mu   sync.Mutex
	free time.Time // when all that is booked has passed
}

// StartLink opens a link to target ("host:port"), at first without a network
// between.
func StartLink(target string) (*Link, error) {
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	k := &Link{target: target, listener: l, open: map[net.Conn]struct{}{}}
	k.buffers.New = func() any { return new([maxParcelBytes]byte) }
	k.Shape(LinkSpeed{})
	k.running.Go(k.accept)
	return k, nil
}

// Host is "address:port", where clients find the server.
func (k *Link) Host() string { return k.listener.Addr().String() }

// Shape makes the network be like s from now on, for open connections too.
func (k *Link) Shape(s LinkSpeed) { k.speed.Store(&s) }

// DeliveredBytes is what clients were sent since the start, headers included.
func (k *Link) DeliveredBytes() int64 { return k.down.delivered.Load() }

// Close cuts every connection and ends the link. Closing twice is fine.
func (k *Link) Close() error {
	k.mu.Lock()
	was := k.closed
	k.closed = true
	for c := range k.open {
		c.Close() //nolint:errcheck // cut off
	}
	k.mu.Unlock()
	if was {
		return nil
	}
	err := k.listener.Close()
	k.running.Wait()
	return err
}

func (k *Link) accept() {
	for {
		client, err := k.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "testbed: link:", err)
			return
		}
		k.running.Go(func() { k.carry(client) })
	}
}

// track has Close cut c; false where that has been.
func (k *Link) track(c net.Conn) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		c.Close() //nolint:errcheck // cut off
		return false
	}
	k.open[c] = struct{}{}
	return true
}

func (k *Link) drop(c net.Conn) {
	k.mu.Lock()
	defer k.mu.Unlock()
	c.Close() //nolint:errcheck // may be so already
	delete(k.open, c)
}

// carry serves one client. Its connect has been answered by the kernel at once, so
// the round trip that it takes is added before the first byte.
func (k *Link) carry(client net.Conn) {
	connected := time.Now().Add(k.speed.Load().RoundTrip)
	if !k.track(client) {
		return
	}
	defer k.drop(client)
	server, err := new(net.Dialer).DialContext(context.Background(), "tcp", k.target)
	if err != nil || !k.track(server) {
		return // the client sees a server that hangs up
	}
	defer k.drop(server)
	var both sync.WaitGroup
	both.Go(func() { k.pump(&k.up, client, server, connected) })
	both.Go(func() { k.pump(&k.down, server, client, time.Time{}) })
	both.Wait()
}

// parcel is under way until at.
type parcel struct {
	buffer *[maxParcelBytes]byte
	bytes  int
	at     time.Time
}

// pump carries one direction until the sender ends it, which it passes on, or one
// of both fails, which ends the other direction too.
func (k *Link) pump(l *lane, from, to net.Conn, notBefore time.Time) {
	underWay := make(chan parcel, windowBytes/k.speed.Load().parcelBytes())
	var delivery sync.WaitGroup
	delivery.Go(func() { k.deliver(l, underWay, from, to) })
	wake := time.Now() // when the next parcel was to be taken
	for {
		speed := k.speed.Load()
		p := parcel{buffer: k.buffers.Get().(*[maxParcelBytes]byte)}
		asked := time.Now()
		n, err := from.Read(p.buffer[:speed.parcelBytes()])
		if n > 0 {
			ready := time.Now()
			if n == speed.parcelBytes() && ready.Sub(asked) < quickRead {
				ready = latest(wake, ready.Add(-lateTime))
			}
			departed := notBefore // before that comes a first request, too small to count
			if ready.After(notBefore) {
				departed = l.book(n, speed.BitsPerSecond, ready)
			}
			p.bytes, p.at = n, departed.Add(speed.RoundTrip/2)
			wake = departed.Add(-queueTime)
			select {
			case underWay <- p:
			default: // the receiver's window is full, so the link stands still
				underWay <- p
				wake = latest(wake, time.Now())
			}
			sleepUntil(wake)
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				to.Close() //nolint:errcheck // may be so already
			}
			close(underWay)
			delivery.Wait()
			return
		}
	}
}

// book gives the time at which bytes that were there at ready have been sent.
func (l *lane) book(bytes int, bitsPerSecond int64, ready time.Time) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.free = latest(l.free, ready)
	if bitsPerSecond > 0 {
		l.free = l.free.Add(time.Duration(int64(bytes) * 8 * int64(time.Second) / bitsPerSecond))
	}
	return l.free
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func (k *Link) deliver(l *lane, underWay <-chan parcel, from, to net.Conn) {
	var failed error
	for p := range underWay {
		if failed == nil {
			sleepUntil(p.at)
			l.delivered.Add(int64(p.bytes)) // first: whoever has the bytes finds them counted
			if _, failed = to.Write(p.buffer[:p.bytes]); failed != nil {
				from.Close() //nolint:errcheck // nobody reads what it sends
			}
		}
		k.buffers.Put(p.buffer)
	}
	if t, ok := to.(*net.TCPConn); ok && failed == nil {
		t.CloseWrite() //nolint:errcheck // may be closed already
	}
}

// sleepUntil is exact to a tenth of a millisecond, where time.Sleep is to one.
func sleepUntil(t time.Time) {
	if d := time.Until(t); d > roughSleep {
		time.Sleep(d - roughSleep)
	}
	for d := time.Until(t); d > 0; d = time.Until(t) {
		rest := unix.NsecToTimespec(int64(d))
		if err := unix.Nanosleep(&rest, nil); err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}
