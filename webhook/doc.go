// Package webhook turns one registry's push notification into accel.PushEvent
// values, and checks that the sender is who it claims to be. It is the first
// step of the way: package api reads the request, asks a Source here to
// authenticate and decode it, and hands the events to package readiness.
//
// Every registry has a file of its own with its wire format and its decoder.
// Decoding is pure: no clock, no network, nothing kept. Authentication is pure
// too, but for Google Artifact Registry, whose signing keys are fetched from
// the OIDC issuer.
//
// Nothing that an event names is trusted further than its form: an event that
// leaves this package can be written as an image reference and read back by
// accel.ParseReference. Whether its registry may be contacted at all is for the
// caller's allowlist to say.
package webhook
