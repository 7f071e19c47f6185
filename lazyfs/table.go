package lazyfs

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"os"
	"runtime/debug"
	"sort"

	"accel"

	"golang.org/x/sys/unix"
)

// A table's file is a header and one record for each chunk, sorted by place in the
// data file, all little-endian. It is mapped, never read into memory: the chunks
// of a large layer are 2 MB, and a node has many layers.
//
//	header: magic [8] | version u32 | record bytes u32 | records u64 | data bytes u64 |
//	        crc32c of the records u32 | zero [24] | crc32c of the header so far u32
//	record: blob offset u64 | blob bytes u64 | data offset u64 | inner offset u32 | bytes u32 | digest [32]
const (
	tableMagic       = "accelchk"
	tableVersion     = 1
	tableHeaderBytes = 64
	recordBytes      = 64
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Table is the chunks of one layer, sorted by their place in the data file. It may
// be used by many at once, until Close, under Guarded.
type Table struct {
	mapped    []byte // the whole file
	records   []byte // the records in it
	dataBytes int64
}

// OpenTable maps the chunk table at path. The error is ErrDamaged where the file is
// not what Layout.Store wrote, else what opening it gave. The file must not be
// changed in place while it is open.
func OpenTable(path string) (*Table, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	size := info.Size()
	if size < tableHeaderBytes || size > math.MaxInt {
		return nil, fmt.Errorf("%w: chunk table %s has %d bytes", ErrDamaged, path, size)
	}
	mapped, err := unix.Mmap(int(file.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map chunk table %s: %w", path, err)
	}
	var t *Table
	err = Guarded(func() (err error) {
		t, err = parseTable(mapped)
		return err
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("chunk table %s: %w", path, err), unix.Munmap(mapped))
	}
	return t, nil
}

// Guarded makes a fault under mapped files (a disk error, a file cut short) ErrDamaged. It is for what uses a Table.
func Guarded(do func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if fault := recover(); fault != nil {
			if _, is := fault.(interface{ Addr() uintptr }); !is {
				panic(fault)
			}
			err = fmt.Errorf("%w: %v", ErrDamaged, fault)
		}
	}()
	return do()
}

// parseTable checks everything that readers rely on: afterwards the chunks are in
// order, do not overlap and lie in the data file.
func parseTable(mapped []byte) (*Table, error) {
	h := mapped[:tableHeaderBytes]
	le := binary.LittleEndian
	if string(h[:8]) != tableMagic || crc32.Checksum(h[:60], castagnoli) != le.Uint32(h[60:]) {
		return nil, fmt.Errorf("%w: not a header", ErrDamaged)
	}
	if v := le.Uint32(h[8:]); v != tableVersion || le.Uint32(h[12:]) != recordBytes {
		return nil, fmt.Errorf("%w: version %d", ErrDamaged, v)
	}
	records := mapped[tableHeaderBytes:]
	if count := le.Uint64(h[16:]); count != uint64(len(records)/recordBytes) || len(records)%recordBytes != 0 {
		return nil, fmt.Errorf("%w: %d records in %d bytes", ErrDamaged, count, len(records))
	}
	if crc32.Checksum(records, castagnoli) != le.Uint32(h[32:]) {
		return nil, fmt.Errorf("%w: wrong checksum", ErrDamaged)
	}
	dataBytes := le.Uint64(h[24:])
	if dataBytes > maxDataBytes {
		return nil, fmt.Errorf("%w: %d bytes of data", ErrDamaged, dataBytes)
	}
	t := &Table{mapped: mapped, records: records, dataBytes: int64(dataBytes)}
	end := int64(0)
	for i := range t.Len() {
		c := t.At(i)
		if c.DataOffset < end || c.DataOffset > t.dataBytes-c.Bytes || c.Bytes == 0 || c.BlobOffset < 0 || c.BlobBytes <= 0 {
			return nil, fmt.Errorf("%w: chunk %d is out of place", ErrDamaged, i)
		}
		end = c.DataOffset + c.Bytes
	}
	return t, nil
}

// Len is the number of chunks.
func (t *Table) Len() int { return len(t.records) / recordBytes }

// DataBytes is the size of the data file: a multiple of BlockBytes.
func (t *Table) DataBytes() int64 { return t.dataBytes }

// At is the i-th chunk in the data file's order.
func (t *Table) At(i int) accel.Chunk {
	r := t.records[i*recordBytes : (i+1)*recordBytes]
	le := binary.LittleEndian
	return accel.Chunk{
		BlobOffset: int64(le.Uint64(r)), BlobBytes: int64(le.Uint64(r[8:])),
		DataOffset: int64(le.Uint64(r[16:])), InnerOffset: int64(le.Uint32(r[24:])), Bytes: int64(le.Uint32(r[28:])),
		Digest: [32]byte(r[32:]),
	}
}

// Find is the chunk that holds the byte at dataOffset, or -1 where no chunk does:
// in the padding between files, which reads as zeros, and outside the file.
func (t *Table) Find(dataOffset int64) int {
	after := sort.Search(t.Len(), func(i int) bool { return t.dataOffset(i) > dataOffset })
	if after == 0 {
		return -1
	}
	if c := t.At(after - 1); dataOffset >= c.DataOffset+c.Bytes {
		return -1
	}
	return after - 1
}

func (t *Table) dataOffset(i int) int64 {
	return int64(binary.LittleEndian.Uint64(t.records[i*recordBytes+16:]))
}

// Close unmaps the table, which nobody may use any more.
func (t *Table) Close() error {
	if t.mapped == nil {
		return nil
	}
	mapped := t.mapped
	t.mapped, t.records = nil, nil
	return unix.Munmap(mapped)
}

// writeTable writes count chunks, which at tells in the data file's order. It asks
// for each twice: the checksum stands before the records.
func writeTable(w io.Writer, dataBytes int64, count int, at func(int) accel.Chunk) error {
	var record [recordBytes]byte
	le := binary.LittleEndian
	encode := func(c accel.Chunk) []byte {
		le.PutUint64(record[0:], uint64(c.BlobOffset))
		le.PutUint64(record[8:], uint64(c.BlobBytes))
		le.PutUint64(record[16:], uint64(c.DataOffset))
		le.PutUint32(record[24:], uint32(c.InnerOffset))
		le.PutUint32(record[28:], uint32(c.Bytes))
		copy(record[32:], c.Digest[:])
		return record[:]
	}
	sum := uint32(0)
	for i := range count {
		sum = crc32.Update(sum, castagnoli, encode(at(i)))
	}
	var h [tableHeaderBytes]byte
	copy(h[:], tableMagic)
	le.PutUint32(h[8:], tableVersion)
	le.PutUint32(h[12:], recordBytes)
	le.PutUint64(h[16:], uint64(count))
	le.PutUint64(h[24:], uint64(dataBytes))
	le.PutUint32(h[32:], sum)
	le.PutUint32(h[60:], crc32.Checksum(h[:60], castagnoli))
	out := bufio.NewWriterSize(w, 256<<10)
	if _, err := out.Write(h[:]); err != nil {
		return err
	}
	for i := range count {
		if _, err := out.Write(encode(at(i))); err != nil {
			return err
		}
	}
	return out.Flush()
}
