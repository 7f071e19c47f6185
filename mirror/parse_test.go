package mirror

import (
	"errors"
	"net/url"
	"reflect"
	"strings"
	"testing"

	"accel"
	"accel/registry"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

const someDigest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func parser(tb testing.TB, def string) *Mirror {
	tb.Helper()
	client, err := registry.New(registry.Options{Hosts: []registry.Host{
		{Name: "registry.example:5000", Aliases: []string{"localhost:5000"}}, {Name: "docker.io"}, {Name: "other.example"},
	}})
	if err != nil {
		tb.Fatal(err)
	}
	return &Mirror{o: Options{Registry: client, Default: def}}
}

func TestParse(t *testing.T) {
	for _, c := range []struct {
		url, def string
		want     question
	}{
		{url: "/v2/", want: question{kind: ping}},
		{url: "/v2", want: question{kind: ping}},
		{url: "/v2/?ns=docker.io", want: question{kind: ping, host: "docker.io"}},
		{url: "/v2/", def: "other.example", want: question{kind: ping, host: "other.example"}},
		{url: "/v2/team/app/manifests/v1?ns=other.example", want: question{kind: manifest, host: "other.example", path: "team/app", tag: "v1"}},
		{url: "/v2/library/alpine/manifests/3?ns=registry-1.docker.io", want: question{kind: manifest, host: "docker.io", path: "library/alpine", tag: "3"}},
		{url: "/v2/registry.example:5000/app/manifests/" + someDigest, want: question{kind: manifest, host: "registry.example:5000", path: "app", digest: someDigest}},
		{url: "/v2/localhost:5000/app/blobs/" + someDigest, want: question{kind: blob, host: "registry.example:5000", path: "app", digest: someDigest}},
		{url: "/v2/registry.example_5000/app/tags/list", want: question{kind: tags, host: "registry.example:5000", path: "app"}},
		{url: "/v2/localhost_5000/app/tags/list", def: "other.example", want: question{kind: tags, host: "registry.example:5000", path: "app"}},
		{url: "/v2/team_5000/app/tags/list", def: "other.example", want: question{kind: tags, host: "other.example", path: "team_5000/app"}},
		{url: "/v2/app/blobs/" + someDigest, def: "other.example", want: question{kind: blob, host: "other.example", path: "app", digest: someDigest}},
		{url: "/v2/not.listed/app/tags/list", def: "other.example", want: question{kind: tags, host: "other.example", path: "not.listed/app"}},
		{url: "/v2/app/referrers/" + someDigest + "?ns=other.example&artifactType=x", want: question{kind: referrers, host: "other.example", path: "app", digest: someDigest}},
		// Names made of the words of the API.
		{url: "/v2/manifests/blobs/manifests/tags?ns=other.example", want: question{kind: manifest, host: "other.example", path: "manifests/blobs", tag: "tags"}},
		{url: "/v2/a/manifests%2Fb/manifests/v1", want: question{}},
		{url: "/v2/app/blobs/sha256%3Ae3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855?ns=other.example",
			want: question{kind: blob, host: "other.example", path: "app", digest: someDigest}},
	} {
		u, err := url.Parse(c.url)
		if err != nil {
			t.Fatal(err)
		}
		got, err := parser(t, c.def).parse(u)
		if got != c.want || (err == nil) != (c.want != question{}) {
			t.Errorf("%s: %+v, %v, want %+v", c.url, got, err, c.want)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for at, want := range map[string]int{
		"/":                                     404,
		"/v1/search":                            404,
		"/v2/_catalog":                          404,
		"/v2/app/manifests/v1":                  400, // no registry is named
		"/v2/app/manifests/.x?ns=other.example": 404,
		"/v2/app/manifests/" + strings.Repeat("a", 129) + "?ns=other.example":        404,
		"/v2/app/manifests/" + strings.Repeat("a", 2000) + "?ns=other.example":       414,
		"/v2/app/blobs/sha256:123?ns=other.example":                                  400,
		"/v2/app/blobs/md5:d41d8cd98f00b204e9800998ecf8427e?ns=other.example":        400,
		"/v2/app/blobs/sha512:" + strings.Repeat("a", 128) + "?ns=other.example":     400,
		"/v2/app/blobs/sha256:" + strings.Repeat("A", 64) + "?ns=other.example":      400,
		"/v2/app/blobs/../manifests/" + someDigest + "?ns=other.example":             400,
		"/v2/../../etc/passwd/blobs/" + someDigest + "?ns=other.example":             400,
		"/v2/a/../b/blobs/" + someDigest + "?ns=other.example":                       400,
		"/v2/%2e%2e/b/blobs/" + someDigest + "?ns=other.example":                     400,
		"/v2/a%2fb/blobs/" + someDigest + "?ns=other.example":                        400,
		"/v2//app/blobs/" + someDigest + "?ns=other.example":                         400,
		"/v2/App/blobs/" + someDigest + "?ns=other.example":                          400,
		"/v2/a%00b/blobs/" + someDigest + "?ns=other.example":                        400,
		"/v2/a%0d%0ab/blobs/" + someDigest + "?ns=other.example":                     400,
		"/v2/a?b/blobs/" + someDigest + "?ns=other.example":                          404,
		"/v2/blobs/" + someDigest + "?ns=other.example":                              404,
		"/v2/registry.example:5000/blobs/" + someDigest:                              400,
		"/v2/app/blobs/" + someDigest + "?ns=other.example&ns=docker.io":             400,
		"/v2/app/blobs/" + someDigest + "?ns=http://169.254.169.254":                 400,
		"/v2/app/blobs/" + someDigest + "?ns=user@other.example":                     400,
		"/v2/app/blobs/" + someDigest + "?ns=other.example/x":                        400,
		"/v2/app/blobs/" + someDigest + "?ns=":                                       400,
		"/v2/app/blobs/" + someDigest + "?ns=169.254.169.254":                        403,
		"/v2/app/blobs/" + someDigest + "?ns=evil.example":                           403,
		"/v2/evil.example/app/blobs/" + someDigest:                                   403,
		"/v2/app/blobs/" + someDigest + "?ns=%zz":                                    400,
		"/v2/app/blobs/uploads/?ns=other.example":                                    404,
		"/v2/" + strings.Repeat("a/", 200) + "blobs/" + someDigest + "?ns=docker.io": 400,
	} {
		u, err := url.Parse(at)
		if err != nil {
			t.Fatal(err)
		}
		got, err := parser(t, "").parse(u)
		var said *refused
		status := 0
		switch {
		case errors.As(err, &said):
			status = said.status
		case errors.Is(err, accel.ErrRegistryNotAllowed):
			status = 403
		}
		if status != want {
			t.Errorf("%s: %+v, %d %v, want %d", at, got, status, err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"/v2/", "/v2/team/app/manifests/v1", "/v2/registry.example:5000/a/blobs/" + someDigest, "/v2/a/tags/list", "/v2/../a/referrers/" + someDigest, "/v2/a%2fb/manifests/%2e%2e"} {
		f.Add(s, "")
		f.Add(s, "ns=docker.io&n=1")
	}
	m := parser(f, "")
	f.Fuzz(func(t *testing.T, path, query string) {
		u, err := url.Parse("http://mirror" + path)
		if err != nil {
			return
		}
		u.RawQuery = query
		q, err := m.parse(u)
		if err != nil || q.kind == ping {
			return
		}
		// Whatever was asked, what goes upstream is well formed and at an allowed host.
		if _, err := m.o.Registry.Canonical(q.host); err != nil {
			t.Errorf("host %q: %v", q.host, err)
		}
		named, err := reference.WithName(q.host + "/" + q.path)
		if err != nil || strings.Contains(q.path, "..") || strings.ContainsAny(q.path, "%?#:@\\") {
			t.Errorf("repository %q: %v", q.path, err)
		}
		if q.tag != "" {
			if _, err := reference.WithTag(named, q.tag); err != nil {
				t.Errorf("tag %q: %v", q.tag, err)
			}
		} else if q.kind != tags && (q.digest.Validate() != nil || q.digest.Algorithm() != digest.SHA256) {
			t.Errorf("digest %q", q.digest)
		}
	})
}

func TestParseRange(t *testing.T) {
	for header, want := range map[string][]span{
		"bytes=0-9":                    {{0, 10}},
		"bytes=90-":                    {{90, 10}},
		"bytes=-5":                     {{95, 5}},
		"bytes=-500":                   {{0, 100}},
		"bytes=50-5000":                {{50, 50}},
		"bytes=0-0, 99-99":             {{0, 1}, {99, 1}},
		"bytes=0-9,,200-":              {{0, 10}},
		"bytes=0-99":                   {{0, 100}},
		"bytes=0-99,0-99":              nil, // more than the whole: the whole
		"pages=1-2":                    nil,
		"bytes=9-0":                    nil,
		"bytes=+1-2":                   nil,
		"bytes=1":                      nil,
		"bytes=-":                      nil,
		"bytes=":                       nil,
		"bytes=a-b":                    nil,
		"bytes=1-99999999999999999999": nil,
		"bytes=" + strings.Repeat("1-1,", 65) + "1-1": nil,
	} {
		if got, err := parseRange(header, 100); !reflect.DeepEqual(got, want) || err != nil {
			t.Errorf("%q: %v, %v, want %v", header, got, err, want)
		}
	}
	for _, header := range []string{"bytes=100-", "bytes=200-300", "bytes=-0", "bytes=100-,200-"} {
		if got, err := parseRange(header, 100); !errors.Is(err, errUnsatisfiable) {
			t.Errorf("%q: %v, %v", header, got, err)
		}
	}
	if got, err := parseRange("bytes=0-", 0); got != nil || err != nil {
		t.Errorf("of nothing: %v, %v", got, err)
	}
}

func FuzzParseRange(f *testing.F) {
	f.Add("bytes=0-9, -5", int64(100))
	f.Fuzz(func(t *testing.T, header string, size int64) {
		size &= 1<<50 - 1
		spans, err := parseRange(header, size)
		total := int64(0)
		for _, s := range spans {
			if s.offset < 0 || s.lengthBytes <= 0 || s.offset+s.lengthBytes > size {
				t.Errorf("%q of %d: %v", header, size, s)
			}
			total += s.lengthBytes
		}
		if total > size || len(spans) > maxRanges || err != nil && len(spans) > 0 {
			t.Errorf("%q of %d: %v, %v", header, size, spans, err)
		}
	})
}
