// Package ledger is where the service keeps what it knows of the profiles of images:
// what nodes reported of starts, what was predicted, inherited, listed and imported, the
// one profile that follows from all of these, how well that one foretells starts, and
// where it is published. It stands in one file (bbolt) with bounds on images and bytes; the
// images whose profile nobody has used for the longest time go first. When the file is
// lost, images are predicted anew at their next check, and recorded by their next starts.
//
// Package worker tells it of images (Learn) and publishes what is due (NextPublication); package api
// hands reports of starts in and profiles out.
//
// # Which profile stands
//
// What was recorded wins over what was imported, that over what was inherited, and that
// over what was predicted. As long as all recorded starts are incomplete, they only
// add to the next of these; what the image's maker lists, and what a person lists, is always in. So it follows
// from the set of reports that the summary keeps, in whatever order they came.
//
// # New use
//
// Once enough starts are recorded, complete ones that the profile foretold badly are also
// added to a second summary. When that has enough of them, of more than one node
// where the first has more than one, and foretells them clearly better, it takes the
// first one's place: the image is used in another way now. When starts are foretold well
// again, it is dropped.
//
// # Publication
//
// A profile is due to be published when there is none yet, or the published one is of
// another origin or foretells the new one badly: then at most once a minute. Any other
// change waits until an hour has passed; so what is published in the end is what stands.
package ledger
