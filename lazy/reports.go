package lazy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"accel"
	"accel/internal/durable"
	"accel/profile"
)

const (
	// maxReports wait for the server; the oldest go first. They are a sample in any case.
	maxReports   = 256
	reportSuffix = ".report"
	// minPause and maxPause between attempts to reach the server, doubled each time.
	minPause, maxPause = time.Second, time.Minute
	// reportTime bounds one attempt, maxReportAge all of them: after so long the image is another one.
	reportTime   = 30 * time.Second
	maxReportAge = 7 * 24 * time.Hour
	// maxRefused in a row, and the rest waits for the next round, which begins after them: those that cannot be brought
	// must not be in the way of all.
	maxRefused = 3
)

// reports are the starts that the server has not heard of, a file each.
type reports struct {
	dir   string
	wake  chan struct{} // one slot
	after string        // the file at which the last round ended before all were tried; of the goroutine that reports
}

// put keeps a report until the server has it.
func (p *reports) put(r profile.Report) error {
	raw, err := profile.EncodeReport(r)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(filepath.Join(p.dir, r.ID+reportSuffix), raw, 0o600); err != nil {
		return err
	}
	select {
	case p.wake <- struct{}{}:
	default:
	}
	return keepNewest(p.dir, reportSuffix, maxReports)
}

// report brings reports to the server until ctx ends. What it cannot be brought to take is dropped.
func (l *Lazy) report(ctx context.Context) error {
	if l.o.Server == nil {
		return nil
	}
	pause := minPause
	for ctx.Err() == nil {
		err := l.reportAll(ctx)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // asked to stop
		}
		if err == nil {
			pause = minPause
			select {
			case <-l.reports.wake:
			case <-ctx.Done():
			}
			continue
		}
		l.o.Log.Debug("recorded starts cannot be reported; trying again", "error", err)
		select {
		case <-time.After(pause/2 + rand.N(pause/2)): // lest a fleet comes back all at once
		case <-ctx.Done():
		}
		pause = min(2*pause, maxPause)
	}
	return nil
}

// reportAll goes through them, the oldest first, but those last that the last round ended with. The error is about what is to be
// tried again.
func (l *Lazy) reportAll(ctx context.Context) error {
	files, err := filesIn(l.reports.dir)
	if err != nil {
		return err
	}
	var errs []error
	refused := 0
	if i := slices.IndexFunc(files, func(f fs.FileInfo) bool { return f.Name() == l.reports.after }); i >= 0 {
		files = slices.Concat(files[i+1:], files[:i+1])
	}
	l.reports.after = ""
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), reportSuffix) {
			continue
		}
		path := filepath.Join(l.reports.dir, f.Name())
		err := l.reportFile(ctx, path)
		switch {
		case err == nil:
			refused = 0
		case errors.Is(err, fs.ErrNotExist):
			continue // above the bound
		case errors.Is(err, accel.ErrInvalid), errors.Is(err, accel.ErrNotFound), time.Since(f.ModTime()) > maxReportAge:
			l.o.Log.Info("a recorded start is not reported", "file", path, "reason", err)
		default:
			errs = append(errs, err)
			if refused++; refused == maxRefused || ctx.Err() != nil {
				l.reports.after = f.Name()
				return errors.Join(errs...)
			}
			continue
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return errors.Join(errs...)
}

func (l *Lazy) reportFile(ctx context.Context, path string) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	r, err := profile.DecodeReport(raw)
	if err != nil {
		return err
	}
	return l.reportOne(ctx, r)
}

func (l *Lazy) reportOne(ctx context.Context, r profile.Report) error {
	ctx, cancel := context.WithTimeout(ctx, reportTime)
	defer cancel()
	receipt, err := l.o.Server.ReportStart(ctx, l.o.Node, r)
	if err != nil {
		return fmt.Errorf("report a start of %s: %w", r.Manifest, err)
	}
	l.starts.more(r.Manifest, receipt.WantMore)
	if r.Complete && len(r.Items) > 0 {
		if err := l.profiles.tell(r.Manifest); err != nil {
			l.o.Log.Warn("that the server knows starts of an image cannot be noted", "manifest", r.Manifest, "error", err)
		}
	}
	return nil
}
