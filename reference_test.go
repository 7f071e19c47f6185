package accel_test

import (
	"errors"
	"strings"
	"testing"

	"accel"

	"github.com/opencontainers/go-digest"
)

const hex64 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func TestParseReference(t *testing.T) {
	const d = digest.Digest("sha256:" + hex64)
	for in, want := range map[string]accel.Reference{
		"nginx":                             {Registry: "docker.io", Repository: "library/nginx", Tag: "latest"},
		"team/app:v1":                       {Registry: "docker.io", Repository: "team/app", Tag: "v1"},
		"docker.io/nginx:v1":                {Registry: "docker.io", Repository: "library/nginx", Tag: "v1"},
		"index.docker.io/team/app":          {Registry: "docker.io", Repository: "team/app", Tag: "latest"},
		"localhost/app:v1":                  {Registry: "localhost", Repository: "app", Tag: "v1"},
		"localhost:5000/app":                {Registry: "localhost:5000", Repository: "app", Tag: "latest"},
		"127.0.0.1:5000/a/b/c:V_1.-x":       {Registry: "127.0.0.1:5000", Repository: "a/b/c", Tag: "V_1.-x"},
		"[::1]:5000/app:v1":                 {Registry: "[::1]:5000", Repository: "app", Tag: "v1"},
		"host/app:v1":                       {Registry: "docker.io", Repository: "host/app", Tag: "v1"},
		"host:80/app:v1":                    {Registry: "host:80", Repository: "app", Tag: "v1"},
		"r.example/app@" + string(d):        {Registry: "r.example", Repository: "app", Digest: d},
		"r.example/app:v1@" + string(d):     {Registry: "r.example", Repository: "app", Tag: "v1", Digest: d},
		"r.example/a__b/c-d/e.f:" + hex64:   {Registry: "r.example", Repository: "a__b/c-d/e.f", Tag: hex64},
		"r.example/app:sha256-" + hex64:     {Registry: "r.example", Repository: "app", Tag: "sha256-" + hex64},
		"r.example/" + hex64:                {Registry: "r.example", Repository: hex64, Tag: "latest"},
		"r.example/a:" + repeat("t", 128):   {Registry: "r.example", Repository: "a", Tag: repeat("t", 128)},
		"r.example/" + repeat("p", 200):     {Registry: "r.example", Repository: repeat("p", 200), Tag: "latest"},
		"r.example/app@sha512:" + hex64x2(): {Registry: "r.example", Repository: "app", Digest: digest.Digest("sha512:" + hex64x2())},
	} {
		got, err := accel.ParseReference(in)
		if err != nil || got != want {
			t.Errorf("%s: got %+v, %v, want %+v", in, got, err, want)
			continue
		}
		again, err := accel.ParseReference(got.String())
		if err != nil || again != got {
			t.Errorf("%s: written as %s and read back as %+v, %v", in, got, again, err)
		}
	}
}

func TestParseReferenceErrors(t *testing.T) {
	for _, in := range []string{
		"", " ", "/", ":", "@", "App", "r.example/", "r.example/App", "r.example/a b", "r.example//a", "r.example/a/", "r.example/../a",
		"r.example/a:", "r.example/a:-x", "r.example/a:" + repeat("t", 129), "r.example/a@", "r.example/a@sha256:", "r.example/a@sha256:" + hex64[:63],
		"r.example/a@sha256:" + strings.ToUpper(hex64), "r.example/a@md5:d41d8cd98f00b204e9800998ecf8427e", "r.example/a@unknown:" + hex64,
		"https://r.example/a", "user@r.example/a", "r.example:port/a", "r.example/a?x", "r.example/a#x", "r.example/a\x00", "r.example/ä",
		hex64, "r.example/" + repeat("p", 300), repeat("a/", 5000),
	} {
		got, err := accel.ParseReference(in)
		if !errors.Is(err, accel.ErrInvalid) || got != (accel.Reference{}) {
			t.Errorf("%.60q: got %+v, %v, want an ErrInvalid", in, got, err)
		}
		if err != nil && len(err.Error()) > 4096+200 {
			t.Errorf("%.60q: an error of %d bytes", in, len(err.Error()))
		}
	}
}

// Whatever is read can be written and read back, is in its canonical form, and
// cannot smuggle one part into another.
func FuzzParseReference(f *testing.F) {
	for _, seed := range []string{
		"nginx", "docker.io/library/nginx:1", "index.docker.io/a/b", "localhost:5000/team/app:v1", "[::1]:5000/app:v1", "R.example/app",
		"r.example/app@sha256:" + hex64, "r.example/app:v1@sha256:" + hex64, "r.example/app@sha512:" + hex64x2(), "a:b:c", "a@b@c", "//", "ä/b:c", "host/app",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, in string) {
		ref, err := accel.ParseReference(in)
		if err != nil {
			if !errors.Is(err, accel.ErrInvalid) || ref != (accel.Reference{}) {
				t.Fatalf("%q: %+v with error %v", in, ref, err)
			}
			return
		}
		if ref.Registry == "" || ref.Repository == "" || ref.Tag == "" && ref.Digest == "" {
			t.Fatalf("%q: incomplete: %+v", in, ref)
		}
		if strings.ContainsAny(ref.Repository, ":@ \t\n\x00") || strings.ContainsAny(ref.Tag, ":@/ \t\n\x00") || strings.ContainsAny(ref.Registry, "/@ \t\n\x00") {
			t.Fatalf("%q: separators within a part: %+v", in, ref)
		}
		if strings.ToLower(ref.Repository) != ref.Repository || strings.Contains(ref.Repository, "..") {
			t.Fatalf("%q: repository %q", in, ref.Repository)
		}
		if ref.Digest != "" && ref.Digest.Validate() != nil {
			t.Fatalf("%q: digest %q", in, ref.Digest)
		}
		again, err := accel.ParseReference(ref.String())
		if err != nil || again != ref {
			t.Fatalf("%q: %+v is written as %s and read back as %+v, %v", in, ref, ref, again, err)
		}
		if !strings.HasPrefix(ref.String(), ref.Name()) || ref.Name() != ref.Registry+"/"+ref.Repository {
			t.Fatalf("%q: name %q of %s", in, ref.Name(), ref)
		}
	})
}

func repeat(s string, n int) string { return strings.Repeat(s, n) }

func hex64x2() string { return hex64 + hex64 }
