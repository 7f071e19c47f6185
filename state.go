package accel

// State is where an image stands on its way to readiness. Package readiness
// holds the one table of transitions.
type State string

const (
	// Pending waits for a worker: from intake, from a retry, from Stale, or
	// because a Superseded digest was pushed again. A crash leaves it as it is.
	Pending State = "Pending"
	// Converting is held by a worker under a lease. A crash leaves it so until
	// the lease has run out; then the next worker claims it.
	Converting State = "Converting"
	// Ready means that the target was pushed, read back and checked, and that it
	// was there at Record.CheckedAt.
	Ready State = "Ready"
	// Failed waits for Record.DueAt to be tried again; with a zero DueAt it has
	// been given up and moves only by a retry or a new push.
	Failed State = "Failed"
	// Rejected was refused by a policy rule, named in Record.Rule.
	Rejected State = "Rejected"
	// Superseded lost its last tag to a newer push before it was Ready. A push
	// of the same digest brings it back to Pending.
	Superseded State = "Superseded"
	// Stale was Ready, but its target is gone from the registry. It goes back to
	// Pending.
	Stale State = "Stale"
)

// States lists all states in the order of an image's way.
var States = []State{Pending, Converting, Ready, Failed, Rejected, Superseded, Stale}

// Valid reports whether s is one of States.
func (s State) Valid() bool {
	for _, v := range States {
		if s == v {
			return true
		}
	}
	return false
}
