package node

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"accel/internal/durable"
)

const grantKeyBytes = 32

// grantKey is the key of the credentials' digests, made once for each folder.
func grantKey(dir string) ([]byte, error) {
	path := filepath.Join(dir, "grants.key")
	key, err := os.ReadFile(path)
	if err == nil && len(key) == grantKeyBytes {
		return key, nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("key of the grants: %w", err)
	}
	// None yet, or half of one: grants are asked for again.
	key, err = newGrantKey(path)
	if err != nil {
		return nil, fmt.Errorf("key of the grants: %w", err)
	}
	return key, nil
}

// newGrantKey makes a key and keeps it.
func newGrantKey(path string) ([]byte, error) {
	key := make([]byte, grantKeyBytes)
	if _, err := rand.Read(key); err != nil {
		return nil, err
	}
	return key, durable.WriteFile(path, key, 0o600)
}
