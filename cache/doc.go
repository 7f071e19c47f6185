// Package cache keeps a node's content on disk: blobs by digest, whole or in part, layers inflated for mounts,
// manifests, tags, lists of referrers, and what clients and repositories are known to be allowed. The
// mirror and the lazy mounts read from it; what brings bytes that it lacks is a
// Fetcher of theirs. It knows no network.
//
// A blob is a sparse file; which of its parts (1 MiB) are there, the index knows (bbolt,
// index.db). Data is written first, then synced, then marked in the index, in
// batches: after a crash a part with its mark is there, and one without is fetched
// again. A file that the index does not know is hashed (a layer: chunk by chunk, by Options.VerifyLayer) and taken back or removed, and
// so a damaged index, which is set aside, is rebuilt from the files.
//
// A layer kept inflated is four files that whoever mounts it makes and understands, under the digest of its compressed
// blob: three that never change, and a sparse one with its content, of which the index knows which chunks are there. The caller
// writes and syncs them, and Commit marks them; it pins the layer before it opens the files. Blobs and layers are evicted by
// one rule from one budget, and one of them is no substitute for the other.
//
// What is served before a blob's digest was checked: bytes are passed on as they come. A
// Reader from 0 to the end gets the blob's last bytes (up to 64 KiB) only when the whole blob has the
// right digest, and an error otherwise. A Reader of a part of a blob that is not complete
// gets unverified bytes: it has to check them against what it knows of that range, or
// when it has the whole, as clients of the OCI protocol do. A blob whose digest was
// checked once is served at once; Check reads it again.
//
// A fill belongs to the store: a client that hangs up never ends it. Nobody waits for it any more: it is
// finished, at low priority, when half of the blob is there or the blob is small (16 MiB);
// else it is given 10 s for somebody to come back, and dropped. What was written stays.
//
// Eviction is SIEVE over blobs and layers: those not read again since they were complete, or not used again since they
// were made, go first, oldest first. Nothing that is
// pinned, being read or being filled is evicted. Room is reserved before a fill writes; where
// there is none, even after eviction, the client is served without caching.
package cache
