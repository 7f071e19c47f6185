// Package trust says which converted image may stand in for an original one:
// it keeps the service's ed25519 keys, signs each accel.Mapping in a DSSE
// envelope, and checks such envelopes. Package worker signs with it before
// package registry pushes the envelope beside the image; nodes verify with it
// before they serve other bytes than the ones that were asked for.
package trust

import (
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"time"

	"accel"
	"accel/internal/durable"
)

// Key is one ed25519 key pair's public side.
type Key struct {
	// ID is the first 16 bytes, in hex, of the SHA-256 of the public key in PKIX
	// form; it is the keyid in envelopes.
	ID        string    `json:"id"`
	Public    string    `json:"public"` // PEM, PKIX
	CreatedAt time.Time `json:"createdAt"`
	Active    bool      `json:"active"` // the one that signs
}

const (
	// activeFile holds the id of the key that signs, and a line end.
	activeFile = "active"
	keySuffix  = ".pem" // what is being written has another
	// maxKeyFileBytes bounds a key file; an ed25519 one has about 150 bytes.
	maxKeyFileBytes = 16 << 10
	// createdPrefix starts the line above the PEM block that dates a key. RFC 7468
	// section 2 lets text stand there and parsers skip it.
	createdPrefix = "Created: "
)

// Keyring is a directory of keys: <id>.pem (PKCS#8, 0600) and "active", which
// names the one that signs. Old keys stay so that what they signed still
// verifies. It may be used by several goroutines, and other processes may add
// keys to the directory meanwhile.
type Keyring struct {
	dir string

	mu     sync.Mutex
	keys   map[string]keyPair
	active string
}

type keyPair struct {
	id      string
	private ed25519.PrivateKey
	created time.Time
}

// OpenKeyring loads the keys of dir. The error wraps accel.ErrNotFound where
// there is no key yet, and accel.ErrInvalid where a file is no key.
func OpenKeyring(dir string) (*Keyring, error) {
	k := &Keyring{dir: dir}
	if err := k.load(); err != nil {
		return nil, err
	}
	return k, nil
}

// CreateKeyring is OpenKeyring that makes the directory and a first key where
// there is none.
func CreateKeyring(dir string) (*Keyring, error) {
	k, err := OpenKeyring(dir)
	if !errors.Is(err, accel.ErrNotFound) {
		return k, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the key directory: %w", err)
	}
	k = &Keyring{dir: dir, keys: map[string]keyPair{}}
	if _, err := k.New(); err != nil {
		return nil, err
	}
	return k, nil
}

// New makes a key and activates it; old ones stay for verification.
func (k *Keyring) New() (Key, error) {
	_, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return Key{}, fmt.Errorf("make a signing key: %w", err)
	}
	pair := keyPair{private: private, created: time.Now().UTC().Truncate(time.Second)}
	if pair.id, err = keyID(pair.public()); err != nil {
		return Key{}, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return Key{}, fmt.Errorf("encode a signing key: %w", err)
	}
	text := createdPrefix + pair.created.Format(time.RFC3339) + "\n" +
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))

	k.mu.Lock()
	defer k.mu.Unlock()
	// The key is on disk before "active" names it, so that no crash leaves a name without a key.
	if err := durable.WriteFile(filepath.Join(k.dir, pair.id+keySuffix), []byte(text), 0o600); err != nil {
		return Key{}, fmt.Errorf("store signing key %s: %w", pair.id, err)
	}
	if err := durable.WriteFile(filepath.Join(k.dir, activeFile), []byte(pair.id+"\n"), 0o600); err != nil {
		return Key{}, fmt.Errorf("activate signing key %s: %w", pair.id, err)
	}
	k.keys[pair.id] = pair
	k.active = pair.id
	return k.describe(pair)
}

// List returns all keys, the oldest first.
func (k *Keyring) List() []Key {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.refresh()
	keys := make([]Key, 0, len(k.keys))
	for _, pair := range k.sorted() {
		if key, err := k.describe(pair); err == nil {
			keys = append(keys, key)
		}
	}
	return keys
}

// Export returns all public keys as PEM blocks, the form that NewVerifier reads.
func (k *Keyring) Export() []byte {
	var out []byte
	for _, key := range k.List() {
		out = append(out, key.Public...)
	}
	return out
}

// signer returns the key that signs now, which another process may have changed.
func (k *Keyring) signer() keyPair {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.refresh()
	return k.keys[k.active]
}

// refresh loads the directory again when another process has activated a key
// there. What is loaded stays in use where the directory cannot be read.
func (k *Keyring) refresh() {
	active, err := readActive(k.dir)
	if err != nil || active == k.active {
		return
	}
	fresh := &Keyring{dir: k.dir}
	if fresh.load() == nil {
		k.keys, k.active = fresh.keys, fresh.active
	}
}

func (k *Keyring) load() error {
	entries, err := os.ReadDir(k.dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("read the key directory: %w", err)
	}
	k.keys = map[string]keyPair{}
	for _, e := range entries {
		id, isKey := strings.CutSuffix(e.Name(), keySuffix)
		if !isKey || e.IsDir() {
			continue
		}
		pair, err := readKey(filepath.Join(k.dir, e.Name()))
		if err != nil {
			return err
		}
		if pair.id != id {
			return fmt.Errorf("%w: key file %s holds key %s; restore or remove the file", accel.ErrInvalid, filepath.Join(k.dir, e.Name()), pair.id)
		}
		k.keys[id] = pair
	}
	if len(k.keys) == 0 {
		return fmt.Errorf("%w: no signing key in %s; make one with \"accel keys new\"", accel.ErrNotFound, k.dir)
	}
	k.active, err = readActive(k.dir)
	if errors.Is(err, os.ErrNotExist) {
		// A crash between the first key and its activation, or keys copied without
		// the file: the newest key signs.
		sorted := k.sorted()
		k.active = sorted[len(sorted)-1].id
		return nil
	}
	if err != nil {
		return fmt.Errorf("read which key is active: %w", err)
	}
	if _, ok := k.keys[k.active]; !ok {
		return fmt.Errorf("%w: %s names key %q, which is not in the directory; restore %s%s or remove the file", accel.ErrInvalid,
			filepath.Join(k.dir, activeFile), k.active, k.active, keySuffix)
	}
	return nil
}

// sorted returns the keys by age, then id.
func (k *Keyring) sorted() []keyPair {
	pairs := make([]keyPair, 0, len(k.keys))
	for _, pair := range k.keys {
		pairs = append(pairs, pair)
	}
	sort.Slice(pairs, func(i, j int) bool {
		if !pairs[i].created.Equal(pairs[j].created) {
			return pairs[i].created.Before(pairs[j].created)
		}
		return pairs[i].id < pairs[j].id
	})
	return pairs
}

func (k *Keyring) describe(pair keyPair) (Key, error) {
	der, err := x509.MarshalPKIXPublicKey(pair.public())
	if err != nil {
		return Key{}, fmt.Errorf("encode public key %s: %w", pair.id, err)
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	return Key{ID: pair.id, Public: string(text), CreatedAt: pair.created, Active: pair.id == k.active}, nil
}

func (p keyPair) public() ed25519.PublicKey { return p.private.Public().(ed25519.PublicKey) }

// keyID is the first half of the SHA-256 of the key in PKIX form, in hex.
func keyID(public ed25519.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "", fmt.Errorf("encode a public key: %w", err)
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:16]), nil
}
