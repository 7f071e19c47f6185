package profile

import (
	"bytes"
	"encoding/binary"
)

// An ELF file as the dynamic loader reads it: by its program headers. Sections are
// for linkers and often stripped.
const (
	ptLoad    = 1
	ptDynamic = 2
	ptInterp  = 3

	dtNeeded  = 1
	dtStrtab  = 5
	dtRpath   = 15
	dtRunpath = 29

	pfExecute = 1
	pfWrite   = 2

	maxProgramHeaders = 128
	maxDynamicBytes   = 64 << 10
	maxNeeded         = 512
	maxStringBytes    = 4096
)

// elfFile is what a start needs to know of one.
type elfFile struct {
	is64    bool
	order   binary.ByteOrder
	machine uint16
	loads   []load
	interp  string
	needed  []string
	rpath   string
	runpath string
}

// load is a part of the file that is mapped.
type load struct {
	offset, address, bytes int64
	flags                  uint32
}

// readELF reads e's headers. It is nil for what is no ELF file, or a damaged one.
func (r *reader) readELF(e *Entry) *elfFile {
	h := r.at(e, 0, min(e.Size, 64))
	if len(h) < 52 || !bytes.HasPrefix(h, []byte("\x7fELF")) {
		return nil
	}
	f := &elfFile{is64: h[4] == 2, order: binary.LittleEndian}
	if h[5] == 2 {
		f.order = binary.BigEndian
	}
	f.machine = f.order.Uint16(h[18:])
	var tableAt int64
	var entryBytes, count int
	if f.is64 {
		if len(h) < 64 {
			return nil
		}
		tableAt, entryBytes, count = int64(f.order.Uint64(h[32:])), int(f.order.Uint16(h[54:])), int(f.order.Uint16(h[56:]))
	} else {
		tableAt, entryBytes, count = int64(f.order.Uint32(h[28:])), int(f.order.Uint16(h[42:])), int(f.order.Uint16(h[44:]))
	}
	if count == 0 || count > maxProgramHeaders || (f.is64 && entryBytes != 56) || (!f.is64 && entryBytes != 32) {
		return nil
	}
	table := r.at(e, tableAt, int64(count*entryBytes))
	if len(table) != count*entryBytes {
		return nil
	}
	var dynamic load
	for ; len(table) > 0; table = table[entryBytes:] {
		kind, l := f.programHeader(table)
		if l.offset < 0 || l.bytes < 0 || l.offset > e.Size || l.bytes > e.Size-l.offset {
			continue
		}
		switch kind {
		case ptLoad:
			f.loads = append(f.loads, l)
		case ptDynamic:
			dynamic = l
		case ptInterp:
			f.interp = cString(r.at(e, l.offset, min(l.bytes, maxStringBytes)))
		}
	}
	f.readDynamic(r, e, r.at(e, dynamic.offset, min(dynamic.bytes, maxDynamicBytes)))
	return f
}

func (f *elfFile) programHeader(b []byte) (kind uint32, l load) {
	kind = f.order.Uint32(b)
	if f.is64 {
		return kind, load{flags: f.order.Uint32(b[4:]), offset: int64(f.order.Uint64(b[8:])), address: int64(f.order.Uint64(b[16:])), bytes: int64(f.order.Uint64(b[32:]))}
	}
	return kind, load{offset: int64(f.order.Uint32(b[4:])), address: int64(f.order.Uint32(b[8:])), bytes: int64(f.order.Uint32(b[16:])), flags: f.order.Uint32(b[24:])}
}

// readDynamic reads the names in the dynamic section.
func (f *elfFile) readDynamic(r *reader, e *Entry, b []byte) {
	word := 4
	if f.is64 {
		word = 8
	}
	value := func(b []byte) int64 {
		if f.is64 {
			return int64(f.order.Uint64(b))
		}
		return int64(f.order.Uint32(b))
	}
	strings := int64(-1)
	var needed []int64
	rpath, runpath := int64(-1), int64(-1)
	for ; len(b) >= 2*word; b = b[2*word:] {
		tag, v := value(b), value(b[word:])
		if tag == 0 {
			break
		}
		switch tag {
		case dtNeeded:
			if len(needed) < maxNeeded {
				needed = append(needed, v)
			}
		case dtStrtab:
			strings = f.fileOffset(v)
		case dtRpath:
			rpath = v
		case dtRunpath:
			runpath = v
		}
	}
	if strings < 0 {
		return
	}
	name := func(at int64) string {
		if at < 0 || at > e.Size {
			return ""
		}
		return cString(r.at(e, strings+at, maxStringBytes))
	}
	for _, at := range needed {
		if s := name(at); s != "" {
			f.needed = append(f.needed, s)
		}
	}
	f.rpath, f.runpath = name(rpath), name(runpath)
}

// fileOffset is where an address of the mapped file is in it, or -1.
func (f *elfFile) fileOffset(address int64) int64 {
	for _, l := range f.loads {
		if address >= l.address && address-l.address < l.bytes {
			return l.offset + address - l.address
		}
	}
	return -1
}

// cString ends at a zero byte; without one it is none.
func cString(b []byte) string {
	n := bytes.IndexByte(b, 0)
	if n < 0 {
		return ""
	}
	return string(b[:n])
}
