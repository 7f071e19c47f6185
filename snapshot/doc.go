// Package snapshot is containerd's remote snapshotter: containerd asks it, over a unix socket, to
// prepare the snapshot of a layer before it downloads that layer. Where Images knows the layer in
// lazily loadable form, Mounts mounts it and containerd is told that the snapshot exists
// already, so that it downloads nothing. Where not, the snapshot is an ordinary one of overlayfs, and
// containerd downloads and unpacks as ever. It knows neither registries nor EROFS: package lazyfs mounts,
// the node resolves, and both come in through the interfaces of border.go.
//
// What there is, containerd's own metastore for snapshotters says (Dir/metadata.db); of a lazy
// snapshot its labels say which layer is mounted at Dir/snapshots/ID/fs, and of which image it was, so that
// a later daemon can mount it again, and resolve it again where the content was lost.
//
// Mounts outlive the daemon. Closing unmounts nothing, starting adopts what is mounted, and mounts
// only what is not (the machine was rebooted). A snapshot that cannot be mounted is set aside with its
// reason: containers on top of it are refused with that reason, and tried again when they are asked
// for again; everything else works.
//
// The order of writes: a layer is pinned, mounted, then committed; and removed from the metastore first, then
// unmounted, unpinned, and its directory removed. What a crash leaves in between, Restore takes away.
package snapshot
