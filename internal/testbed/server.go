package testbed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"sync"
)

// server serves on one loopback address, and can be down for a while.
type server struct {
	host    string
	handler http.Handler

	mu     sync.Mutex
	http   *http.Server // nil while it is down
	served chan struct{}
}

// reserve takes an address; start serves there.
func reserve(address string) (*server, net.Listener, error) {
	if address == "" {
		address = "127.0.0.1:0"
	}
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", address)
	if err != nil {
		return nil, nil, err
	}
	return &server{host: l.Addr().String()}, l, nil
}

// start serves on l, or where it did before if that is nil.
func (s *server) start(l net.Listener) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.http != nil {
		return nil
	}
	if l == nil {
		var err error
		if l, err = new(net.ListenConfig).Listen(context.Background(), "tcp", s.host); err != nil {
			return err
		}
	}
	s.http = &http.Server{Handler: s.handler, ErrorLog: log.New(io.Discard, "", 0)}
	s.served = make(chan struct{})
	go func(h *http.Server, served chan struct{}) {
		defer close(served)
		if err := h.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			fmt.Fprintln(os.Stderr, "testbed:", err)
		}
	}(s.http, s.served)
	return nil
}

// stop closes the listener and every connection.
func (s *server) stop() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.http == nil {
		return nil
	}
	err := s.http.Close()
	<-s.served
	s.http = nil
	return err
}
