package install

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"accel/internal/durable"
)

const (
	// firstLine tells a reader of the file whose it is; markPrefix and the digest of
	// all that follows tell us.
	firstLine  = "# Written by `accel node install` and removed by `accel node uninstall`. Changed by hand, it is left alone."
	markPrefix = "# accel-node sha256:"
	// maxFileBytes bounds what is read of a file that somebody else may have written.
	maxFileBytes = 1 << 20
)

// marked is content with our mark above it. TOML and systemd units both take # as
// the beginning of a comment.
func marked(content string) string {
	sum := sha256.Sum256([]byte(content))
	return firstLine + "\n" + markPrefix + hex.EncodeToString(sum[:]) + "\n" + content
}

// owner says whose a file is.
type owner int

const (
	nobodys owner = iota // there is none
	ours
	changed // ours once
	others
)

type file struct {
	owner   owner
	content string // as it is, with the mark
}

// look reads a file and says whose it is. What is no regular file is others'.
func look(path string) (file, error) {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return file{}, nil
	}
	if err != nil {
		return file{}, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxFileBytes {
		return file{owner: others}, nil
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return file{}, err
	}
	f := file{owner: others, content: string(raw)}
	_, rest, _ := strings.Cut(f.content, "\n")
	mark, body, _ := strings.Cut(rest, "\n")
	switch {
	case f.content == marked(body):
		f.owner = ours
	case strings.HasPrefix(mark, markPrefix):
		f.owner = changed
	}
	return f, nil
}

// planFile says what it takes for a file to hold content.
func planFile(path, content string) (Change, error) {
	f, err := look(path)
	if err != nil {
		return Change{}, err
	}
	c := Change{Path: path, Content: marked(content)}
	switch {
	case f.owner == nobodys:
		c.Action = Create
	case f.content == c.Content:
		c.Action = Keep
	case f.owner == ours:
		c.Action = Update
	default:
		c.Action, c.Content = Conflict, content
		c.Note = "it was not written by accel"
		if f.owner == changed {
			c.Note = "it was changed since accel wrote it"
		}
	}
	return c, nil
}

// Apply carries a plan out. Files that conflict are left alone; files that changed
// since the plan was made are too, and are an error. It may be repeated.
func Apply(plan []Change) error {
	var errs []error
	for _, c := range plan {
		var err error
		switch c.Action {
		case Create, Update:
			err = replace(c)
		case Remove:
			err = remove(c.Path)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s %s: %w", c.Action, c.Path, err))
		}
	}
	return errors.Join(errs...)
}

// errOthers: between plan and deed somebody wrote the file.
var errOthers = errors.New("somebody wrote it meanwhile; look at it, and try again")

// replace writes a file in the place of ours or of none.
func replace(c Change) error {
	if f, err := look(c.Path); err != nil || f.owner != nobodys && f.owner != ours {
		return errors.Join(err, errOthers)
	}
	dir := filepath.Dir(c.Path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return durable.WriteFile(c.Path, []byte(c.Content), 0o644)
}

// remove takes away a file of ours, and its folder where that is empty then and
// is one host's.
func remove(path string) error {
	if f, err := look(path); err != nil || f.owner != ours {
		if err == nil && f.owner != nobodys {
			err = errOthers
		}
		return err
	}
	if err := os.Remove(path); err != nil {
		return err
	}
	dir := filepath.Dir(path)
	if filepath.Base(path) == hostsFile {
		if left, err := os.ReadDir(dir); err == nil && len(left) == 0 {
			if err := os.Remove(dir); err != nil {
				return err
			}
			dir = filepath.Dir(dir)
		}
	}
	return durable.SyncFolder(dir)
}
