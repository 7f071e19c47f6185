// Package profile tells what a start of an image reads. The holder of a lazy
// mount says which chunks were read; a Recorder makes one start's Report of
// them; the service adds the reports of many nodes to a Summary and folds that
// into an accel.Profile; a node makes a plan from the profile, which package
// prefetch fetches in one wave. An image that was never started gets its profile
// by Predict, from the files alone, or by Inherit, from its predecessor.
//
// A profile names files, not chunks, so that it outlives another conversion. It
// is a hint everywhere: hostile, damaged or outdated ones cost bytes within a
// bound and never correctness. The package knows no network and no database.
package profile
