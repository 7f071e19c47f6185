package cache

import (
	"bytes"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

func TestNames(t *testing.T) {
	now := time.Now().UTC().Truncate(time.Microsecond)
	clock := func() time.Time { return now.Add(time.Minute) }
	b := start(t, Options{Now: clock})
	repo, other := "registry.example/app", "registry.example/other"
	raw := []byte(`{"schemaVersion":2}`)
	d := digest.FromBytes(raw)
	_, errTag := b.Tag(repo, "v1")
	_, errManifest := b.Manifest(d)
	if !errors.Is(errTag, accel.ErrNotFound) || !errors.Is(errManifest, accel.ErrNotFound) {
		t.Errorf("in an empty store: %v, %v", errTag, errManifest)
	}
	err := errors.Join(
		b.PutManifest(Manifest{Digest: d, MediaType: "application/x", Raw: raw}),
		b.PutTag(repo, "v1", Tag{Digest: d, CheckedAt: now}), b.PutTag(repo, "v2", Tag{Digest: d}),
		b.RemoveTag(repo, "v2"), b.RemoveTag(repo, "v3"),
		b.PutReferrers(repo, d, "", Tag{Digest: d}), b.PutReferrers(repo, d, "t", Tag{Digest: d, CheckedAt: now}),
		b.Link(repo, d), b.Link(repo, d),
		b.Grant(repo, "a", now), b.Grant(repo, "b", now), b.Revoke(repo, "b"),
		b.Pin("x", d), b.Pin("x", d), b.Pin("y", d),
	)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // then from the disk
		if got, err := b.Tag(repo, "v1"); err != nil || got.Digest != d || !got.CheckedAt.Equal(now) {
			t.Errorf("%+v, %v", got, err)
		}
		if _, err := b.Tag(repo, "v2"); !errors.Is(err, accel.ErrNotFound) {
			t.Errorf("a removed tag: %v", err)
		}
		if got, err := b.Referrers(repo, d, "t"); err != nil || got.Digest != d || !got.CheckedAt.Equal(now) {
			t.Errorf("referrers: %+v, %v", got, err)
		}
		for _, name := range []string{"t ", "other"} {
			if _, err := b.Referrers(repo, d, name); !errors.Is(err, accel.ErrNotFound) {
				t.Errorf("referrers of type %q: %v", name, err)
			}
		}
		if _, err := b.Referrers(other, d, "t"); !errors.Is(err, accel.ErrNotFound) {
			t.Errorf("another repository's referrers: %v", err)
		}
		if got, err := b.Manifest(d); err != nil || got.MediaType != "application/x" || !bytes.Equal(got.Raw, raw) {
			t.Errorf("%+v, %v", got, err)
		}
		if !b.Linked(repo, d) || b.Linked(other, d) || b.Linked(repo, digest.FromString("x")) || b.Linked(repo, "nonsense") {
			t.Error("links")
		}
		at, ok := b.Granted(repo, "a")
		_, ok2 := b.Granted(repo, "b")
		_, ok3 := b.Granted(other, "a")
		if !ok || !at.Equal(now) || ok2 || ok3 {
			t.Errorf("grants: %v %v %v %v", at, ok, ok2, ok3)
		}
		if p := b.Pins(); len(p) != 2 || len(p["x"]) != 1 {
			t.Errorf("pins: %v", p)
		}
		dir := b.o.Dir
		b.close()
		b = start(t, Options{Dir: dir, Now: clock})
	}
	if err := b.Remove(d); !errors.Is(err, accel.ErrConflict) {
		t.Errorf("removing a pinned manifest: %v", err)
	}
	if err := errors.Join(b.Unpin("x"), b.Unpin("y"), b.Remove(d)); err != nil {
		t.Error(err)
	}
	for name, err := range map[string]error{
		"other content":   b.PutManifest(Manifest{Digest: d, Raw: []byte("{}")}),
		"malformed":       b.PutManifest(Manifest{Digest: "x", Raw: raw}),
		"malformed tag":   b.PutTag(repo, "v1", Tag{Digest: "sha256:x"}),
		"malformed link":  b.Link(repo, "sha256:../x"),
		"malformed pin":   b.Pin("x", "sha256:x"),
		"pin of nobody":   b.Pin("", d),
		"endless client":  b.Grant(repo, string(make([]byte, 5000)), now),
		"large manifest":  b.PutManifest(Manifest{Digest: d, Raw: make([]byte, maxManifestBytes+1)}),
		"malformed stat":  func() error { _, err := b.Stat("x"); return err }(),
		"malformed other": b.Remove("x"),
	} {
		if !errors.Is(err, accel.ErrInvalid) && !errors.Is(err, ErrDigest) {
			t.Errorf("%s: %v", name, err)
		}
	}
	b.close()
	for name, err := range map[string]error{
		"tag": b.PutTag(repo, "v1", Tag{Digest: d}), "untag": b.RemoveTag(repo, "v1"), "link": b.Link(repo, digest.FromString("new")), "grant": b.Grant(repo, "a", now),
		"manifest": b.PutManifest(Manifest{Digest: d, Raw: raw}), "pin": b.Pin("x", d), "unpin": b.Unpin("x"), "remove": b.Remove(d),
	} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
}

// TestClockJump: a clock that is set back makes answers unknown that are from the future,
// and neither it nor one that is set ahead changes what is evicted.
func TestClockJump(t *testing.T) {
	var nanos atomic.Int64
	real := time.Now()
	nanos.Store(real.UnixNano())
	b := start(t, Options{BudgetBytes: 20 * mib, Now: func() time.Time { return time.Unix(0, nanos.Load()) }})
	repo, d := "registry.example/app", digest.FromString("m")
	if err := errors.Join(b.PutTag(repo, "v1", Tag{Digest: d, CheckedAt: real}), b.Grant(repo, "client", real)); err != nil {
		t.Fatal(err)
	}
	old, hot := content(90, 3*mib), content(91, 3*mib)
	nanos.Store(real.Add(100 * 365 * 24 * time.Hour).UnixNano()) // ahead: old seems used last
	mustGet(t, b.Store, old, 0, -1, from(old))
	nanos.Store(real.Add(-10 * 365 * 24 * time.Hour).UnixNano()) // back
	mustGet(t, b.Store, hot, 0, -1, from(hot))
	mustGet(t, b.Store, hot, 0, -1, nil)
	tag, err := b.Tag(repo, "v1")
	if err != nil || tag.Digest != d || !tag.CheckedAt.IsZero() {
		t.Errorf("a tag from the future: %+v, %v", tag, err)
	}
	if at, ok := b.Granted(repo, "client"); ok {
		t.Errorf("a grant from the future: %v", at)
	}
	for i := range 8 {
		nanos.Add(-int64(time.Hour))
		data := content(1500+i, 3*mib)
		mustGet(t, b.Store, data, 0, -1, from(data))
	}
	if b.has(old) || !b.has(hot) {
		t.Errorf("evicted by the clock: old is there %v, hot %v", b.has(old), b.has(hot))
	}
	nanos.Store(real.Add(time.Second).UnixNano())
	if _, ok := b.Granted(repo, "client"); !ok {
		t.Error("the grant is gone")
	}
}

// TestBounded: what clients and registries make the store remember does not grow without end.
func TestBounded(t *testing.T) {
	b := start(t, Options{})
	const most, manifestSize = 500, 10_000
	b.committing.Lock()
	b.index.kept = map[string]int{tableGrants: most}
	b.committing.Unlock()
	b.mu.Lock()
	b.manifestsMax = 20 * manifestSize
	b.mu.Unlock()
	n := most * 12 / 10
	for i := range n {
		if err := b.Grant("registry.example/app", fmt.Sprint("client", i), time.Now().Add(-time.Hour)); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.commit(); err != nil {
		t.Fatal(err)
	}
	_, first := b.Granted("registry.example/app", "client0")
	_, last := b.Granted("registry.example/app", fmt.Sprint("client", n-1))
	b.committing.Lock()
	count := b.index.counts[tableGrants]
	b.committing.Unlock()
	if first || !last || count > most*11/10 || count < most {
		t.Errorf("%d grants; the first is there: %v, the last: %v", count, first, last)
	}
	pinned := Manifest{Raw: content(92, manifestSize)}
	pinned.Digest = digest.FromBytes(pinned.Raw)
	if err := errors.Join(b.Pin("x", pinned.Digest), b.PutManifest(pinned)); err != nil {
		t.Fatal(err)
	}
	for i := range 50 {
		raw := content(1600+i, manifestSize)
		if err := b.PutManifest(Manifest{Digest: digest.FromBytes(raw), Raw: raw}); err != nil {
			t.Fatal(err)
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.manifests[pinned.Digest]; !ok || b.manifestB > b.manifestsMax || len(b.manifests) != 20 {
		t.Errorf("%d manifests of %d bytes; the pinned one is there: %v", len(b.manifests), b.manifestB, ok)
	}
}
