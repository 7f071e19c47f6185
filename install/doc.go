// Package install makes a machine's containerd ask its node first: it writes containerd's
// hosts.toml for each registry, a file beside containerd's configuration that names the node
// as its snapshotter, and a systemd unit for `accel node`, takes them away again, and
// reads what containerd's own configuration says of registries and snapshotters. It comes before
// package node in a machine's life, and knows nothing of it but its addresses and folders.
//
// What it wrote it recognises by a mark with a digest of the content. A file without the
// mark, or one that was changed since, belongs to somebody: it is neither overwritten nor
// removed, and the plan says what to merge.
package install
