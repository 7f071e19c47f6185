//go:build !linux

package boltstore

import "go.etcd.io/bbolt"

func unmapPages(*bbolt.DB, *bbolt.Tx) {}
