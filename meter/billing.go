package meter

import (
	"fmt"
	"slices"
	"time"

	"accel"
)

// Billing says how long a pull is billed for. It is applied when a pull is added to the
// ledger: a changed rule holds for what comes after it, and old bills stay as they were.
//
// # What is billed
//
// A pull costs its billed duration times its memory: the MemoryBytes that the platform
// passed, else those that the query names. The billed duration is the pull's, at least
// Minimum, rounded up to a multiple of RoundUp; nothing for an outcome in Free.
//
// # What was saved
//
// Hits and partial pulls, and lazy ones, would have taken longer without accel. What each would
// have cost is estimated by a baseline:
//
//   - the median duration of the same image's whole downloads from the registry
//     (outcome miss, mode full or mirror), billed by the same rule; else, for an image that has none,
//   - the pull's layer bytes divided by the median throughput of all such downloads in the fleet; else
//   - nothing is known, and the pull counts as one without a baseline, which saved nothing.
//
// Downloads of the time that is asked for and of the BaselineDays days before it count. Saved is the sum of what these
// pulls would have cost less the sum of what they cost; it is negative where accel made
// pulls slower.
type Billing struct {
	// Free are the outcomes that cost nothing; nil: a hit.
	Free []accel.Outcome
	// RoundUp is the step to which durations are rounded up; 0: they are taken as they are.
	RoundUp time.Duration
	// Minimum is what a pull that is not free is billed for at least.
	Minimum time.Duration
}

// BaselineDays is how far before the time that is asked for downloads count for the baseline.
const BaselineDays = 30

// gbSecond is one GB-second in bytes times nanoseconds. As function services bill, a GB
// are 2^30 bytes.
const gbSecond = (1 << 30) * 1e9

// Validate says what is wrong with b.
func (b Billing) Validate() error {
	for _, o := range b.Free {
		if !slices.Contains(outcomes, o) {
			return fmt.Errorf("%w: free outcome %q: want one of %v", accel.ErrInvalid, o, outcomes)
		}
	}
	if b.RoundUp < 0 || b.RoundUp > maxDuration || b.Minimum < 0 || b.Minimum > maxDuration {
		return fmt.Errorf("%w: the billed durations' step %s and minimum %s must be between 0 and %s", accel.ErrInvalid, b.RoundUp, b.Minimum, maxDuration)
	}
	return nil
}

// billed is what a pull is billed for.
func (b Billing) billed(p *accel.Pull) time.Duration {
	if slices.Contains(b.Free, p.Outcome) {
		return 0
	}
	return b.priced(p.Duration)
}

func (b Billing) priced(d time.Duration) time.Duration {
	d = max(d, b.Minimum)
	if b.RoundUp > 0 {
		if over := d % b.RoundUp; over > 0 {
			d += b.RoundUp - over
		}
	}
	return d
}

// isBaseline reports whether p shows what a download costs without accel.
func isBaseline(p *accel.Pull) bool {
	return p.Outcome == accel.OutcomeMiss && p.Mode != accel.PullLazy
}

// isSaver reports whether p would have taken longer without accel.
func isSaver(p *accel.Pull) bool {
	return p.Outcome == accel.OutcomeHit || p.Outcome == accel.OutcomePartial || p.Outcome == accel.OutcomeMiss && p.Mode == accel.PullLazy
}
