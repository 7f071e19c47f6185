package lazyfs

import (
	"encoding/binary"
	"hash/crc32"

	"golang.org/x/sys/unix"
)

// The on-disk format, as the kernel's fs/erofs/erofs_fs.h has it. We use: blocks of 4
// KiB, compact and extended inodes, directories and symlinks with their tails beside the
// inode, attributes inline and shared, and regular files in chunks on one further
// device, which is the data file. The oldest kernel that reads it is 5.16.
//
// The image is: a block with the super block and the device table; inodes, a directory's
// all together, beginning with the root; the blocks of directories and long symlinks;
// shared extended attributes.
const (
	erofsMagic      = 0xe0f5e1e2
	superOffset     = 1024
	deviceOffset    = superOffset + 128 // behind the super block
	deviceSlotBytes = 128
	dataDevice      = 1 // the data file's number
	blockBits       = 12
	firstInodeAt    = BlockBytes

	compatChecksum      = 0x1
	compatMtime         = 0x2
	incompatChunkedFile = 0x4
	incompatDeviceTable = 0x8

	slotBytes       = 32 // inodes begin at multiples of it; an inode's number is its slot's
	compactBytes    = 32
	extendedBytes   = 64
	maxCompact16    = 1<<16 - 1 // owner and links of a compact inode
	maxCompact32    = 1<<32 - 1 // its size
	formatExtended  = 1         // i_format: version bit, then the layout
	layoutShift     = 1
	layoutPlain     = 0 // content in blocks elsewhere
	layoutInline    = 2 // the same, but for the last part, which stands behind the inode
	layoutChunked   = 4 // behind the inode stands where the content is
	chunkIndexes    = 0x20
	chunkIndexBytes = 8
	maxChunkBits    = 18 // 1 GiB for each index: within 32 bits, whatever reads it

	direntBytes = 12

	xattrHeaderBytes = 12
	xattrEntryBytes  = 4
	maxSharedXattrs  = 255 // of one inode
)

// place is where an inode is in the image.
type place struct {
	at        int64  // its own place, 0 for none
	sizeBytes int64  // i_size
	block     int64  // the first of its own blocks
	node      uint32 // of a directory: its name
	layout    uint16
	extended  bool
}

// number is the inode's, by which directories refer to it.
func (p *place) number() uint64 { return uint64(p.at / slotBytes) }

func (p *place) inodeBytes() int64 {
	if p.extended {
		return extendedBytes
	}
	return compactBytes
}

// blocks is how many blocks it has of its own in the image.
func (p *place) blocks() int64 {
	switch p.layout {
	case layoutPlain:
		return alignUp(p.sizeBytes, BlockBytes) / BlockBytes
	case layoutInline:
		return p.sizeBytes / BlockBytes
	}
	return 0
}

// fileTypes are those of directory entries.
var fileTypes = map[uint16]byte{
	unix.S_IFREG: 1, unix.S_IFDIR: 2, unix.S_IFCHR: 3, unix.S_IFBLK: 4, unix.S_IFIFO: 5, unix.S_IFLNK: 7,
}

// superBlock is the image's first block.
func (m *image) superBlock() []byte {
	b := make([]byte, BlockBytes)
	le := binary.LittleEndian
	s := b[superOffset:]
	le.PutUint32(s[0:], erofsMagic)
	le.PutUint32(s[8:], compatChecksum|compatMtime)
	s[12] = blockBits
	le.PutUint16(s[14:], firstInodeAt/slotBytes) // the root
	le.PutUint64(s[16:], uint64(len(m.order)))
	le.PutUint64(s[24:], uint64(m.epoch))
	le.PutUint32(s[36:], uint32(m.sizeBytes/BlockBytes))
	le.PutUint32(s[44:], uint32(m.sharedAt/BlockBytes))
	copy(s[48:], m.uuid[:])
	le.PutUint32(s[80:], incompatChunkedFile|incompatDeviceTable)
	le.PutUint16(s[86:], 1) // device in the table
	le.PutUint16(s[88:], deviceOffset/deviceSlotBytes)
	le.PutUint32(b[deviceOffset+64:], uint32(m.dataBytes/BlockBytes))
	le.PutUint32(s[4:], ^crc32.Checksum(s, castagnoli)) // the kernel's has no final inversion
	return b
}
