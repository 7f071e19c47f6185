package profile

import "context"

// Names lists a directory, sorted.
func (t *Tree) Names(dir string) []string {
	return t.names(&work{ctx: context.Background(), left: maxWork}, dir)
}

// Files is everything below a directory.
func (t *Tree) Files(dir string) func(yield func(name string, e *Entry) bool) {
	return t.files(nil, dir)
}
