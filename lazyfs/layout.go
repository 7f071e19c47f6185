package lazyfs

// BlockBytes is the file system's block: a file's content begins at a multiple of
// it, and the data file ends at one.
const BlockBytes = 4096

// maxDataBytes bounds a layer's data file.
const maxDataBytes = 1 << 40

// Files are the three files of one layer on disk.
type Files struct {
	Meta  string // the EROFS image: names and inodes, no content
	Table string // the chunk table
	Data  string // sparse, with the content of all regular files
}
