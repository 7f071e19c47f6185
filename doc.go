// Package accel is the vocabulary that every part of accel shares: the push
// event that comes in, the record of one image's way to readiness, the states
// it passes, the mapping from original to accelerated digests, and the errors
// that callers decide on. It does no I/O and imports nothing else of ours.
package accel
