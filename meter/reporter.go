package meter

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
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

// Sink takes pulls to where they are accounted for; api.Client does. It returns nil
// only when they are durable there, and an accel.ErrInvalid when it will never take
// them. It may be given a pull more than once.
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
// never take it. An error is one of the spool's file.
func (r *Reporter) Run(ctx context.Context) error {
	log := r.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	pause := minReportPause
	for {
		pulls, err := r.Spool.Oldest(reportBatch)
		if err != nil {
			return err
		}
		if len(pulls) == 0 {
			select {
			case <-r.Spool.changed:
				continue
			case <-ctx.Done():
				return nil
			}
		}
		err = r.send(ctx, pulls, log)
		if ctx.Err() != nil {
			return nil //nolint:nilerr
		}
		var away *awayError
		switch {
		case err == nil:
			pause = minReportPause
		case errors.As(err, &away):
			wait := max(pause/2+rand.N(pause/2+1), accel.RetryAfter(err))
			log.Warn("pulls cannot be reported now", "waiting", r.Spool.Len(), "next_try_in", wait.Round(time.Millisecond), "error", away.error)
			sleep(ctx, wait)
			pause = min(2*pause, maxReportPause)
		default:
			return err
		}
	}
}

// awayError says that the sink could not take pulls now, but may later.
type awayError struct{ error }

func (e *awayError) Unwrap() error { return e.error }

// send brings pulls to the sink. Where it refuses a batch, the ones that it does not
// take are found by halves, so that they are not in the way of the others.
func (r *Reporter) send(ctx context.Context, pulls []accel.Pull, log *slog.Logger) error {
	ids := make([]string, 0, len(pulls))
	for _, p := range pulls {
		ids = append(ids, p.ID)
	}
	err := r.Sink.ReportPulls(ctx, pulls)
	switch {
	case err == nil:
		return r.Spool.Ack(ids...)
	case !errors.Is(err, accel.ErrInvalid) || ctx.Err() != nil:
		return &awayError{err}
	case len(pulls) > 1:
		half := len(pulls) / 2
		if err := r.send(ctx, pulls[:half], log); err != nil {
			return err
		}
		return r.send(ctx, pulls[half:], log)
	default:
		log.Error("the server refuses a pull for good; it is dropped", "id", ids[0], "image", pulls[0].Image, "error", err)
		return r.Spool.refuse(ids...)
	}
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
