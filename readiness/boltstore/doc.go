// Package boltstore keeps readiness records in one bbolt file: it is the
// readiness.Store of a single process that needs no database server. All rules
// about records are in package readiness; here are rows, indexes and durability.
//
// Layout: records lie under the number of their first Put, so that new ones are
// appended and the indexes, which all end in that number, stay small; names are
// hashed to 16 bytes in keys. Nothing is loaded at start. Indexes are derived from
// the entry (rows) and changed in its transaction; Check compares them.
//
// Updates that arrive while another commits are committed together, with one sync
// for all (see batch.go).
package boltstore
