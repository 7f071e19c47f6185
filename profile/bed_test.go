package profile_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"sort"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/profile"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	imageA = digest.Digest("sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")
	imageB = digest.Digest("sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb")
)

var dayOne = time.Date(2026, 3, 1, 6, 0, 0, 0, time.UTC)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// item is one written "layer:path:offset:bytes".
func item(t testing.TB, s string) accel.ProfileItem {
	t.Helper()
	var i accel.ProfileItem
	f := strings.Split(s, ":")
	_, err := fmt.Sscan(f[0]+" "+f[2]+" "+f[3], &i.Layer, &i.Offset, &i.Bytes)
	must(t, err)
	i.Path = f[1]
	return i
}

func items(t testing.TB, list ...string) (all []accel.ProfileItem) {
	t.Helper()
	for _, s := range list {
		all = append(all, item(t, s))
	}
	return all
}

// texts is items as they are written, for comparing.
func texts(items []accel.ProfileItem) (s []string) {
	for _, i := range items {
		s = append(s, fmt.Sprintf("%d:%s:%d:%d", i.Layer, i.Path, i.Offset, i.Bytes))
	}
	return s
}

func same(t testing.TB, got []accel.ProfileItem, want ...string) {
	t.Helper()
	if g := strings.Join(texts(got), " "); g != strings.Join(want, " ") {
		t.Errorf("got  %s\nwant %s", g, strings.Join(want, " "))
	}
}

// report is a complete one of node, whose id is made of n.
func report(n int, node string, items []accel.ProfileItem) profile.Report {
	return profile.Report{
		ID: fmt.Sprintf("%032x", n), Node: node, Manifest: imageA, StartedAt: dayOne.Add(time.Duration(n) * time.Second),
		Complete: true, End: profile.EndAnswered, Items: items,
	}
}

// randomStart is some of 400 parts of 200 files, roughly in order.
func randomStart(r *rand.Rand) (list []accel.ProfileItem) {
	for f := range 200 {
		for part := range 2 {
			if r.IntN(10) < 3 {
				continue
			}
			i := accel.ProfileItem{Layer: f % 3, Path: fmt.Sprintf("usr/lib/d%d/f%d.so", f%7, f), Offset: int64(part) << 16, Bytes: 4096 * (1 + r.Int64N(16))}
			i.Content = accel.ContentIDOf(digest.FromString(i.Path))
			list = append(list, i)
		}
	}
	for n := range list {
		if m := n + r.IntN(5); m < len(list) {
			list[n], list[m] = list[m], list[n]
		}
	}
	return list
}

// file, link and so on are entries of a TOC; chunkBytes is that of the layers here.
const chunkBytes = 64 << 10

func file(name string, bytes int64, content string) *estargz.TOCEntry {
	return &estargz.TOCEntry{Name: name, Type: "reg", Size: bytes, Mode: 0o755, Digest: digest.FromString(content).String()}
}

func dir(name string) *estargz.TOCEntry {
	return &estargz.TOCEntry{Name: name + "/", Type: "dir", Mode: 0o755}
}

func symlink(name, to string) *estargz.TOCEntry {
	return &estargz.TOCEntry{Name: name, Type: "symlink", LinkName: to}
}

func hardlink(name, to string) *estargz.TOCEntry {
	return &estargz.TOCEntry{Name: name, Type: "hardlink", LinkName: to}
}

// layer is a TOC and the table that a node has of it.
type layer struct {
	toc    []byte
	chunks []accel.Chunk
}

func (l *layer) Len() int             { return len(l.chunks) }
func (l *layer) At(i int) accel.Chunk { return l.chunks[i] }
func (l *layer) Find(at int64) int {
	i := sort.Search(len(l.chunks), func(i int) bool { return l.chunks[i].DataOffset > at }) - 1
	if i < 0 || at < 0 || at >= l.chunks[i].DataOffset+l.chunks[i].Bytes {
		return -1
	}
	return i
}

// layerOf lays entries out as a converted layer is: chunks of 64 KiB that shrink to a
// quarter, files on pages of their own in the data file.
func layerOf(t testing.TB, entries ...*estargz.TOCEntry) *layer {
	t.Helper()
	l := &layer{}
	var all []*estargz.TOCEntry
	blob, data := int64(100), int64(0)
	for _, e := range entries {
		e := *e
		all = append(all, &e)
		for at := int64(0); e.Type == "reg" && at < e.Size; {
			n := min(chunkBytes, e.Size-at)
			sum := sha256.Sum256(fmt.Append(nil, e.Digest, at))
			if at == 0 {
				e.Offset, e.ChunkSize, e.ChunkDigest = blob, n, "sha256:"+hex.EncodeToString(sum[:])
			} else {
				all = append(all, &estargz.TOCEntry{Name: e.Name, Type: "chunk", Offset: blob, ChunkOffset: at, ChunkSize: n, ChunkDigest: "sha256:" + hex.EncodeToString(sum[:])})
			}
			l.chunks = append(l.chunks, accel.Chunk{BlobOffset: blob, BlobBytes: n/4 + 30, DataOffset: data + at, Bytes: n, Digest: sum})
			blob += n/4 + 30
			at += n
		}
		data += (e.Size + 4095) &^ 4095
	}
	var err error
	l.toc, err = json.Marshal(estargz.JTOC{Version: 1, Entries: all})
	must(t, err)
	return l
}

// named is l with the lookup by name.
func (l *layer) named(t testing.TB) *profile.Layer {
	t.Helper()
	n, err := joined(l.toc, l)
	must(t, err)
	return n
}

// joined is a layer whose TOC is read by the standard library.
func joined(toc []byte, table profile.Table) (*profile.Layer, error) {
	return profile.NewLayer(digest.FromBytes(toc), func(do func(profile.TOCEntry) error) error {
		var all estargz.JTOC
		if err := json.Unmarshal(toc, &all); err != nil {
			return fmt.Errorf("%w: %w", accel.ErrInvalid, err)
		}
		for _, e := range all.Entries {
			if err := do(profile.TOCEntry{Name: e.Name, Type: e.Type, LinkName: e.LinkName, Size: e.Size, Offset: e.Offset, InnerOffset: e.InnerOffset, Digest: digest.Digest(e.Digest)}); err != nil {
				return err
			}
		}
		return nil
	}, table)
}

// digest is the layer's.
func (l *layer) digest() digest.Digest { return digest.FromBytes(l.toc) }

func treeOf(t testing.TB, layers ...*layer) *profile.Tree {
	t.Helper()
	var tocs [][]byte
	for _, l := range layers {
		tocs = append(tocs, l.toc)
	}
	tree, err := profile.NewTree(t.Context(), tocs)
	must(t, err)
	return tree
}
