package lazyfs

import (
	"errors"
	"io"
	"runtime/debug"
	"sync"

	"golang.org/x/sys/unix"
)

// read answers at once what is there; what is not waits in a goroutine of its own,
// so that the reader goes on with the next request.
func (f *fuseServer) read(unique, node uint64, offset int64, size int) {
	file := f.shelf.get(node)
	if file == nil {
		f.fail(unique, unix.ESTALE)
		return
	}
	if offset < 0 || size < 0 || size > maxReadBytes || offset > file.size {
		f.shelf.put(file)
		f.fail(unique, unix.EINVAL)
		return
	}
	size = int(min(int64(size), file.size-offset))
	first, n, err := file.wanted(offset, size)
	if err != nil || n == 0 {
		f.answer(unique, file, offset, size, err)
		f.shelf.put(file)
		return
	}
	interrupted := make(chan struct{})
	f.mu.Lock()
	if f.ended {
		close(interrupted)
	} else {
		f.waiting[unique] = interrupted
	}
	f.mu.Unlock()
	f.serving.Go(func() {
		debug.SetPanicOnFault(true)
		defer f.shelf.put(file)
		err := f.fill(file, first, n, interrupted)
		f.mu.Lock()
		delete(f.waiting, unique)
		f.mu.Unlock()
		if err == nil {
			// The daemon's word is not enough: only a set bit is.
			if _, left, missingErr := file.missing(offset, size); missingErr != nil {
				err = missingErr
			} else if left > 0 {
				err = unix.EIO
			}
		}
		f.answer(unique, file, offset, size, err)
	})
}

func (f *fuseServer) interrupt(unique, of uint64) {
	f.mu.Lock()
	interrupted := f.waiting[of]
	delete(f.waiting, of)
	f.mu.Unlock()
	if interrupted != nil {
		close(interrupted)
		return
	}
	// Another reader may be about to note it: the kernel shall say it again, and
	// forgets it where the request was answered.
	f.fail(unique, unix.EAGAIN)
}

// errInterrupted: whoever wanted to read has given up.
var errInterrupted = errors.New("interrupted")

// answer sends the bytes, or EIO for whatever error.
func (f *fuseServer) answer(unique uint64, file *held, offset int64, size int, err error) {
	if err == nil {
		err = f.splice(unique, file, offset, size)
	}
	if err == nil {
		return
	}
	no := unix.EIO
	if errors.Is(err, errInterrupted) {
		no = unix.EINTR
	}
	f.fail(unique, no)
}

// splice moves the bytes from the data file's page cache to the kernel's reader
// without passing through our memory. An error is one before an answer was tried.
func (f *fuseServer) splice(unique uint64, file *held, offset int64, size int) error {
	p, err := f.pipes.get()
	if err != nil {
		return f.copy(unique, file, offset, size)
	}
	var h [outHeaderBytes]byte
	putOutHeader(h[:], unique, size, 0)
	if _, err = unix.Write(p.w, h[:]); err != nil {
		p.close()
		return f.copy(unique, file, offset, size)
	}
	for done := 0; done < size; {
		at := offset + int64(done)
		n, err := unix.Splice(int(file.data.Fd()), &at, p.w, nil, size-done, unix.SPLICE_F_NONBLOCK)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			p.close() // with what is in it
			return f.copy(unique, file, offset, size)
		}
		done += int(n)
	}
	n, err := unix.Splice(p.r, nil, f.dev, nil, outHeaderBytes+size, 0)
	if err == nil && int(n) != outHeaderBytes+size {
		err = io.ErrShortWrite
	}
	if err != nil {
		p.close() // what is left in it belongs to no other answer
		f.answered(unique, err)
		return nil
	}
	f.pipes.put(p)
	return nil
}

// buffers are for file systems that cannot splice, and where pipes have run out.
var buffers = sync.Pool{New: func() any { b := make([]byte, maxReadBytes); return &b }}

func (f *fuseServer) copy(unique uint64, file *held, offset int64, size int) error {
	b := buffers.Get().(*[]byte)
	defer buffers.Put(b)
	if n, err := file.data.ReadAt((*b)[:size], offset); n < size {
		if err == io.EOF {
			err = ErrDamaged // somebody cut the file
		}
		return err
	}
	f.answered(unique, f.reply(unique, (*b)[:size]))
	return nil
}

// pipes are kept for the next splice. The zero value is ready.
type pipes struct {
	mu   sync.Mutex
	free []pipe
}

type pipe struct{ r, w int }

// pipeBytes: a page for the header, one for each page of the largest read, one more
// where that is not aligned, rounded up to what pipes can have.
const pipeBytes = 2 * maxReadBytes

func (p *pipes) get() (pipe, error) {
	p.mu.Lock()
	if n := len(p.free); n > 0 {
		one := p.free[n-1]
		p.free = p.free[:n-1]
		p.mu.Unlock()
		return one, nil
	}
	p.mu.Unlock()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return pipe{}, err
	}
	one := pipe{fds[0], fds[1]}
	if _, err := unix.FcntlInt(uintptr(one.w), unix.F_SETPIPE_SZ, pipeBytes); err != nil {
		one.close()
		return pipe{}, err
	}
	return one, nil
}

// put takes an empty pipe back.
func (p *pipes) put(one pipe) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.free) < 2*fuseReaders {
		p.free = append(p.free, one)
		return
	}
	one.close()
}

func (p *pipes) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, one := range p.free {
		one.close()
	}
	p.free = nil
}

func (p pipe) close() {
	closeFD(p.r)
	closeFD(p.w)
}
