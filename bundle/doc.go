// Package bundle is the form of a boot bundle: one blob with the tables of contents of all of an image's layers and, in
// order of first use, the chunks that a start of the image reads. A node that knows of one asks for it by a
// single request, on a connection that it has, where it asks for each table and then for hundreds of ranges otherwise. Package
// worker makes bundles beside profiles, package lazy takes them.
//
// A bundle is a shortcut to what the layers have anyhow, and nobody signs it: each table is checked against the digest that
// the image's mapping gives, each chunk against that of its table. A wrong one costs the bytes of its stream, up to
// where it is found out.
//
//	magic, length of the packed head, length of the head
//	head: the layers' TOC digests and sizes, the frames' sizes and chunks (zstd)
//	TOCs: their digests as bytes, then the rest of all of them (zstd)
//	frames: chunks, one after the other (zstd each)
package bundle
