package meter

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"time"

	"accel"
)

const (
	// reportBatch is how many pulls go in one request, some 200 kB.
	reportBatch = 500
	// Pause before a report that failed is sent again, doubled up to the second, and half of it
	// by chance: the nodes of a fleet lose their server all at once.
	minReportPause, maxReportPause = time.Second, 2 * time.Minute
)

// ErrTooLarge: the server, or what is before it, takes no request of that size.
var ErrTooLarge = errors.New("the report is too large")

// Refusal is a server's no to one pull, for good.
type Refusal struct {
	ID  string // the pull's
	Err error  // what is wrong with it
}

func (r *Refusal) Error() string { return r.Err.Error() }
func (r *Refusal) Unwrap() error { return r.Err }

// Sink takes pulls to where they are accounted for; api.Client does. It returns nil only when they are durable
// there, a Refusal when one of them will never be taken, and ErrTooLarge when fewer might be. Any other error may
// pass, whatever it says: what answers may be no server of ours. It may be given a pull more than once.
type Sink interface {
	ReportPulls(ctx context.Context, pulls []accel.Pull) error
}

// Reporter brings spooled pulls to the server. The zero values of fields but Spool and Sink are useful.
type Reporter struct {
	Spool *Spool
	Sink  Sink
	Log   *slog.Logger // nil: silent
}

// Run reports until ctx ends. A pull leaves the spool only when the sink has taken it, or will
// never take it. An error is one of the spool's file that does not pass.
func (r *Reporter) Run(ctx context.Context) error {
	a := &attempts{log: r.Log, pause: minReportPause}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	for ctx.Err() == nil {
		pulls, err := r.Spool.Oldest(reportBatch)
		if err != nil {
			return err
		}
		if len(pulls) == 0 {
			select {
			case <-r.Spool.changed:
			case <-ctx.Done():
			}
			continue
		}
		err = r.send(ctx, pulls, a.log)
		switch {
		case ctx.Err() != nil: // what it was cut off from is sent again
		case err == nil:
			a.succeeded(r.Spool.Len())
		case errors.Is(err, ErrClosed) || errors.Is(err, ErrDamaged):
			return err
		default:
			sleep(ctx, a.failed(err, r.Spool.Len()))
		}
	}
	return nil
}

// attempts logs when reports begin and cease to fail, and not each one.
type attempts struct {
	log   *slog.Logger
	pause time.Duration // after the next failure
	n     int           // that failed in a row
	since time.Time     // the first of these
}

// failed notes a failure, and says how long to wait.
func (a *attempts) failed(err error, waiting int) time.Duration {
	wait := max(a.pause/2+rand.N(a.pause/2+1), accel.RetryAfter(err))
	a.pause = min(2*a.pause, maxReportPause)
	level, words := slog.LevelDebug, "pulls still cannot be reported"
	if a.n == 0 {
		level, words = slog.LevelWarn, "pulls cannot be reported now; trying again"
		a.since = time.Now()
	}
	a.n++
	a.log.Log(context.Background(), level, words, "waiting", waiting, "next_try_in", wait.Round(time.Millisecond), "error", err)
	return wait
}

func (a *attempts) succeeded(waiting int) {
	if a.n > 0 {
		a.log.Info("pulls are reported again", "failed_tries", a.n, "after", time.Since(a.since).Round(time.Millisecond), "waiting", waiting)
	}
	a.n, a.pause = 0, minReportPause
}

// send brings pulls to the sink, but for those that it refuses, and in halves where they are too many.
func (r *Reporter) send(ctx context.Context, pulls []accel.Pull, log *slog.Logger) error {
	for len(pulls) > 0 {
		err := r.Sink.ReportPulls(ctx, pulls)
		if err == nil {
			return r.Spool.Ack(ids(pulls)...)
		}
		if errors.Is(err, ErrTooLarge) && len(pulls) > 1 && ctx.Err() == nil {
			half := len(pulls) / 2
			if err := r.send(ctx, pulls[:half], log); err != nil {
				return err
			}
			pulls = pulls[half:]
			continue
		}
		var no *Refusal
		if !errors.As(err, &no) {
			return err
		}
		at := slices.IndexFunc(pulls, func(p accel.Pull) bool { return p.ID == no.ID })
		if at < 0 {
			return err
		}
		log.Error("the server refuses a pull for good; it is dropped", "id", no.ID, "image", pulls[at].Image, "error", err)
		if err := r.Spool.refuse(no.ID); err != nil {
			return err
		}
		pulls = slices.Delete(slices.Clone(pulls), at, at+1)
	}
	return nil
}

func ids(pulls []accel.Pull) []string {
	ids := make([]string, 0, len(pulls))
	for i := range pulls {
		ids = append(ids, pulls[i].ID)
	}
	return ids
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
