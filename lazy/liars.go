package lazy

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"accel/internal/durable"
	"accel/snapshot"

	"github.com/opencontainers/go-digest"
)

const (
	// maxLiars are the layers about which lies are remembered, those found last. One that is forgotten is checked
	// again when it is complete again.
	maxLiars   = 4096
	liarSuffix = ".diffid"
)

// liars are the layers about which an image has lied, a file each that holds the true DiffID. They outlive what else is known
// of a layer, which goes with its content: the lie can be told again at any time.
type liars struct{ dir string }

func (a liars) path(d digest.Digest) string {
	return filepath.Join(a.dir, d.Algorithm().String()+"-"+d.Encoded()+liarSuffix)
}

// diffID is the true one of a layer that was lied about; empty: nothing is known of lies.
func (a liars) diffID(d digest.Digest) (digest.Digest, error) {
	raw, err := os.ReadFile(a.path(d))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	is, err := digest.Parse(strings.TrimSpace(string(raw)))
	if err != nil {
		return "", nil //nolint:nilerr // damaged: it is found out again
	}
	return is, nil
}

func (a liars) put(d, is digest.Digest) error {
	if err := durable.WriteFile(a.path(d), []byte(is+"\n"), 0o600); err != nil {
		return err
	}
	return keepNewest(a.dir, liarSuffix, maxLiars)
}

func lieOf(layer, claimed, is digest.Digest) string {
	return fmt.Sprintf("an image claims that layer %s has DiffID %s; it is %s", layer, claimed, is)
}

// recall declines an image that tells a lie which was found out before.
func (l *Lazy) recall(img *image) error {
	for _, y := range img.layers {
		if y.diffID == "" {
			continue
		}
		is, err := l.liars.diffID(y.Digest)
		if err != nil {
			return fmt.Errorf("what is known of layer %s: %w", y.Digest, err)
		}
		if is != "" && is != y.diffID {
			return declined("%s", lieOf(y.Digest, y.diffID, is))
		}
	}
	return nil
}

// honest declines an image that claims another DiffID of a layer than the layer was found to have.
func (l *Lazy) honest(img *image) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range img.layers {
		if lie := l.lie(&img.layers[i]); lie != "" {
			return declined("%s", lie)
		}
	}
	return nil
}

// lie is what an image says of one of its open layers and is not true; empty: nothing that is known. l.mu is held.
func (l *Lazy) lie(y *layer) string {
	open := l.open[y.Digest]
	if y.diffID == "" || open == nil || open.origin.DiffID == "" || open.origin.DiffID == y.diffID {
		return ""
	}
	return lieOf(y.Digest, y.diffID, open.origin.DiffID)
}

// placed looks at a layer whose snapshot was just made: it was asked for before, and the lie may have been found
// when there was no snapshot yet to set aside.
func (l *Lazy) placed(e snapshot.Event) {
	img, known := l.starts.images.Get(e.Request.Manifest)
	if !known {
		return
	}
	i, known := img.chains[e.Request.Chain]
	if !known {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	lie := l.lie(&img.layers[i])
	if lie == "" || l.running == nil || l.running.Err() != nil {
		return
	}
	ctx := l.running
	l.work.Go(func() {
		if err := l.o.SetAside(ctx, e.Layer, e.Request.Chain, lie); err != nil && ctx.Err() == nil {
			l.o.Log.Error("the snapshot of a layer whose image lies cannot be set aside", "chain", e.Request.Chain, "layer", e.Layer, "error", err)
		}
	})
}
