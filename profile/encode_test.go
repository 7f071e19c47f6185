package profile_test

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/profile"

	"github.com/opencontainers/go-digest"
)

func TestEncode(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for n := range 50 {
		p := accel.Profile{Manifest: imageA, Origin: accel.ProfileRecorded, Starts: 3, RecordedAt: dayOne, Items: randomStart(r)}
		b, err := profile.Encode(p)
		must(t, err)
		back, err := profile.Decode(b)
		must(t, err)
		if !reflect.DeepEqual(back, p) {
			t.Fatalf("%d: not what was encoded", n)
		}
		again := p
		again.RecordedAt = p.RecordedAt.In(time.FixedZone("", 3600))
		if profile.Version(again) != digest.FromBytes(b) {
			t.Error("an equal profile has another version")
		}
		again.Items = append([]accel.ProfileItem(nil), p.Items...)
		again.Items[0], again.Items[1] = again.Items[1], again.Items[0]
		if v := profile.Version(again); v == "" || v == digest.FromBytes(b) {
			t.Errorf("another order has version %q", v)
		}
	}
	p := accel.Profile{Manifest: imageA, Origin: accel.ProfileListed, Items: items(t, "0:a/ü:0:1", "0:a/û:0:1", "3:a<b>&c:5:7", "0:a/\u2028:1:1")}
	b, err := profile.Encode(p)
	must(t, err)
	if back, err := profile.Decode(b); err != nil || !reflect.DeepEqual(back, p) {
		t.Errorf("odd names: %v, %v", back, err)
	}
}

// The bound of a start of 2,000 items, each of another file.
func TestEncodeSize(t *testing.T) {
	p := accel.Profile{Manifest: imageA, Origin: accel.ProfilePredicted}
	for n := range 2000 {
		name := fmt.Sprintf("usr/lib/python3/dist-packages/package%d/sub%d/__pycache__/module_%d.cpython-311.pyc", n%23, n%7, n)
		p.Items = append(p.Items, accel.ProfileItem{Layer: 1, Path: name, Bytes: int64(1000 + n*37%90000), Content: accel.ContentIDOf(digest.FromString(name))})
	}
	b, err := profile.Encode(p)
	must(t, err)
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	_, err = w.Write(b)
	must(t, err)
	must(t, w.Close())
	t.Logf("2,000 items: %d bytes, %d gzipped", len(b), z.Len())
	if z.Len() > 100_000 || len(b) > 130_000 {
		t.Errorf("2,000 items take %d bytes, %d gzipped", len(b), z.Len())
	}
}

func TestEncodeRefuses(t *testing.T) {
	good := accel.Profile{Manifest: imageA, Origin: accel.ProfileListed, Items: items(t, "0:a:0:10")}
	for name, change := range map[string]func(*accel.Profile){
		"no manifest":         func(p *accel.Profile) { p.Manifest = "" },
		"no digest":           func(p *accel.Profile) { p.Manifest = "sha256:12" },
		"origin":              func(p *accel.Profile) { p.Origin = "guessed" },
		"listed starts":       func(p *accel.Profile) { p.Starts = 1 },
		"negative starts":     func(p *accel.Profile) { p.Origin, p.Starts = accel.ProfileRecorded, -1 },
		"time without starts": func(p *accel.Profile) { p.RecordedAt = dayOne },
		"nanoseconds": func(p *accel.Profile) {
			p.Origin, p.Starts, p.RecordedAt = accel.ProfileRecorded, 1, dayOne.Add(1)
		},
		"absolute":        func(p *accel.Profile) { p.Items[0].Path = "/a" },
		"empty":           func(p *accel.Profile) { p.Items[0].Path = "" },
		"above the root":  func(p *accel.Profile) { p.Items[0].Path = "../a" },
		"not clean":       func(p *accel.Profile) { p.Items[0].Path = "a/./b" },
		"not UTF-8":       func(p *accel.Profile) { p.Items[0].Path = "a\xff" },
		"zero byte":       func(p *accel.Profile) { p.Items[0].Path = "a\x00" },
		"long":            func(p *accel.Profile) { p.Items[0].Path = strings.Repeat("a", 4097) },
		"negative layer":  func(p *accel.Profile) { p.Items[0].Layer = -1 },
		"layer":           func(p *accel.Profile) { p.Items[0].Layer = 512 },
		"negative offset": func(p *accel.Profile) { p.Items[0].Offset = -1 },
		"no bytes":        func(p *accel.Profile) { p.Items[0].Bytes = 0 },
		"overflow":        func(p *accel.Profile) { p.Items[0].Offset, p.Items[0].Bytes = 1<<40, 1<<62 },
		"twice":           func(p *accel.Profile) { p.Items = append(p.Items, item(t, "0:a:9:1")) },
		"items": func(p *accel.Profile) {
			p.Items = make([]accel.ProfileItem, profile.MaxItems+1)
		},
	} {
		p := good
		p.Items = append([]accel.ProfileItem(nil), good.Items...)
		change(&p)
		if _, err := profile.Encode(p); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
		if v := profile.Version(p); v != "" {
			t.Errorf("%s: version %s", name, v)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	b, err := profile.Encode(accel.Profile{Manifest: imageA, Origin: accel.ProfileListed, Items: items(t, "0:a:0:10", "0:ab:0:5")})
	must(t, err)
	good := string(b)
	head, _, _ := strings.Cut(good, `"layers"`)
	for name, bad := range map[string]string{
		"nothing":       "",
		"cut off":       good[:len(good)-1],
		"more behind":   good + "{}",
		"white space":   good + "\n",
		"unknown field": strings.Replace(good, `"v":1`, `"v":1,"x":2`, 1),
		"version":       strings.Replace(good, `"v":1`, `"v":2`, 1),
		"file":          strings.Replace(good, `"items":[0,`, `"items":[2,`, 1),
		"negative file": strings.Replace(good, `"items":[0,`, `"items":[-1,`, 1),
		"two numbers":   strings.Replace(good, `"items":[0,`, `"items":[`, 1),
		"keep":          strings.Replace(good, `"keep":[0,1]`, `"keep":[0,2]`, 1),
		"negative keep": strings.Replace(good, `"keep":[0,1]`, `"keep":[0,-1]`, 1),
		"less keep":     strings.Replace(strings.Replace(good, `"keep":[0,1]`, `"keep":[0,0]`, 1), `"b"`, `"ab"`, 1),
		"keep's count":  strings.Replace(good, `"keep":[0,1]`, `"keep":[0]`, 1),
		"content":       strings.Replace(good, `"content":"`, `"content":"AAAA`, 1),
		"base64":        strings.Replace(good, `"content":"`, `"content":"?`, 1),
		"no layers":     head + `"layers":null,"items":[]}`,
		"too large":     good + strings.Repeat(" ", profile.MaxEncodedBytes),
	} {
		if bad == good {
			t.Fatalf("%s: changed nothing in %s", name, good)
		}
		if p, err := profile.Decode([]byte(bad)); !errors.Is(err, accel.ErrInvalid) || p.Manifest != "" {
			t.Errorf("%s: %v, %v", name, p, err)
		}
	}
}

// The plain JSON, which people read, keeps all too.
func TestProfileJSON(t *testing.T) {
	p := accel.Profile{Manifest: imageA, Origin: accel.ProfileRecorded, Starts: 1, RecordedAt: dayOne, Items: items(t, "0:a:0:10", "1:b:3:4")}
	p.Items[0].Content = accel.ContentIDOf(digest.FromString("x"))
	b, err := json.Marshal(p)
	must(t, err)
	var back accel.Profile
	must(t, json.Unmarshal(b, &back))
	if !reflect.DeepEqual(p, back) || p.Bytes() != 14 {
		t.Errorf("%s: %v, %d bytes", b, back, p.Bytes())
	}
	if strings.Count(string(b), "content") != 1 {
		t.Errorf("unknown content is written: %s", b)
	}
	var id accel.ContentID
	for _, bad := range []string{"", "12", strings.Repeat("x", 24)} {
		if err := id.UnmarshalText([]byte(bad)); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	for _, bad := range []digest.Digest{"", "sha256:1", "sha512:" + digest.Digest(strings.Repeat("a", 128))} {
		if !accel.ContentIDOf(bad).IsZero() {
			t.Errorf("%q has a content id", bad)
		}
	}
}

func FuzzDecode(f *testing.F) {
	b, err := profile.Encode(accel.Profile{Manifest: imageA, Origin: accel.ProfileRecorded, Starts: 2, RecordedAt: dayOne, Items: items(f, "0:a:0:10", "0:ab:0:5", "2:ü/é:4096:1", "2:ü/è:0:1", "0:a:11:1")})
	must(f, err)
	f.Add(b)
	b, err = profile.Encode(accel.Profile{Manifest: imageA, Origin: accel.ProfileListed})
	must(f, err)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := profile.Decode(b)
		if err != nil {
			if !errors.Is(err, accel.ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		again, err := profile.Encode(p)
		if err != nil || !bytes.Equal(b, again) {
			t.Fatalf("decoded %q, encoded %q, %v", b, again, err)
		}
	})
}

func FuzzDecodeReport(f *testing.F) {
	b, err := profile.EncodeReport(report(7, "node-1", items(f, "0:a:0:10", "0:ab:0:5")))
	must(f, err)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := profile.DecodeReport(b)
		if err != nil {
			if !errors.Is(err, accel.ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		s := profile.NewSummary(r.Manifest)
		if _, err := s.Add(r); err != nil {
			t.Fatal(err)
		}
		if _, err := profile.Encode(s.Profile(0)); err != nil {
			t.Fatal(err)
		}
	})
}
