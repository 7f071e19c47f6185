package lazyfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// The kernel's FUSE protocol, as much of it as a flat directory of read-only files
// needs. A library would hold a buffer of the largest request's size for every read
// that waits; here such a read costs a goroutine.
const (
	fuseMajor = 7
	fuseMinor = 31 // Linux 4.20: max_pages

	opLookup      = 1
	opForget      = 2
	opGetattr     = 3
	opOpen        = 14
	opRead        = 15
	opStatfs      = 17
	opRelease     = 18
	opInit        = 26
	opInterrupt   = 36
	opDestroy     = 38
	opBatchForget = 42

	initAsyncRead = 1 << 0
	initAsyncDIO  = 1 << 15 // reads of EROFS with "directio" do not wait for one another
	initMaxPages  = 1 << 22

	openDirectIO = 1 << 0 // EROFS has a page cache of its own

	rootNode       = 1
	inHeaderBytes  = 40
	outHeaderBytes = 16
	attrBytes      = 88
)

const (
	// maxReadBytes bounds one read: half of what a pipe may hold without privileges
	// (/proc/sys/fs/pipe-max-size), as a pipe holds pages, and the header takes one.
	maxReadBytes = 512 << 10
	// fuseWriteBytes is the least that kernels take. Nobody writes.
	fuseWriteBytes = 4096
	// requestBytes: kernels want at least 8 KiB to put a request into.
	requestBytes = 8192
	// maxBackground is how many reads the kernel lets wait at once; its default of 12
	// would keep reads of what is there behind 12 misses.
	maxBackground = 4096
	// fuseReaders take requests from the kernel. What they answer themselves may have
	// to come from the disk, so there are more of them than cores.
	fuseReaders = 8
	// attrSeconds: a file's size never changes.
	attrSeconds = 24 * 60 * 60
)

// fuseServer is one FUSE mount and answers what the kernel asks about it.
type fuseServer struct {
	dir   string
	dev   int // /dev/fuse
	shelf *shelf
	fill  func(f *held, first, n int, interrupted <-chan struct{}) error
	log   *slog.Logger

	serving sync.WaitGroup
	pipes   pipes

	mu      sync.Mutex
	waiting map[uint64]chan struct{} // reads that wait for a fill, by request; closed when interrupted
	ended   bool                     // no read waits any more
}

// mountFuse mounts at dir and shakes hands with the kernel. Set fill next, then start.
func mountFuse(dir string, s *shelf, log *slog.Logger) (*fuseServer, error) {
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: open /dev/fuse: %w", ErrUnsupported, err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other,max_read=%d", dev, maxReadBytes)
	if err = unix.Mount("accel", dir, "fuse.accel", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_RDONLY, options); err != nil {
		closeFD(dev)
		return nil, fmt.Errorf("mount FUSE at %s: %w", dir, err)
	}
	f := &fuseServer{dir: dir, dev: dev, shelf: s, log: log, waiting: map[uint64]chan struct{}{}}
	if err = f.init(); err != nil {
		f.abort()
		return nil, fmt.Errorf("FUSE handshake: %w", err)
	}
	return f, nil
}

// init answers the kernel's first request. Passthrough is not asked for: it would
// count as a stacked file system, on which EROFS refuses to be mounted.
func (f *fuseServer) init() error {
	b := make([]byte, requestBytes)
	n, err := f.receive(b)
	if err != nil {
		return err
	}
	le := binary.LittleEndian
	if n < inHeaderBytes+16 || le.Uint32(b[4:]) != opInit {
		return errors.New("the first request is not INIT")
	}
	body := b[inHeaderBytes:n]
	major, minor, flags := le.Uint32(body), le.Uint32(body[4:]), le.Uint32(body[12:])
	if major != fuseMajor || minor < fuseMinor {
		return fmt.Errorf("%w: FUSE %d.%d", ErrUnsupported, major, minor)
	}
	var out [64]byte
	le.PutUint32(out[0:], fuseMajor)
	le.PutUint32(out[4:], fuseMinor)
	le.PutUint32(out[8:], le.Uint32(body[8:])) // read-ahead: unused with direct I/O
	le.PutUint32(out[12:], flags&(initAsyncRead|initAsyncDIO|initMaxPages))
	le.PutUint16(out[16:], maxBackground)
	le.PutUint16(out[18:], maxBackground) // congestion threshold
	le.PutUint32(out[20:], fuseWriteBytes)
	le.PutUint32(out[24:], 1) // time granularity, ns
	le.PutUint16(out[28:], uint16(maxReadBytes/os.Getpagesize()))
	return f.reply(le.Uint64(b[8:]), out[:])
}

// start begins to answer, until unmount or abort.
func (f *fuseServer) start() {
	for range fuseReaders {
		f.serving.Go(func() {
			// A disk error under a mapped table is a fault; see held.missing.
			debug.SetPanicOnFault(true)
			f.loop()
		})
	}
}

// unmount fails with EBUSY while a file is open anywhere.
func (f *fuseServer) unmount() error {
	if err := unix.Unmount(f.dir, unix.UMOUNT_NOFOLLOW); err != nil {
		return err
	}
	f.finish()
	return nil
}

// abort ends the connection: all reads get an error, now and for ever.
func (f *fuseServer) abort() {
	// MNT_FORCE aborts the connection and then fails where a file is open.
	_ = unix.Unmount(f.dir, unix.MNT_FORCE|unix.UMOUNT_NOFOLLOW)
	_ = unix.Unmount(f.dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	f.finish()
}

func (f *fuseServer) finish() {
	f.mu.Lock()
	f.ended = true
	for id, interrupted := range f.waiting {
		close(interrupted)
		delete(f.waiting, id)
	}
	f.mu.Unlock()
	f.serving.Wait()
	if f.dev >= 0 { // else it was aborted before
		closeFD(f.dev)
		f.dev = -1
	}
	f.pipes.close()
}

func (f *fuseServer) hasEnded() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ended
}

// receive gives unix.ENODEV when the mount is gone.
func (f *fuseServer) receive(b []byte) (int, error) {
	for {
		n, err := unix.Read(f.dev, b)
		if err != unix.EINTR && err != unix.EAGAIN && err != unix.ENOENT { // ENOENT: interrupted before we had it
			return n, err
		}
	}
}

func (f *fuseServer) loop() {
	b := make([]byte, requestBytes)
	for {
		n, err := f.receive(b)
		if err != nil {
			if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ECONNABORTED) || f.hasEnded() {
				return
			}
			// Without readers, nothing would ever be answered again.
			f.log.Error("FUSE device", "error", err)
			time.Sleep(100 * time.Millisecond)
			continue
		}
		if n < inHeaderBytes {
			continue
		}
		f.handle(b[:n])
	}
}

func (f *fuseServer) handle(b []byte) {
	le := binary.LittleEndian
	op, unique, node := le.Uint32(b[4:]), le.Uint64(b[8:]), le.Uint64(b[16:])
	body := b[inHeaderBytes:]
	switch op {
	case opForget, opBatchForget: // a file lives as long as the shelf has it; no answer
	case opInterrupt:
		if len(body) >= 8 {
			f.interrupt(unique, le.Uint64(body))
		}
	case opLookup:
		name, _, _ := strings.Cut(string(body), "\x00")
		file := f.shelf.lookup(name)
		if node != rootNode || file == nil {
			f.fail(unique, unix.ENOENT)
			return
		}
		var out [40 + attrBytes]byte
		le.PutUint64(out[0:], file.node)
		// The name is valid for 0 s, asked for again each time: a layer may go.
		le.PutUint64(out[24:], attrSeconds)
		file.attr(out[40:])
		f.answered(unique, f.reply(unique, out[:]))
	case opGetattr:
		var out [16 + attrBytes]byte
		le.PutUint64(out[0:], attrSeconds)
		if node == rootNode {
			rootAttr(out[16:])
		} else if file := f.shelf.get(node); file != nil {
			file.attr(out[16:])
			f.shelf.put(file)
		} else {
			f.fail(unique, unix.ESTALE)
			return
		}
		f.answered(unique, f.reply(unique, out[:]))
	case opOpen:
		if !f.shelf.open(node) {
			f.fail(unique, unix.ESTALE)
			return
		}
		var out [16]byte
		le.PutUint64(out[0:], node) // the handle
		le.PutUint32(out[8:], openDirectIO)
		if err := f.reply(unique, out[:]); err != nil {
			f.shelf.release(node) // the opener is gone, or will be told EIO: RELEASE will not come
			f.answered(unique, err)
		}
	case opRelease:
		f.shelf.release(node)
		f.answered(unique, f.reply(unique, nil))
	case opRead:
		if len(body) < 20 {
			f.fail(unique, unix.EINVAL)
			return
		}
		f.read(unique, node, int64(le.Uint64(body[8:])), int(le.Uint32(body[16:])))
	case opStatfs:
		var out [80]byte
		le.PutUint32(out[40:], BlockBytes)
		le.PutUint32(out[44:], 255) // longest name
		le.PutUint32(out[48:], BlockBytes)
		f.answered(unique, f.reply(unique, out[:]))
	case opDestroy:
		f.answered(unique, f.reply(unique, nil))
	default:
		f.fail(unique, unix.ENOSYS)
	}
}

func rootAttr(b []byte) {
	le := binary.LittleEndian
	le.PutUint64(b[0:], rootNode)
	le.PutUint32(b[60:], unix.S_IFDIR|0o500)
	le.PutUint32(b[64:], 2) // links
}

func (f *fuseServer) reply(unique uint64, body []byte) error {
	var h [outHeaderBytes]byte
	putOutHeader(h[:], unique, len(body), 0)
	_, err := unix.Writev(f.dev, [][]byte{h[:], body})
	return err
}

func (f *fuseServer) fail(unique uint64, no unix.Errno) {
	var h [outHeaderBytes]byte
	putOutHeader(h[:], unique, 0, no)
	_, err := unix.Write(f.dev, h[:])
	f.answered(unique, err)
}

func putOutHeader(h []byte, unique uint64, bodyBytes int, no unix.Errno) {
	le := binary.LittleEndian
	le.PutUint32(h[0:], uint32(outHeaderBytes+bodyBytes))
	le.PutUint32(h[4:], uint32(-int32(no)))
	le.PutUint64(h[8:], unique)
}

// answered takes what writing an answer gave. The kernel gives ENOENT where nobody
// waits any more, ENODEV after unmounting. After any other error whoever asked may be waiting
// still, for ever: EIO takes no memory but its own 16 bytes.
func (f *fuseServer) answered(unique uint64, err error) {
	if err == nil || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return
	}
	f.log.Error("FUSE answer", "error", err)
	var h [outHeaderBytes]byte
	putOutHeader(h[:], unique, 0, unix.EIO)
	if _, err = unix.Write(f.dev, h[:]); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
		f.log.Error("FUSE answer, EIO instead", "error", err)
	}
}
