package webhook_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"

	"accel"
	"accel/webhook"
)

func TestFixturesDecode(t *testing.T) {
	for i, f := range fixtures {
		t.Run(fmt.Sprintf("%d %s", i, f.file), func(t *testing.T) {
			c := configOf(f.kind)
			if f.host != "" {
				c.Registry = f.host
			}
			got, err := newSource(t, c).Decode(f.header, f.body(t))
			if err != nil {
				t.Fatal(err)
			}
			want := slices.Clone(f.want)
			for i := range want {
				want[i].Source = "my-" + string(f.kind)
			}
			if !slices.Equal(got.Events, want) {
				t.Errorf("events:\n got %+v\nwant %+v", got.Events, want)
			}
			if len(got.Ignored) != f.ignored {
				t.Errorf("ignored %q, want %d reasons", got.Ignored, f.ignored)
			}
		})
	}
}

// Every file of testdata is in the table, and every kind has one.
func TestFixturesAreComplete(t *testing.T) {
	entries, err := os.ReadDir("testdata")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".json") && !slices.ContainsFunc(fixtures, func(f fixture) bool { return f.file == e.Name() }) {
			t.Errorf("testdata/%s is in no test", e.Name())
		}
	}
	for _, k := range webhook.Kinds {
		if !slices.ContainsFunc(fixtures, func(f fixture) bool { return f.kind == k && len(f.want) > 0 }) {
			t.Errorf("no push fixture for kind %s", k)
		}
	}
}

// edit is a fixture's body with the value at a path replaced; nil removes it.
func edit(t *testing.T, file string, value any, path ...string) []byte {
	t.Helper()
	var root any
	if err := json.Unmarshal(fixture{file: file}.body(t), &root); err != nil {
		t.Fatal(err)
	}
	at := root
	for i, key := range path {
		if list, ok := at.([]any); ok {
			at = list[0]
		}
		object, ok := at.(map[string]any)
		if !ok {
			t.Fatalf("%s: no object at %v", file, path[:i])
		}
		switch {
		case i < len(path)-1:
			at = object[key]
		case value == nil:
			delete(object, key)
		default:
			object[key] = value
		}
	}
	body, err := json.Marshal(root)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

func TestMalformed(t *testing.T) {
	tests := []struct {
		kind   webhook.Kind
		file   string
		header http.Header
		path   string // of the value to replace
		value  any
		field  string // that the error names
	}{
		{webhook.Distribution, "distribution.json", nil, "events", nil, "events: missing"},
		{webhook.Distribution, "distribution.json", nil, "events", "x", "events"},
		{webhook.Distribution, "distribution.json", nil, "events action", nil, "events[0].action"},
		{webhook.Distribution, "distribution.json", nil, "events target repository", nil, "events[0].target.repository"},
		{webhook.Distribution, "distribution.json", nil, "events target repository", "Team/App", "events[0].target.repository"},
		{webhook.Distribution, "distribution.json", nil, "events target repository", "team/app:v9", "events[0].target.repository"},
		{webhook.Distribution, "distribution.json", nil, "events target repository", "team/app@" + dig("x").String(), "events[0].target.repository"},
		{webhook.Distribution, "distribution.json", nil, "events target repository", "../../etc", "events[0].target.repository"},
		{webhook.Distribution, "distribution.json", nil, "events target repository", strings.Repeat("a/", 2000) + "a", "events[0].target.repository"},
		{webhook.Distribution, "distribution.json", nil, "events target tag", "no tag", "events[0].target.tag"},
		{webhook.Distribution, "distribution.json", nil, "events target tag", "v1@" + dig("x").String(), "events[0].target.tag"},
		{webhook.Distribution, "distribution.json", nil, "events target tag", dig("other").String(), "events[0].target.tag"},
		{webhook.Distribution, "distribution.json", nil, "events target tag", strings.Repeat("v", 129), "events[0].target.tag"},
		{webhook.Distribution, "distribution.json", nil, "events target tag", 7, "tag"},
		{webhook.Distribution, "distribution.json", nil, "events target digest", "sha256:abc", "events[0].target.digest"},
		{webhook.Distribution, "distribution.json", nil, "events target digest", "md5:d41d8cd98f00b204e9800998ecf8427e", "events[0].target.digest"},
		{webhook.Distribution, "distribution.json", nil, "events request host", "registry", "events[0].request.host"},
		{webhook.Distribution, "distribution.json", nil, "events request host", "evil.example/x", "events[0].request.host"},
		{webhook.Distribution, "distribution.json", nil, "events request host", "user@evil.example", "events[0].request.host"},
		{webhook.Harbor, "harbor.json", nil, "type", nil, "type"},
		{webhook.Harbor, "harbor.json", nil, "event_data", nil, "event_data"},
		{webhook.Harbor, "harbor.json", nil, "event_data resources", []any{}, "event_data.resources"},
		{webhook.Harbor, "harbor.json", nil, "event_data resources resource_url", nil, "event_data.resources[0].resource_url"},
		{webhook.Harbor, "harbor.json", nil, "event_data resources digest", "x", "event_data.resources[0].digest"},
		{webhook.Harbor, "harbor.json", nil, "event_data repository", nil, "event_data.repository.repo_full_name"},
		{webhook.Harbor, "harbor_cloudevents.json", cloudEvents, "data", nil, "data"},
		{webhook.Harbor, "harbor_cloudevents.json", cloudEvents, "id", nil, "CloudEvent"},
		{webhook.Harbor, "harbor_cloudevents.json", cloudEvents, "specversion", "9.9", "CloudEvent"},
		{webhook.DockerHub, "dockerhub.json", nil, "push_data", nil, "push_data"},
		{webhook.DockerHub, "dockerhub.json", nil, "push_data tag", nil, "push_data.tag"},
		{webhook.DockerHub, "dockerhub.json", nil, "repository", nil, "repository.repo_name"},
		{webhook.Quay, "quay.json", nil, "updated_tags", "v1", "updated_tags"},
		{webhook.Quay, "quay.json", nil, "updated_tags", []any{"not a tag"}, "updated_tags[0]"},
		{webhook.Quay, "quay_nohost.json", nil, "homepage", "", "docker_url"},
		{webhook.Quay, "quay_nohost.json", nil, "repository", 1, "repository"},
		{webhook.GitHub, "github_package.json", headers(), "action", "published", "X-GitHub-Event"},
		{webhook.GitHub, "github_package.json", ghPackage, "action", nil, "action"},
		{webhook.GitHub, "github_package.json", ghPackage, "package", nil, "package"},
		{webhook.GitHub, "github_package.json", ghPackage, "package package_type", nil, "package.package_type"},
		{webhook.GitHub, "github_package.json", ghPackage, "package package_version", nil, "package.package_version"},
		{webhook.GitHub, "github_package.json", ghPackage, "package package_version package_url", "", "package_version.package_url"},
		{webhook.GitHub, "github_package.json", ghPackage, "package package_version package_url", "ghcr.io/-/x", "package_version.package_url"},
		{webhook.Azure, "azure.json", nil, "action", nil, "action"},
		{webhook.Azure, "azure.json", nil, "request", nil, "request.host"},
		{webhook.Azure, "azure.json", nil, "target", nil, "target.repository"},
		{webhook.ECR, "ecr.json", nil, "source", nil, "source"},
		{webhook.ECR, "ecr.json", nil, "account", "12", "account"},
		{webhook.ECR, "ecr.json", nil, "region", "evil.example/", "region"},
		{webhook.ECR, "ecr.json", nil, "detail action-type", nil, "detail.action-type"},
		{webhook.ECR, "ecr.json", nil, "detail repository-name", nil, "detail.repository-name"},
		{webhook.ECR, "ecr_china_untagged.json", nil, "detail image-digest", nil, "detail.image-digest"},
		{webhook.GAR, "gar.json", nil, "message", map[string]any{}, "message.data"},
		{webhook.GAR, "gar.json", nil, "message data", "!", "base64"},
		{webhook.GAR, "gar.json", nil, "message data", "e30=", "message.data.action"},
		{webhook.GAR, "gar_unwrapped.json", nil, "action", nil, "action"},
		{webhook.GAR, "gar_unwrapped.json", nil, "digest", "x y", "digest"},
		{webhook.GAR, "gar_unwrapped.json", nil, "digest", "a.example/b:c", "digest"},
		{webhook.GAR, "gar_unwrapped.json", nil, "tag", "a.example/b:c", "tag"},
		{webhook.Aliyun, "aliyun.json", nil, "push_data", nil, "push_data"},
		{webhook.Aliyun, "aliyun.json", nil, "repository", nil, "repository.repo_full_name"},
		{webhook.Artifactory, "artifactory.json", nil, "domain", nil, "domain"},
		{webhook.Artifactory, "artifactory.json", nil, "data repo_key", nil, "data.repo_key"},
		{webhook.Artifactory, "artifactory.json", nil, "data repo_key", "a/../b", "data.image_name"},
		{webhook.Artifactory, "artifactory.json", nil, "data sha256", "sample_checksum", "data.sha256"},
		{webhook.Artifactory, "artifactory.json", nil, "jpd_origin", nil, "jpd_origin"},
		{webhook.Zot, "zot_structured.json", cloudEvents, "data name", nil, "data.name"},
		{webhook.Zot, "zot_structured.json", cloudEvents, "data digest", "x", "data.digest"},
		{webhook.Zot, "zot_structured.json", cloudEvents, "type", nil, "CloudEvent"},
		{webhook.Zot, "zot_binary.json", headers("Content-Type", "application/json"), "name", "x", "CloudEvent"},
		{webhook.Zot, "zot_binary.json", headers("Ce-Specversion", "1.0", "Ce-", "panic", "Ce-Odd-Name", "x"), "name", "x", "CloudEvent"},
		{webhook.Generic, "generic_tag.json", nil, "image", nil, "image"},
		{webhook.Generic, "generic_tag.json", nil, "image", "a b", "image"},
		{webhook.Generic, "generic_tag.json", nil, "image", []any{}, "image"},
	}
	for _, test := range tests {
		t.Run(fmt.Sprintf("%s %s=%.20v", test.file, test.path, test.value), func(t *testing.T) {
			body := edit(t, test.file, test.value, strings.Fields(test.path)...)
			got, err := newSource(t, configOf(test.kind)).Decode(test.header, body)
			if !errors.Is(err, accel.ErrInvalid) {
				t.Fatalf("got %+v and error %v, want an ErrInvalid", got, err)
			}
			if !strings.Contains(err.Error(), test.field) || !strings.Contains(err.Error(), "my-"+string(test.kind)) {
				t.Errorf("error %q names neither %q nor the source", err, test.field)
			}
			if len(err.Error()) > 2000 {
				t.Errorf("error of %d bytes", len(err.Error()))
			}
		})
	}
}

func TestNotJSON(t *testing.T) {
	for _, k := range webhook.Kinds {
		for _, body := range []string{"", "{", "[]", `"x"`, "null", "0", "{}", `{"events":[{}]}`, "\xff", strings.Repeat("[", 100000), strings.Repeat(" ", int(webhook.MaxBodyBytes)+1)} {
			header := headers("X-GitHub-Event", "package")
			got, err := newSource(t, configOf(k)).Decode(header, []byte(body))
			if !errors.Is(err, accel.ErrInvalid) {
				t.Errorf("%s: %.20q: got %+v and error %v, want an ErrInvalid", k, body, got, err)
			}
		}
	}
}

// One malformed event does not take its neighbours with it: the sender would
// repeat the batch for ever.
func TestMalformedAmongGood(t *testing.T) {
	one := `{"action":"push","target":{"mediaType":"` + ociManifest + `","digest":"` + dig("app").String() + `","repository":%q,"tag":"v1"},"request":{"host":"r.example"}}`
	body := fmt.Sprintf(`{"events":[`+one+","+one+`]}`, "BAD", "team/app")
	got, err := newSource(t, configOf(webhook.Distribution)).Decode(nil, []byte(body))
	if err != nil || len(got.Events) != 1 || len(got.Ignored) != 1 || !strings.Contains(got.Ignored[0], "events[0].target.repository") {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestBatchLimit(t *testing.T) {
	event := `{"action":"push","target":{"mediaType":"` + ociManifest + `","digest":"` + dig("app").String() + `","repository":"team/app"},"request":{"host":"r.example"}}`
	distribution := func(n int) []byte {
		return []byte(`{"events":[` + strings.TrimSuffix(strings.Repeat(event+",", n), ",") + `]}`)
	}
	resource := `{"tag":"v1","digest":"` + dig("app").String() + `","resource_url":"h.example/a/b:v1"}`
	harbor := func(n int) []byte {
		return []byte(`{"type":"PUSH_ARTIFACT","event_data":{"repository":{"repo_full_name":"a/b"},"resources":[` + strings.TrimSuffix(strings.Repeat(resource+",", n), ",") + `]}}`)
	}
	quay := func(n int) []byte {
		tags := make([]string, n)
		for i := range tags {
			tags[i] = fmt.Sprintf("v%d", i)
		}
		list, _ := json.Marshal(tags)
		return []byte(`{"repository":"a/b","docker_url":"q.example/a/b","updated_tags":` + string(list) + `}`)
	}
	for kind, body := range map[webhook.Kind]func(int) []byte{webhook.Distribution: distribution, webhook.Harbor: harbor, webhook.Quay: quay} {
		s := newSource(t, configOf(kind))
		if got, err := s.Decode(nil, body(webhook.MaxEvents)); err != nil || len(got.Events) != webhook.MaxEvents {
			t.Errorf("%s: %d events, %v", kind, len(got.Events), err)
		}
		if _, err := s.Decode(nil, body(webhook.MaxEvents+1)); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%s: one more: %v, want an ErrInvalid", kind, err)
		}
	}
}

// Tags that attach something to a digest are no images, for any registry.
func TestFallbackTagsIgnored(t *testing.T) {
	s := newSource(t, configOf(webhook.Generic))
	hex := dig("app").Encoded()
	for tag, ignored := range map[string]bool{
		"sha256-" + hex:           true, // referrers
		"sha256-" + hex + ".sig":  true, // cosign
		"sha256-" + hex + ".att":  true,
		"sha256-" + hex + ".esgz": true, // ours, for untagged pushes
		"sha256-" + hex[:63]:      false,
		"v1-sha256-" + hex:        false,
	} {
		got, err := s.Decode(nil, []byte(`{"image":"r.example/a:`+tag+`"}`))
		if err != nil || (len(got.Events) == 0) != ignored || (len(got.Ignored) == 1) != ignored {
			t.Errorf("%s: got %+v, %v", tag, got, err)
		}
	}
}

func TestHosts(t *testing.T) {
	body := func(host string) []byte { return edit(t, "azure.json", host, "request", "host") }
	s := newSource(t, configOf(webhook.Azure))
	for host, want := range map[string]string{
		"Registry.Example":     "registry.example",
		"registry.example:443": "registry.example",
		"registry.example:80":  "registry.example:80",
		"localhost":            "localhost",
		"localhost:5000":       "localhost:5000",
		"127.0.0.1:5000":       "127.0.0.1:5000",
		"[::1]:5000":           "[::1]:5000",
		"registry:5000":        "registry:5000",
		"registry:443":         "registry:443",
		"index.docker.io":      "docker.io",
	} {
		got, err := s.Decode(nil, body(host))
		if err != nil || len(got.Events) != 1 || got.Events[0].Registry != want {
			t.Errorf("%s: got %+v, %v, want registry %s", host, got, err, want)
		}
	}
}

// GitHub sends a form unless it is told otherwise.
func TestGitHubForm(t *testing.T) {
	f := fixture{file: "github_package.json"}
	form := url.Values{"payload": {string(f.body(t))}}.Encode()
	header := headers("X-GitHub-Event", "package", "Content-Type", "application/x-www-form-urlencoded")
	s := newSource(t, configOf(webhook.GitHub))
	got, err := s.Decode(header, []byte(form))
	if err != nil || len(got.Events) != 1 || got.Events[0].Digest != dig("app") {
		t.Errorf("got %+v, %v", got, err)
	}
	if _, err := s.Decode(header, []byte("x=y")); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("without payload: %v", err)
	}
}

// The tag's digest wins over that of the manifest which happens to be described
// beside it; what is known of the other manifest then says nothing.
func TestGitHubTagOfAnotherManifest(t *testing.T) {
	body := edit(t, "github_package.json", dig("index").String(), "package", "package_version", "container_metadata", "tag", "digest")
	got, err := newSource(t, configOf(webhook.GitHub)).Decode(ghPackage, body)
	if err != nil || len(got.Events) != 1 || got.Events[0].Digest != dig("index") || got.Events[0].MediaType != "" || got.Events[0].Tag != "v1" {
		t.Errorf("got %+v, %v", got, err)
	}
}

// Times that cannot be read are unknown, and never an error or a time that
// cannot be written as JSON.
func TestOddTimes(t *testing.T) {
	s := newSource(t, configOf(webhook.DockerHub))
	for _, when := range []any{"soon", "2025-11-20 17:15:02", -1, 0, 1e300, "9999-12-31T23:59:59-23:00", "0001-01-01T00:00:00Z", nil, true, []any{}, "1e400"} {
		got, err := s.Decode(nil, edit(t, "dockerhub.json", when, "push_data", "pushed_at"))
		if err != nil || len(got.Events) != 1 || !got.Events[0].OccurredAt.IsZero() {
			t.Errorf("%v: got %+v, %v, want an unknown time", when, got, err)
		}
	}
	got, err := s.Decode(nil, edit(t, "dockerhub.json", 1763630102917, "push_data", "pushed_at"))
	if err != nil || len(got.Events) != 1 || got.Events[0].OccurredAt.Unix() != 1763630102 {
		t.Errorf("milliseconds: got %+v, %v", got, err)
	}
}

func TestConfigErrors(t *testing.T) {
	with := func(k webhook.Kind, change func(*webhook.Config)) webhook.Config {
		c := configOf(k)
		change(&c)
		return c
	}
	tests := []struct {
		config webhook.Config
		key    string
	}{
		{webhook.Config{Kind: "nexus", Secret: "x"}, "kind"},
		{with(webhook.Harbor, func(c *webhook.Config) { c.Name = "a/b" }), "name"},
		{with(webhook.Harbor, func(c *webhook.Config) { c.Name = "quay" }), "name"},
		{with(webhook.Harbor, func(c *webhook.Config) { c.PreviousSecrets = []string{""} }), "previous_secrets[0]"},
		{with(webhook.Quay, func(c *webhook.Config) { c.Secret = "a/b" }), "secret"},
		{with(webhook.Quay, func(c *webhook.Config) { c.PreviousSecrets = []string{"a/b"} }), "secret"},
		{with(webhook.Aliyun, func(c *webhook.Config) { c.Registry = "" }), "registry"},
		{with(webhook.Zot, func(c *webhook.Config) { c.Registry = "" }), "registry"},
		{with(webhook.Zot, func(c *webhook.Config) { c.Registry = "zot" }), "registry"},
		{with(webhook.Zot, func(c *webhook.Config) { c.Registry = "https://zot.example" }), "registry"},
		{with(webhook.Quay, func(c *webhook.Config) { c.Registry = "q.example/path" }), "registry"},
		{with(webhook.Generic, func(c *webhook.Config) { c.Registry = "q.example" }), "registry"},
		{with(webhook.Artifactory, func(c *webhook.Config) { c.Registry = "{repo_key}" }), "registry"},
		{with(webhook.Artifactory, func(c *webhook.Config) { c.Registry = "a.example/UPPER" }), "registry"},
		{with(webhook.Artifactory, func(c *webhook.Config) { c.Registry = "a.example/{other}" }), "registry"},
		{with(webhook.GAR, func(c *webhook.Config) { c.Secret = "x" }), "secret"},
		{with(webhook.GAR, func(c *webhook.Config) { c.OIDC.Audience = "" }), "oidc.audience"},
		{with(webhook.GAR, func(c *webhook.Config) { c.OIDC.Email = "" }), "oidc.email"},
		{with(webhook.GAR, func(c *webhook.Config) { c.OIDC.Issuer = "http://accounts.example" }), "oidc.issuer"},
		{with(webhook.Harbor, func(c *webhook.Config) { c.OIDC.Email = "x" }), "oidc"},
	}
	for _, k := range webhook.Kinds {
		if k != webhook.GAR {
			tests = append(tests, struct {
				config webhook.Config
				key    string
			}{with(k, func(c *webhook.Config) { c.Secret = "" }), "secret"})
		}
	}
	for _, test := range tests {
		_, err := webhook.New(test.config)
		if !errors.Is(err, accel.ErrInvalid) || !strings.Contains(err.Error(), ": "+test.key+": ") {
			t.Errorf("%+v: error %v, want an ErrInvalid that names %s", test.config, err, test.key)
		}
		if err != nil && strings.Contains(err.Error(), theSecret) {
			t.Errorf("the error tells the secret: %v", err)
		}
	}
}

func TestMatches(t *testing.T) {
	named := newSource(t, configOf(webhook.Harbor))
	c := configOf(webhook.Harbor)
	c.Name = ""
	unnamed := newSource(t, c)
	for _, test := range []struct {
		s    *webhook.Source
		path string
		want bool
	}{
		{named, "my-harbor", true}, {named, "harbor", true}, {named, "quay", false}, {named, "", false},
		{unnamed, "harbor", true}, {unnamed, "my-harbor", false},
	} {
		if test.s.Matches(test.path) != test.want {
			t.Errorf("%s matches %q: %t", test.s.Name(), test.path, !test.want)
		}
	}
	if unnamed.Name() != "harbor" || named.Kind() != webhook.Harbor {
		t.Error("name or kind")
	}
}
