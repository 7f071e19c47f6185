package lazyfs

import "github.com/opencontainers/go-digest"

// Entry is what tells of an entry of a TOC which file of the layer it is, and where its first chunk is; by the format's
// names.
type Entry struct {
	Name, Type, LinkName      string
	Size, Offset, InnerOffset int64
	Digest                    digest.Digest // of the whole file
}

// EachEntry calls do for every entry of a TOC, in order, until that returns an error, which it returns. Of "chunk" entries
// it tells nothing but that. It is as fast as Build, because a start waits for what is known by it. The error wraps
// accel.ErrInvalid or ErrUnsupported.
func EachEntry(toc []byte, do func(Entry) error) error {
	return decodeTOC(toc, func(e *tocEntry) error {
		switch string(e.kind) {
		case "chunk": // most of a large file's
			return do(Entry{Type: "chunk"})
		case "dir":
			return do(Entry{Type: "dir", Name: string(e.name)})
		case "reg":
			return do(Entry{Type: "reg", Name: string(e.name), Size: e.size, Offset: e.offset, InnerOffset: e.innerOffset, Digest: digest.Digest(e.digest)})
		}
		return do(Entry{Type: string(e.kind), Name: string(e.name), LinkName: string(e.linkName)})
	})
}
