// Package e2e holds the end-to-end tests of the program as a process: real
// registry, real notifications, real clients, kill -9, and the stock stargz
// library's FUSE mounts as the judge of what comes out. It has no code of its own
// beyond its tests.
package e2e
