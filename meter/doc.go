// Package meter measures pulls and keeps the account of them. On a node, a Meter
// puts the requests that package mirror tells it together into accel.Pulls, a Spool
// keeps these on disk until the server has them, and a Reporter brings them there. On
// the server, package api hands them to a Ledger, which counts each one once,
// answers what was used and what it cost, and forgets by age.
package meter
