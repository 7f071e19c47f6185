package lazyfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// bitmap says which chunks of a layer are in its data file. It is a file in
// Options.Dir that the daemon and the holders map: only the daemon writes. It speaks of one
// data file during one run of the machine, which its header names; after another
// boot, or for another file, it is void.
//
//	header: magic [8] | chunks u64 | boot ID [16] | data file's device, inode, birth (ns) u64 | zero [8]
//	then 64-bit words, chunk i is bit i%64 of word i/64, in the machine's byte order
type bitmap struct {
	mapped []byte
	words  []atomic.Uint64
	chunks int
	file   os.FileInfo // which file it is
}

const (
	bitmapMagic       = "accelbm1"
	bitmapHeaderBytes = 64
	// newPrefix begins the names of files that get another when they are whole.
	newPrefix = ".new-"
)

// openBitmap maps the bitmap at path for data where it is good for it, else makes a
// new one with no bit set.
func openBitmap(path string, data *os.File, chunks int) (*bitmap, error) {
	header, err := bitmapHeader(data, chunks)
	if err != nil {
		return nil, err
	}
	b, err := mapBitmap(path, chunks, true)
	if err == nil {
		if string(b.mapped[:bitmapHeaderBytes]) == string(header) {
			return b, nil
		}
		err = b.close()
	} else if errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrDamaged) {
		err = nil
	}
	if err != nil {
		return nil, err
	}
	if err = createMapped(path, header, bitmapBytes(chunks)); err != nil {
		return nil, fmt.Errorf("make bitmap: %w", err)
	}
	return mapBitmap(path, chunks, true)
}

// mapBitmap maps an existing bitmap of so many chunks.
func mapBitmap(path string, chunks int, writable bool) (*bitmap, error) {
	flags, protection := os.O_RDONLY, unix.PROT_READ
	if writable {
		flags, protection = os.O_RDWR, unix.PROT_READ|unix.PROT_WRITE
	}
	file, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	size := bitmapBytes(chunks)
	if info.Size() != size {
		return nil, fmt.Errorf("%w: bitmap %s has %d bytes, not %d", ErrDamaged, path, info.Size(), size)
	}
	mapped, err := unix.Mmap(int(file.Fd()), 0, int(size), protection, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map bitmap %s: %w", path, err)
	}
	b := &bitmap{mapped: mapped, chunks: chunks, file: info}
	if words := bitmapWords(chunks); words > 0 {
		b.words = unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(&mapped[bitmapHeaderBytes])), words)
	}
	if binary.LittleEndian.Uint64(mapped[8:]) != uint64(chunks) {
		return nil, errors.Join(fmt.Errorf("%w: bitmap %s is of another layer", ErrDamaged, path), b.close())
	}
	return b, nil
}

func bitmapWords(chunks int) int   { return (chunks + 63) / 64 }
func bitmapBytes(chunks int) int64 { return bitmapHeaderBytes + 8*int64(bitmapWords(chunks)) }

func bitmapHeader(data *os.File, chunks int) ([]byte, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	var st unix.Statx_t
	err = unix.Statx(int(data.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_INO|unix.STATX_BTIME, &st)
	if err != nil {
		return nil, fmt.Errorf("stat %s: %w", data.Name(), err)
	}
	h := make([]byte, bitmapHeaderBytes)
	le := binary.LittleEndian
	copy(h, bitmapMagic)
	le.PutUint64(h[8:], uint64(chunks))
	copy(h[16:32], strings.ReplaceAll(string(boot), "-", "")) // half of the ID is enough
	le.PutUint64(h[32:], unix.Mkdev(st.Dev_major, st.Dev_minor))
	le.PutUint64(h[40:], st.Ino)
	le.PutUint64(h[48:], uint64(st.Btime.Sec)*1e9+uint64(st.Btime.Nsec)) // 0 where the file system keeps none
	return h, nil
}

// createMapped puts a file that will be mapped in place at once. Its pages are allocated now: a full
// tmpfs must be an error here, not a SIGBUS on the first write.
func createMapped(path string, header []byte, sizeBytes int64) error {
	file, err := os.CreateTemp(filepath.Dir(path), newPrefix+"*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(file.Name()) }() // gone already when renamed
	defer file.Close()
	if err = unix.Fallocate(int(file.Fd()), 0, 0, sizeBytes); err != nil {
		return err
	}
	if _, err = file.WriteAt(header, 0); err != nil {
		return err
	}
	return os.Rename(file.Name(), path)
}

func (b *bitmap) has(i int) bool { return b.words[i/64].Load()&(1<<(i%64)) != 0 }

// set reports whether the bit was clear.
func (b *bitmap) set(i int) bool { return b.words[i/64].Or(1<<(i%64))&(1<<(i%64)) == 0 }

// clear reports whether the bit was set.
func (b *bitmap) clear(i int) bool { return b.words[i/64].And(^(1<<(i%64)))&(1<<(i%64)) != 0 }

// missing is the first clear bit in [from, to), or to.
func (b *bitmap) missing(from, to int) int {
	for i := from; i < to; {
		if word := b.words[i/64].Load(); word == ^uint64(0) {
			i += 64 - i%64
		} else if word&(1<<(i%64)) != 0 {
			i++
		} else {
			return i
		}
	}
	return to
}

// same reports whether the file at path is the one that is mapped.
func (b *bitmap) same(path string) bool {
	info, err := os.Stat(path)
	return err == nil && os.SameFile(info, b.file)
}

func (b *bitmap) close() error { return unix.Munmap(b.mapped) }
