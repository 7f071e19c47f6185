package lazy

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"accel"
	"accel/internal/durable"
	"accel/profile"

	"github.com/opencontainers/go-digest"
)

const (
	// maxProfiles is of how many images a node keeps what it recorded itself; those recorded last stay.
	maxProfiles = 1000
	// changedShare: a whole start of which less than this was foretold is another use of the image, and
	// what was recorded before says nothing about it.
	changedShare  = 0.5
	summarySuffix = ".starts"
	// toldSuffix has the summary of an image of which the server took a complete start: when it has no profile of it
	// after that, somebody removed it, and nobody is to go by what is here either.
	toldSuffix = ".told" + summarySuffix
)

// profiles are the summaries of the starts that this node recorded itself, a file for each image. A node
// without a server lives on them.
type profiles struct {
	dir string
	mu  sync.Mutex
}

// path is the file of an image's summary. p.mu is held.
func (p *profiles) path(manifest digest.Digest) string {
	if told := p.file(manifest, toldSuffix); exists(told) {
		return told
	}
	return p.file(manifest, summarySuffix)
}

func (p *profiles) file(manifest digest.Digest, suffix string) string {
	return filepath.Join(p.dir, manifest.Algorithm().String()+"-"+manifest.Encoded()+suffix)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// tell notes that the server took a complete start of an image.
func (p *profiles) tell(manifest digest.Digest) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	from, to := p.file(manifest, summarySuffix), p.file(manifest, toldSuffix)
	if !exists(from) || exists(to) {
		return nil
	}
	return os.Rename(from, to) // not durable: it may be told again
}

// told reports whether it did.
func (p *profiles) told(manifest digest.Digest) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return exists(p.file(manifest, toldSuffix))
}

// summary is accel.ErrNotFound where there is none, also where it is damaged.
func (p *profiles) summary(manifest digest.Digest) (*profile.Summary, error) {
	raw, err := os.ReadFile(p.path(manifest))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: recorded starts of %s", accel.ErrNotFound, manifest)
	}
	if err != nil {
		return nil, err
	}
	s, err := profile.DecodeSummary(raw)
	if err != nil || s.Manifest() != manifest {
		return nil, fmt.Errorf("%w: recorded starts of %s: %s is damaged: %w", accel.ErrNotFound, manifest, p.path(manifest), err)
	}
	return s, nil
}

// get is the profile of what this node recorded itself; accel.ErrNotFound.
func (p *profiles) get(manifest digest.Digest) (accel.Profile, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s, err := p.summary(manifest)
	if err != nil {
		return accel.Profile{}, err
	}
	return s.Profile(profile.DefaultShare), nil
}

// add keeps a report, and says how many of the image there are now.
func (p *profiles) add(r profile.Report) (reports int, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s, err := p.summary(r.Manifest)
	if err != nil && !errors.Is(err, accel.ErrNotFound) {
		return 0, err
	}
	if s != nil && r.Complete && profile.Coverage(accel.Profile{Items: r.Items}, s.Profile(profile.DefaultShare)).Share() < changedShare {
		s = nil
	}
	if s == nil {
		s = profile.NewSummary(r.Manifest)
	}
	if _, err := s.Add(r); err != nil {
		return 0, err
	}
	if err := durable.WriteFile(p.path(r.Manifest), s.Encode(), 0o600); err != nil {
		return 0, err
	}
	return s.Reports(), p.trim()
}

// remove forgets an image.
func (p *profiles) remove(manifest digest.Digest) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for _, suffix := range []string{summarySuffix, toldSuffix} {
		if err := os.Remove(p.file(manifest, suffix)); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// trim removes the oldest above the bound, and what crashes left. p.mu is held, or nobody knows p yet.
func (p *profiles) trim() error { return keepNewest(p.dir, summarySuffix, maxProfiles) }

// keepNewest removes all but the n newest files with a suffix, and files without it that are a minute old: durable.WriteFile leaves
// them in a crash.
func keepNewest(dir, suffix string, n int) error {
	files, err := filesIn(dir)
	if err != nil {
		return err
	}
	var errs []error
	for i := len(files) - 1; i >= 0; i-- { // the newest first
		f := files[i]
		switch {
		case strings.HasSuffix(f.Name(), suffix) && n > 0:
			n--
		case !strings.HasSuffix(f.Name(), suffix) && time.Since(f.ModTime()) < time.Minute:
		default:
			errs = append(errs, os.Remove(filepath.Join(dir, f.Name())))
		}
	}
	return errors.Join(errs...)
}

// filesIn lists a folder, the oldest first.
func filesIn(dir string) ([]fs.FileInfo, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	files := make([]fs.FileInfo, 0, len(entries))
	for _, e := range entries {
		if info, err := e.Info(); err == nil { // else it has just gone
			files = append(files, info)
		}
	}
	slices.SortStableFunc(files, func(a, b fs.FileInfo) int { return cmp.Compare(a.ModTime().UnixNano(), b.ModTime().UnixNano()) })
	return files, nil
}
