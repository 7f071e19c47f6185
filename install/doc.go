// Package install makes a machine's containerd ask its node first: it writes containerd's
// hosts.toml for each registry and a systemd unit for `accel node`, takes both away
// again, and reads what containerd's own configuration says of registries. It comes before
// package node in a machine's life, and knows nothing of it but the mirror's address.
//
// What it wrote it recognises by a mark with a digest of the content. A file without the
// mark, or one that was changed since, belongs to somebody: it is neither overwritten nor
// removed, and the plan says what to merge.
package install
