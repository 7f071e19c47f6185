package lazy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"accel"
	"accel/trust"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// someOrigin is a valid one.
func someOrigin() origin {
	return origin{Repositories: []string{"registry.test/a"}, SizeBytes: 100, TOCDigest: digest.FromString("toc"), TOCOffset: 50, Signed: true}
}

func TestOriginsOfOneLayerAreJoined(t *testing.T) {
	unknown := someOrigin()
	unknown.Repositories, unknown.TOCOffset, unknown.Signed = []string{"registry.test/b"}, -1, false
	unknown.Claims = []claim{{DiffID: digest.FromString("d"), Chain: digest.FromString("c")}}
	both, err := someOrigin().join(unknown)
	must(t, err)
	if both.TOCOffset != 50 || !both.Signed || len(both.Claims) != 1 || len(both.Repositories) != 2 || both.host() != "registry.test" || both.Repositories[0] != "registry.test/a" {
		t.Errorf("joined: %+v", both)
	}
	if other, err := unknown.join(someOrigin()); err != nil || other.Repositories[0] != "registry.test/a" {
		t.Errorf("joined the other way round: %+v, %v; want where the mapping says first", other, err)
	}
	many := unknown
	for i := range 3 * maxRepositories {
		other := unknown
		other.Repositories = []string{fmt.Sprint("registry.test/", i)}
		many, err = many.join(other)
		must(t, err)
	}
	if r := many.Repositories; len(r) != maxRepositories || r[len(r)-1] != "registry.test/b" || r[0] != fmt.Sprint("registry.test/", 3*maxRepositories-1) {
		t.Errorf("of many repositories these are left: %s", r)
	}
	again, err := both.join(unknown)
	must(t, err)
	if !again.equal(both) {
		t.Errorf("said again, it is %+v", again)
	}
	for name, change := range map[string]func(*origin){
		"size": func(o *origin) { o.SizeBytes++ }, "TOC": func(o *origin) { o.TOCDigest = digest.FromString("x") }, "place": func(o *origin) { o.TOCOffset++ },
	} {
		other := someOrigin()
		change(&other)
		if _, err := both.join(other); !errors.Is(err, accel.ErrConflict) {
			t.Errorf("another %s: %v, want a conflict", name, err)
		}
	}
	checked := someOrigin()
	checked.DiffID = unknown.Claims[0].DiffID
	if settled, err := checked.join(unknown); err != nil || len(settled.Claims) > 0 {
		t.Errorf("a claim that is known to be true is kept: %+v, %v", settled, err)
	}
	for i := range maxClaims + 1 {
		c := someOrigin()
		c.Claims = []claim{{DiffID: digest.FromBytes([]byte{byte(i), byte(i >> 8)})}}
		if both, err = both.join(c); err != nil {
			break
		}
	}
	if !errors.Is(err, accel.ErrConflict) {
		t.Errorf("claims without end: %v", err)
	}
}

func TestOriginsOnDisk(t *testing.T) {
	o := origins{t.TempDir()}
	d, gone := digest.FromString("layer"), digest.FromString("gone")
	if _, err := o.get(d); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("of an unknown layer: %v", err)
	}
	for _, d := range []digest.Digest{d, gone} {
		must(t, o.put(d, someOrigin()))
	}
	got, err := o.get(d)
	must(t, err)
	if !got.equal(someOrigin()) {
		t.Errorf("kept %+v", got)
	}
	must(t, os.WriteFile(filepath.Join(o.dir, ".leftover.123"), nil, 0o600))
	must(t, o.sweep(func(x digest.Digest) bool { return x == d }))
	if list, err := os.ReadDir(o.dir); err != nil || len(list) != 1 {
		t.Errorf("after a sweep: %v, %v", list, err)
	}
	must(t, os.WriteFile(o.path(d), []byte(`{"sizeBytes":`), 0o600))
	if _, err := o.get(d); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("of a damaged file: %v", err)
	}
}

func TestKeys(t *testing.T) {
	ours, err := trust.CreateKeyring(t.TempDir())
	must(t, err)
	servers, err := trust.CreateKeyring(t.TempDir())
	must(t, err)
	strangers, err := trust.CreateKeyring(t.TempDir())
	must(t, err)
	file := filepath.Join(t.TempDir(), "keys.pem")
	must(t, os.WriteFile(file, ours.Export(), 0o600))
	dir, asked, away := t.TempDir(), 0, true
	ask := func(context.Context) ([]byte, error) {
		asked++
		if away {
			return nil, errors.New("away")
		}
		return servers.Export(), nil
	}
	m := accel.Mapping{
		SourceRepository: "registry.test/a", SourceManifest: digest.FromString("s"), Platform: "linux/amd64",
		TargetRepository: "registry.test/a", TargetManifest: digest.FromString("t"), Params: "p",
	}
	signed := func(k *trust.Keyring) []byte {
		envelope, err := k.Sign(t.Context(), m)
		must(t, err)
		return envelope
	}
	keys, err := OpenKeys(file, dir, ask)
	must(t, err)
	if _, err := keys.Verify(t.Context(), signed(ours)); err != nil || asked != 0 {
		t.Errorf("by a key of the file: %v, asked %d times", err, asked)
	}
	if _, err := keys.Verify(t.Context(), signed(servers)); !errors.Is(err, accel.ErrUnauthenticated) {
		t.Errorf("by the server's key, with the server away: %v", err)
	}
	away = false
	if _, err := keys.Verify(t.Context(), signed(servers)); !errors.Is(err, accel.ErrUnauthenticated) || asked != 1 {
		t.Errorf("just after a failure: %v, asked %d times", err, asked)
	}
	keys.again = time.Time{} // a second later
	if _, err := keys.Verify(t.Context(), signed(servers)); err != nil {
		t.Errorf("by the server's key: %v", err)
	}
	before := asked
	for range 3 {
		if _, err := keys.Verify(t.Context(), signed(strangers)); !errors.Is(err, accel.ErrUnauthenticated) {
			t.Errorf("by a stranger's key: %v", err)
		}
	}
	if asked != before {
		t.Errorf("a stranger's envelopes had the server asked %d times", asked-before)
	}
	away = true // what it said is on disk
	if keys, err = OpenKeys("", dir, ask); err != nil {
		t.Fatal(err)
	}
	if _, err := keys.Verify(t.Context(), signed(servers)); err != nil {
		t.Errorf("after a start without the server: %v", err)
	}
	must(t, os.WriteFile(file, []byte("no keys"), 0o600))
	if _, err := OpenKeys(file, dir, nil); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("a file without keys: %v", err)
	}
}

// stargz is a layer as the stock library makes it, with the digest of its TOC.
func stargz(t testing.TB) ([]byte, digest.Digest) {
	t.Helper()
	raw := bytes.NewReader(make([]byte, 1024)) // an empty tar
	blob, err := estargz.Build(io.NewSectionReader(raw, 0, raw.Size()))
	must(t, err)
	packed, err := io.ReadAll(blob)
	must(t, errors.Join(err, blob.Close()))
	return packed, blob.TOCDigest()
}

func TestTOC(t *testing.T) {
	packed, want := stargz(t)
	at, err := tocOffset(packed, int64(len(packed)))
	must(t, err)
	json, err := unpackTOC(packed[at:], nil)
	must(t, err)
	if digest.FromBytes(json) != want {
		t.Errorf("the TOC is %s", json)
	}
	for name, end := range map[string][]byte{"nothing": nil, "short": packed[len(packed)-10:], "another file": bytes.Repeat([]byte("x"), 100)} {
		if _, err := tocOffset(end, int64(len(packed))); !errors.Is(err, errTOC) {
			t.Errorf("footer of %s: %v", name, err)
		}
		if _, err := unpackTOC(end, nil); !errors.Is(err, errTOC) {
			t.Errorf("TOC of %s: %v", name, err)
		}
	}
}

func FuzzTOC(f *testing.F) {
	packed, _ := stargz(f)
	f.Add(packed)
	f.Add(packed[len(packed)-estargz.FooterSize:])
	f.Fuzz(func(t *testing.T, b []byte) {
		at, err := tocOffset(b, int64(len(b)))
		if err == nil && (at < 0 || at >= int64(len(b))) {
			t.Fatalf("a TOC at %d of %d bytes", at, len(b))
		}
		if json, err := unpackTOC(b[max(0, min(at, int64(len(b)))):], nil); err == nil && len(json) == 0 {
			t.Fatal("an empty TOC")
		}
	})
}
