package lazy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"accel"
	"accel/internal/durable"
	"accel/trust"
)

const (
	// keysAgain is how soon the server is asked for its keys again when one signed that is not known: whoever may push
	// can attach mappings that a stranger signed.
	keysAgain = 30 * time.Second
	// keysRetry is that after a question that failed, doubled each time up to keysAgain.
	keysRetry = time.Second
)

// Keys are the public keys whose mappings are believed: those of a file, and those that the
// server says are its own. The latter are kept on disk, for starts without the server.
type Keys struct {
	file, kept string
	ask        func(context.Context) (pem []byte, err error) // nil: there is no server

	mu      sync.Mutex
	trusted []*trust.Verifier
	turns   int           // how often the server has said its keys
	again   time.Time     // not asked before; zero: at once
	pause   time.Duration // after the last failure
	asking  chan struct{} // closed when the question that is under way is answered; nil: none is
}

// OpenKeys reads the keys of file (empty: none) and those that were kept in dir. ask, if not nil, gets
// the server's keys as PEM. The error wraps accel.ErrInvalid for a file that holds no keys.
func OpenKeys(file, dir string, ask func(context.Context) ([]byte, error)) (*Keys, error) {
	k := &Keys{file: file, kept: filepath.Join(dir, "keys.pem"), ask: ask}
	if file != "" {
		pem, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("public keys for mappings: %w", err)
		}
		v, err := trust.NewVerifier(pem)
		if err != nil {
			return nil, fmt.Errorf("public keys for mappings in %s: %w", file, err)
		}
		k.trusted = append(k.trusted, v)
	}
	if ask == nil {
		return k, nil
	}
	pem, err := os.ReadFile(k.kept)
	if errors.Is(err, fs.ErrNotExist) {
		return k, nil
	}
	if err != nil {
		return nil, fmt.Errorf("the server's public keys: %w", err)
	}
	if v, err := trust.NewVerifier(pem); err == nil { // a damaged file is replaced when the server answers
		k.trusted = append(k.trusted, v)
	}
	return k, nil
}

// Verify checks an envelope with all keys. Where none fits, the server is asked for its keys
// again, but not more often than every 30 s, after failures from every second on. The errors are trust.Verifier's.
func (k *Keys) Verify(ctx context.Context, envelope []byte) (accel.Mapping, error) {
	m, err := k.verify(ctx, envelope)
	if err == nil || !errors.Is(err, accel.ErrUnauthenticated) || !k.refresh(ctx) {
		return m, err
	}
	return k.verify(ctx, envelope)
}

func (k *Keys) verify(ctx context.Context, envelope []byte) (m accel.Mapping, err error) {
	k.mu.Lock()
	trusted := k.trusted
	k.mu.Unlock()
	err = fmt.Errorf("%w: no key is trusted: configure a server or a file of keys", accel.ErrUnauthenticated)
	for _, v := range trusted {
		if m, err = v.Verify(ctx, envelope); err == nil || !errors.Is(err, accel.ErrUnauthenticated) {
			return m, err
		}
	}
	return m, err
}

// refresh gets the server's keys anew, once for all who wait for them; false where nothing can have
// changed.
func (k *Keys) refresh(ctx context.Context) bool {
	k.mu.Lock()
	if k.ask == nil {
		k.mu.Unlock()
		return false
	}
	for before := k.turns; k.asking != nil; {
		under := k.asking
		k.mu.Unlock()
		select {
		case <-under:
		case <-ctx.Done():
			return false
		}
		k.mu.Lock()
		if k.turns != before {
			k.mu.Unlock()
			return true
		}
		// It failed, perhaps because the one who asked was no longer interested.
	}
	if time.Now().Before(k.again) {
		k.mu.Unlock()
		return false
	}
	done := make(chan struct{})
	k.asking = done
	k.mu.Unlock()

	pem, err := k.ask(ctx)
	var v *trust.Verifier
	if err == nil {
		v, err = trust.NewVerifier(pem)
	}

	k.mu.Lock()
	defer k.mu.Unlock()
	k.asking = nil
	close(done)
	if err != nil {
		if ctx.Err() == nil { // else it says nothing about the server
			k.pause = min(max(2*k.pause, keysRetry), keysAgain)
			k.again = time.Now().Add(k.pause)
		}
		return false
	}
	k.turns++
	k.pause, k.again = 0, time.Now().Add(keysAgain)
	if k.file != "" {
		k.trusted = []*trust.Verifier{k.trusted[0], v}
	} else {
		k.trusted = []*trust.Verifier{v}
	}
	_ = durable.WriteFile(k.kept, pem, 0o600) // without it, the next start asks the server
	return true
}
