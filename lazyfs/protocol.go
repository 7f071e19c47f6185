package lazyfs

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// The daemon and a holder talk over one stream socket in the holder's directory:
// each message is its length (u32, little-endian) and that much JSON. Either side asks, and
// answers come in any order. A daemon and a holder of different versions have to
// understand each other, so what is here is only ever added to.
const (
	askHello  = "hello"  // daemon: who are you? The answer has Version, PID and Layers
	askAdd    = "add"    // daemon: serve this layer (Layers[0])
	askRemove = "remove" // daemon: serve this layer no more; Code "in_use" while it is open
	askRetire = "retire" // daemon: end with your last open file
	askFill   = "fill"   // holder: bring these chunks (Digest, First, N)
	askCancel = "cancel" // either: nobody waits for the answer to ID any more; has no answer
	askOpens  = "opens"  // holder: so many have this layer open now (Digest, N); has no answer
	answer    = "answer"
)

// maxMessageBytes bounds a message: a hello that names 10,000 layers has 6 MB.
const maxMessageBytes = 16 << 20

// writeLimit is how long the other side may keep us from writing. One that takes
// nothing for so long (stopped, not killed) is treated as gone.
const writeLimit = 30 * time.Second

type message struct {
	Kind    string        `json:"kind"`
	ID      uint64        `json:"id,omitempty"` // of the question; counted by its sender
	Digest  digest.Digest `json:"digest,omitempty"`
	First   int           `json:"first,omitempty"`
	N       int           `json:"n,omitempty"`
	Version string        `json:"version,omitempty"`
	PID     int           `json:"pid,omitempty"`
	Layers  []heldLayer   `json:"layers,omitempty"`
	Error   string        `json:"error,omitempty"` // the answer is no, and why
	Code    string        `json:"code,omitempty"`  // a sentinel that Error stands for
}

// heldLayer is a layer as daemon and holder name it to each other.
type heldLayer struct {
	Digest digest.Digest `json:"digest"`
	Table  string        `json:"table"`
	Data   string        `json:"data"`
	Bits   string        `json:"bits"`
	Reads  string        `json:"reads,omitempty"` // empty, or not known: they are not noted
	Opens  int           `json:"opens,omitempty"`
}

// codes carry sentinel errors over the socket.
var codes = map[string]error{"in_use": ErrInUse, "damaged": ErrDamaged, "unknown": ErrUnknown}

func refuse(err error) message {
	m := message{Error: err.Error()}
	for code, sentinel := range codes {
		if errors.Is(err, sentinel) {
			m.Code = code
		}
	}
	return m
}

func (m message) err() error {
	if m.Error == "" {
		return nil
	}
	if sentinel := codes[m.Code]; sentinel != nil {
		return fmt.Errorf("%w (%s)", sentinel, m.Error)
	}
	return errors.New(m.Error)
}

// errGone: the other side is not there any more; it did not answer.
var errGone = errors.New("connection closed")

// peer is one end of the connection.
type peer struct {
	conn net.Conn

	writing sync.Mutex

	mu      sync.Mutex
	lastID  uint64
	pending map[uint64]chan message       // our questions
	cancels map[uint64]context.CancelFunc // theirs
	gone    chan struct{}                 // closed with the connection
	closed  bool
}

func newPeer(conn net.Conn) *peer {
	return &peer{
		conn: conn, gone: make(chan struct{}),
		pending: map[uint64]chan message{}, cancels: map[uint64]context.CancelFunc{},
	}
}

func (p *peer) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed {
		p.closed = true
		close(p.gone)
		_ = p.conn.Close() // nothing is owed to the other side
	}
}

func (p *peer) alive() bool {
	select {
	case <-p.gone:
		return false
	default:
		return true
	}
}

func (p *peer) send(m message) error {
	body, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(body) > maxMessageBytes {
		return fmt.Errorf("message of %d bytes", len(body))
	}
	frame := make([]byte, 4+len(body))
	binary.LittleEndian.PutUint32(frame, uint32(len(body)))
	copy(frame[4:], body)
	p.writing.Lock()
	defer p.writing.Unlock()
	if err = p.conn.SetWriteDeadline(time.Now().Add(writeLimit)); err == nil {
		_, err = p.conn.Write(frame)
	}
	if err != nil {
		p.close() // half a frame may be out
		return errGone
	}
	return nil
}

// ask sends m and waits for the answer. Errors: errGone, ctx's cause, what the other
// side says.
func (p *peer) ask(ctx context.Context, m message) (message, error) {
	p.mu.Lock()
	p.lastID++
	m.ID = p.lastID
	got := make(chan message, 1)
	p.pending[m.ID] = got
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.pending, m.ID)
		p.mu.Unlock()
	}()
	if err := p.send(m); err != nil {
		return message{}, err
	}
	select {
	case a := <-got:
		return a, a.err()
	case <-p.gone:
		return message{}, errGone
	case <-ctx.Done():
		_ = p.send(message{Kind: askCancel, ID: m.ID}) // gone: then nobody works on it either
		return message{}, context.Cause(ctx)
	}
}

// serve reads until the connection ends. Each question is handed to handle in a
// goroutine of its own; where that returns false it is not answered. Notes (no
// answer) are handed to it in order. It returns when all handlers have.
func (p *peer) serve(ctx context.Context, handle func(context.Context, message) (message, bool)) error {
	ctx, cancelAll := context.WithCancel(ctx)
	var working sync.WaitGroup
	defer working.Wait()
	defer cancelAll()
	defer p.close()
	stop := context.AfterFunc(ctx, p.close)
	defer stop()
	in := bufio.NewReader(p.conn)
	for {
		m, err := receive(in)
		if err != nil {
			return err
		}
		switch m.Kind {
		case answer:
			p.mu.Lock()
			if got := p.pending[m.ID]; got != nil {
				delete(p.pending, m.ID) // an ID answered twice must not block us
				got <- m
			}
			p.mu.Unlock()
		case askCancel:
			p.mu.Lock()
			if cancel := p.cancels[m.ID]; cancel != nil {
				cancel()
			}
			p.mu.Unlock()
		case askOpens:
			handle(ctx, m)
		default:
			one, cancel := context.WithCancel(ctx)
			p.mu.Lock()
			p.cancels[m.ID] = cancel
			p.mu.Unlock()
			working.Go(func() {
				reply, ok := handle(one, m)
				p.mu.Lock()
				delete(p.cancels, m.ID)
				p.mu.Unlock()
				cancel()
				if ok {
					reply.Kind, reply.ID = answer, m.ID
					_ = p.send(reply) // gone: it asks again when it is back
				}
			})
		}
	}
}

func receive(in *bufio.Reader) (message, error) {
	var length [4]byte
	if _, err := io.ReadFull(in, length[:]); err != nil {
		return message{}, err
	}
	n := binary.LittleEndian.Uint32(length[:])
	if n > maxMessageBytes {
		return message{}, fmt.Errorf("message of %d bytes", n)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(in, body); err != nil {
		return message{}, err
	}
	var m message
	if err := json.Unmarshal(body, &m); err != nil {
		return message{}, fmt.Errorf("malformed message: %w", err)
	}
	return m, nil
}
