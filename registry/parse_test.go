package registry

import (
	"net/http"
	"reflect"
	"strings"
	"testing"
)

func TestParseChallenge(t *testing.T) {
	for header, want := range map[string]map[string]string{
		`Bearer realm="https://auth.example/token",service="registry",scope="repository:a/b:pull,push"`: {
			"realm": "https://auth.example/token", "service": "registry", "scope": "repository:a/b:pull,push"},
		`Bearer realm = "x" , Service=y`: {"realm": "x", "service": "y"},
		`Basic realm="a \"quoted\" one"`: {"realm": `a "quoted" one`},
		`Basic`:                          {},
		`Bearer realm="unfinished`:       {"realm": "unfinished"},
	} {
		if got := parseChallenge(header); !reflect.DeepEqual(got.Parameters, want) {
			t.Errorf("%s: %q, want %q", header, got.Parameters, want)
		}
	}
}

func TestCovers(t *testing.T) {
	for _, c := range []struct {
		scope, wanted string
		want          bool
	}{
		{"repository:a:pull,push", "repository:a:pull", true},
		{"repository:a:pull,push", "repository:a:push,pull", true},
		{"repository:a:pull", "repository:a:pull,push", false},
		{"repository:a:pull", "repository:b:pull", false},
		{"repository:host:5000/a:pull", "repository:host:5000/a:pull", true},
		{"registry:catalog:*", "registry:catalog:*", true},
		{"", "", false},
	} {
		if got := covers(c.scope, c.wanted); got != c.want {
			t.Errorf("covers(%q, %q) = %v", c.scope, c.wanted, got)
		}
	}
}

// FuzzHeaders holds that what a registry says in headers neither panics nor
// leads elsewhere.
func FuzzHeaders(f *testing.F) {
	f.Add(`Bearer realm="x",scope="repository:a:pull"`, `</v2/a/tags/list?last=x>; rel="next"`, "120")
	f.Add(`="=",,`, `<http://evil.example/>;rel=next`, "Fri, 31 Dec 2027 23:59:59 GMT")
	f.Add("", `<x:0>; rel="next"`, "-1")
	f.Fuzz(func(t *testing.T, challenge, link, after string) {
		parseChallenge(challenge)
		r := repo{host: &host{name: "registry.example", wire: "registry.example", scheme: "https"}, path: "a"}
		at := r.url("tags/list")
		next, err := nextPage(r, at, http.Header{"Link": {link}})
		if err == nil && next != "" && !strings.HasPrefix(next, "https://registry.example/") && next != "https://registry.example" && !strings.HasPrefix(next, "https://registry.example?") {
			t.Errorf("the next page is at %q", next)
		}
		if d := retryAfter(http.Header{"Retry-After": {after}}); d < 0 || d > maxRetryAfter {
			t.Errorf("Retry-After %q is %v", after, d)
		}
	})
}

func TestContentRange(t *testing.T) {
	for header, want := range map[string][3]int64{
		"bytes 0-9/10":   {0, 9, 10},
		"bytes 5-9/*":    {5, 9, -1},
		"bytes 5-9":      {},
		"bytes -5-9/10":  {},
		"bytes 0-9/5":    {},
		"bytes 0-9/x":    {},
		"bytes */10":     {},
		"pages 0-9/10":   {},
		"":               {},
		"bytes 0-9/10 x": {0, 9, 10},
	} {
		start, end, total, ok := contentRange(header)
		if ok != (want != [3]int64{}) || ok && want != [3]int64{start, end, total} {
			t.Errorf("%q: %d %d %d %v", header, start, end, total, ok)
		}
	}
}

func FuzzContentRange(f *testing.F) {
	f.Add("bytes 0-9/10")
	f.Add("bytes 9-0/*")
	f.Fuzz(func(t *testing.T, header string) {
		if start, end, total, ok := contentRange(header); ok && (start < 0 || total >= 0 && total <= end) {
			t.Errorf("%q: %d %d %d", header, start, end, total)
		}
	})
}

func FuzzParseChallenge(f *testing.F) {
	f.Add(`Bearer realm="https://auth.example/token",service="registry"`)
	f.Fuzz(func(t *testing.T, header string) { parseChallenge(header) })
}
