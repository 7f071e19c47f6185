package trust

import (
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"accel"
)

// readKey loads one PKCS#8 PEM file.
func readKey(path string) (keyPair, error) {
	text, err := readBounded(path)
	if err != nil {
		return keyPair{}, fmt.Errorf("read signing key: %w", err)
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "PRIVATE KEY" {
		return keyPair{}, fmt.Errorf("%w: signing key %s: no PEM block of type PRIVATE KEY", accel.ErrInvalid, path)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return keyPair{}, fmt.Errorf("%w: signing key %s: %w", accel.ErrInvalid, path, err)
	}
	private, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return keyPair{}, fmt.Errorf("%w: signing key %s is a %T, not an ed25519 key", accel.ErrInvalid, path, parsed)
	}
	pair := keyPair{private: private}
	if pair.id, err = keyID(pair.public()); err != nil {
		return keyPair{}, err
	}
	pair.created, err = createdAt(path, text)
	return pair, err
}

// createdAt reads the date above the PEM block. A key that was made elsewhere
// has none; then the file's own time is as good as it gets.
func createdAt(path string, text []byte) (time.Time, error) {
	line, _, _ := strings.Cut(string(text), "\n")
	if s, ok := strings.CutPrefix(line, createdPrefix); ok {
		if at, err := time.Parse(time.RFC3339, strings.TrimSpace(s)); err == nil {
			return at.UTC(), nil
		}
	}
	st, err := os.Stat(path)
	if err != nil {
		return time.Time{}, fmt.Errorf("read signing key: %w", err)
	}
	return st.ModTime().UTC(), nil
}

func readActive(dir string) (string, error) {
	text, err := readBounded(filepath.Join(dir, activeFile))
	return strings.TrimSpace(string(text)), err
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxKeyFileBytes+1))
	if err == nil && len(text) > maxKeyFileBytes {
		err = fmt.Errorf("%w: %s is larger than %d bytes", accel.ErrInvalid, path, maxKeyFileBytes)
	}
	return text, err
}
