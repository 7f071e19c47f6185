// Package lazy decides on a node which image is mounted before its content is there, and
// brings the parts together that do it: containerd asks by package snapshot for a layer, lazy finds
// the image's converted form (a signed mapping, from the server or from the registry) or sees
// that the image is eStargz itself, fetches the layers' tables of contents, makes their
// files in the store (package cache), mounts them (package lazyfs), and has package
// prefetch fill them from the registry (package registry).
//
// # Which image
//
// The answer is one for the whole image: all its layers can be mounted, or none is. What
// stands in for an original digest is a mapping that a trusted key signed, for exactly
// this manifest, with exactly these layers, whose DiffIDs lead to the chain ID that
// containerd asks for. Images that are eStargz by themselves are mounted where their repository is
// allowed to be; what their config claims about DiffIDs is compared when a layer is
// complete, or some minutes after it was opened. A liar's snapshots are set aside then, and the lie is remembered. The
// node has to be able to read the source manifest with its own credentials, from the repository that it was asked
// for, and that has to hold the layers which the manifest names.
//
// # When not
//
// Whatever is missing (no converted form, a registry without ranges, a malformed TOC, no
// answer in time) is a snapshot.Declined with the reason, and containerd pulls as ever. That
// answer counts for a while too, so that half an image is not mounted after all.
package lazy
