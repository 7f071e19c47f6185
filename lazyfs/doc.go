// Package lazyfs mounts a layer before its content is there. It stands between the
// node's store of content, which is its caller's, and the kernel's EROFS; it knows
// no containerd and no network.
//
// A layer is three files. Build makes two of them from the layer's TOC alone: the EROFS
// image with all names and inodes, and the chunk table, which says for each chunk where
// it is in the compressed blob and where its bytes belong in the third, the data file.
// That one is sparse: every regular file has its place, beginning at a block, in the
// layer's order, and what was not fetched yet is a hole. The kernel mounts the image with
// the data file as its device, so names, attributes and listings never leave the kernel. No
// file system that was made elsewhere is ever mounted.
//
// While the data file has holes, the device is a file that a small process serves through
// FUSE, the holder: it answers from the data file where a bitmap says that the chunks are
// there, and asks the Host, in the node's daemon, where they are not. The Host has its
// Filler fetch them; Layer.Put checks each against its digest before the bit is set. The holder
// outlives the daemon, so that containers go on through a restart. Once a layer
// is complete, new mounts take the data file itself, and nobody stands in between.
//
// What a mount shows is what containerd would have unpacked: a later entry replaces an
// earlier one, whiteouts are overlayfs's, times are whole seconds as the TOC has them.
// Where it differs: the root's own attributes are the layer's; a missing parent is 0755
// and root's, whatever the layers below say of it; a whiteout beside a directory of its
// name makes that opaque, as the image specification means it, and one in a directory that
// is opaque anyway is left out.
package lazyfs
