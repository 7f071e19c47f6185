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
//
// A node calls Open, makes the pins equal to Owners, prepares Mounts for those layers, calls Restore, then Serve.
//
// containerd 2 has to be configured so; the name is free, root is Options.Dir:
//
//	[proxy_plugins.accel]
//	  type = "snapshot"
//	  address = "/run/accel/snapshotter.sock"
//	  capabilities = ["remap-ids"]                # where CanRemapIDs; never "rebase": layers are then prepared without their parents
//	[proxy_plugins.accel.exports]
//	  root = "/var/lib/accel/snapshots"
//	  enable_remote_snapshot_annotations = "true" # else no layer is lazy
//	[[plugins."io.containerd.transfer.v1.local".unpack_config]]
//	  platform = "linux/amd64"
//	  snapshotter = "overlayfs"                   # the default, which an entry of one's own takes away
//	[[plugins."io.containerd.transfer.v1.local".unpack_config]]
//	  platform = "linux/amd64"
//	  snapshotter = "accel"
//	[plugins."io.containerd.cri.v1.images"]
//	  snapshotter = "accel"                       # with use_local_image_pull = true also disable_snapshot_annotations = false
//
// and containerd 1.6, whose CRI plugin is the one that pulls lazily:
//
//	[proxy_plugins.accel]
//	  type = "snapshot"
//	  address = "/run/accel/snapshotter.sock"
//	[plugins."io.containerd.grpc.v1.cri".containerd]
//	  snapshotter = "accel"
//	  disable_snapshot_annotations = false
package snapshot
