package node

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
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

// newGrantKey writes a key beside its place and moves it there, so that there is never half
// of one.
func newGrantKey(path string) (_ []byte, err error) {
	key := make([]byte, grantKeyBytes)
	if _, err := rand.Read(key); err != nil {
		return nil, err
	}
	temp, err := os.CreateTemp(filepath.Dir(path), ".key-") // mode 0600
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(temp.Name()))
		}
	}()
	_, err = temp.Write(key)
	if err = errors.Join(err, temp.Sync(), temp.Close()); err != nil {
		return nil, err
	}
	return key, os.Rename(temp.Name(), path)
}
