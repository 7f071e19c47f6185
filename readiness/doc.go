// Package readiness is the second step of the way: webhook and api hand it push
// events, worker claims records from it, and everybody who wants to know whether
// an image is ready asks it. It holds the one table of state transitions and all
// rules about records; where the records are kept is the business of a Store
// (package boltstore), which a conformance suite (package storetest) holds to its
// contract.
//
// A record is its own queue entry: there is no second queue that could disagree.
// Every exported method of Tracker is one transaction (or a wait that ends with
// one), so a crash leaves either all of a step or nothing of it.
//
// # Transitions
//
// "-" stands for a record that does not exist. What a crash leaves is always the
// state on the left or the one on the right, never something between.
//
//	from        to          who, and when
//	-           Pending     Push, Observe, Resolve: a digest or tag not seen before
//	-           Superseded  Push: the event is older than the last one of its tag
//	Pending     Converting  Claim, Resolve: a worker takes it under a lease
//	Pending     Superseded  Push, Observe, Resolve: its last tag moved on or is gone
//	Pending     -           Delete, Fold, Claim (the parameters changed)
//	Converting  Ready       Finish: pushed, read back and checked
//	Converting  Failed      Fail; Claim, when the lease ran out in the last attempt
//	Converting  Rejected    Fail with an accel.Rejection
//	Converting  Pending     Defer; Claim, when the lease ran out
//	Converting  Superseded  as from Pending; its worker gets ErrLeaseLost
//	Converting  -           Drop, Delete, Resolve (merged), Fold; worker: ErrLeaseLost
//	Ready       Stale       Gone: the target is no longer in the registry
//	Ready       -           Delete, Fold
//	Failed      Converting  Claim, when the next try is due
//	Failed      Pending     Push, Observe (the tag moved to it), Retry
//	Failed      Superseded  as from Pending, unless it was given up
//	Failed      -           as from Pending; Push, Observe (an intake row whose digest is known now)
//	Rejected    Pending     Push by the API, Retry; any other push leaves it
//	Rejected    -           Delete, Fold; an intake row as from Failed
//	Superseded  Pending     Push, Observe, Resolve: the digest is wanted again; Retry
//	Superseded  -           Delete, Fold
//	Stale       Pending     Gone, in the same transaction; so Stale is never at rest
//
// What a crash of the worker leaves: Pending, Failed, Rejected, Superseded and
// Ready stay as they are. Converting stays until its lease has run out; the next
// Claim then takes it, and the attempt that died counts. What had been pushed by
// then is pushed again, which changes nothing in the registry.
//
// # Rules
//
// One record exists for each (repository, digest, parameters). A repeated push of
// a Ready, Pending or Converting one changes nothing but its tags.
//
// A tag moves by events in the order of their OccurredAt; one without a time
// counts as the newest. What the registry itself answered (Observe, Resolve) wins
// over events. A record whose last tag moves on is Superseded if its work is not
// done; Ready ones stay Ready, and so do records that the API asked for by digest.
//
// A push without a digest is an intake row: a record without Digest, beside the
// record that the tag pointed to until then. Resolve merges it.
//
// Records that are removed because another took over (a resolved intake row, a
// child folded into its index) leave their id behind as an alias of the heir.
package readiness
