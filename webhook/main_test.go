package webhook_test

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"accel"
	"accel/webhook"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// hosts that the fixtures' sources are configured with; the others have none.
var configuredHosts = map[webhook.Kind]string{
	webhook.Aliyun: "registry.cn-hangzhou.aliyuncs.com",
	webhook.Zot:    "zot.example:8080",
}

const theSecret = "correct-horse-battery-staple"

// configOf is a valid configuration of kind k.
func configOf(k webhook.Kind) webhook.Config {
	c := webhook.Config{Name: "my-" + string(k), Kind: k, Secret: theSecret, Registry: configuredHosts[k]}
	if k == webhook.GAR {
		c.Secret = ""
		c.OIDC = webhook.OIDC{Audience: "accel", Email: "push@my-project.iam.gserviceaccount.com"}
	}
	return c
}

func newSource(t testing.TB, c webhook.Config, opts ...webhook.Option) *webhook.Source {
	t.Helper()
	s, err := webhook.New(c, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// dig is the digest that the fixtures have for a manifest called name.
func dig(name string) digest.Digest { return digest.FromString(name) }

func at(s string) time.Time {
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		panic(err)
	}
	return t.UTC()
}

const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	ociManifest    = "application/vnd.oci.image.manifest.v1+json"
	ociIndex       = "application/vnd.oci.image.index.v1+json"
)

// fixture is one body of testdata with what it must decode to.
type fixture struct {
	file    string
	kind    webhook.Kind
	header  http.Header
	want    []accel.PushEvent // without Source
	ignored int
	host    string // configured registry, where it is not the usual one
}

func (f fixture) body(t testing.TB) []byte {
	t.Helper()
	body, err := os.ReadFile(filepath.Join("testdata", f.file))
	if err != nil {
		t.Fatal(err)
	}
	return body
}

func headers(pairs ...string) http.Header {
	h := http.Header{}
	for i := 0; i < len(pairs); i += 2 {
		h.Set(pairs[i], pairs[i+1])
	}
	return h
}

func push(registry, repository, tag string, d digest.Digest, mediaType, when string) accel.PushEvent {
	e := accel.PushEvent{Registry: registry, Repository: repository, Tag: tag, Digest: d, MediaType: mediaType}
	if when != "" {
		e.OccurredAt = at(when)
	}
	return e
}

var (
	ghPackage   = headers("X-GitHub-Event", "package", "Content-Type", "application/json")
	ghRegistry  = headers("X-GitHub-Event", "registry_package", "Content-Type", "application/json")
	cloudEvents = headers("Content-Type", "application/cloudevents+json; charset=utf-8")
	zotBinary   = headers("Content-Type", "application/json", "Ce-Specversion", "1.0", "Ce-Id", "1", "Ce-Source", "zotregistry.dev",
		"Ce-Type", "zotregistry.image.updated", "Ce-Time", "2025-11-20T09:15:02.123456789Z", "Ce-Channel", "any")
)

const (
	regHost   = "registry.example:5000"
	ecrHost   = "123456789012.dkr.ecr.us-west-2.amazonaws.com"
	garHost   = "europe-west1-docker.pkg.dev"
	garRepo   = "my-project/images/app"
	zotHost   = "zot.example:8080"
	aliHost   = "registry.cn-hangzhou.aliyuncs.com"
	whenSec   = "2025-11-20T09:15:02Z"
	whenNano  = "2025-11-20T09:15:02.123456789Z"
	whenAzure = "2025-11-20T09:15:02.3456789Z"
)

var fixtures = []fixture{
	{file: "distribution.json", kind: webhook.Distribution, want: []accel.PushEvent{push(regHost, "team/app", "v1", dig("app"), ociManifest, whenNano)}},
	{file: "distribution_batch.json", kind: webhook.Distribution, ignored: 5, want: []accel.PushEvent{
		push(regHost, "team/app", "", dig("child-amd64"), dockerManifest, whenNano),
		push(regHost, "team/app", "v2", dig("index"), ociIndex, whenNano),
	}},
	{file: "distribution_delete.json", kind: webhook.Distribution, ignored: 1},

	{file: "harbor.json", kind: webhook.Harbor, want: []accel.PushEvent{push("harbor.example", "library/app", "v1", dig("app"), "", whenSec)}},
	{file: "harbor_untagged.json", kind: webhook.Harbor, want: []accel.PushEvent{push("harbor.example", "library/app", "", dig("app"), "", whenSec)}},
	{file: "harbor_pull.json", kind: webhook.Harbor, ignored: 1},
	{file: "harbor_cloudevents.json", kind: webhook.Harbor, header: cloudEvents, want: []accel.PushEvent{push("harbor.example", "library/app", "v1", dig("app"), "", whenSec)}},
	// The content type lost on the way.
	{file: "harbor_cloudevents.json", kind: webhook.Harbor, want: []accel.PushEvent{push("harbor.example", "library/app", "v1", dig("app"), "", whenSec)}},
	{file: "harbor_cloudevents_pull.json", kind: webhook.Harbor, header: cloudEvents, ignored: 1},
	{file: "harbor.json", kind: webhook.Harbor, host: "pull.example:8443", want: []accel.PushEvent{push("pull.example:8443", "library/app", "v1", dig("app"), "", whenSec)}},

	{file: "dockerhub.json", kind: webhook.DockerHub, want: []accel.PushEvent{push("docker.io", "team/app", "v1", "", "", whenSec)}},
	{file: "dockerhub_older.json", kind: webhook.DockerHub, want: []accel.PushEvent{push("docker.io", "team/app", "v1", "", "", whenSec)}},

	{file: "quay.json", kind: webhook.Quay, want: []accel.PushEvent{push("quay.example", "team/app", "v1", "", "", ""), push("quay.example", "team/app", "latest", "", "", "")}},
	{file: "quay_tagmap.json", kind: webhook.Quay, want: []accel.PushEvent{push("quay.example", "team/app", "latest", "", "", ""), push("quay.example", "team/app", "v1", "", "", "")}},
	{file: "quay_nohost.json", kind: webhook.Quay, host: "Quay.Example", want: []accel.PushEvent{push("quay.example", "team/app", "v1", "", "", ""), push("quay.example", "team/app", "latest", "", "", "")}},
	{file: "quay_vulnerability.json", kind: webhook.Quay, ignored: 1},

	{file: "github_package.json", kind: webhook.GitHub, header: ghPackage, want: []accel.PushEvent{push("ghcr.io", "octo-org/app", "v1", dig("app"), ociManifest, whenSec)}},
	{file: "github_registry_package.json", kind: webhook.GitHub, header: ghRegistry, want: []accel.PushEvent{push("ghcr.io", "octo-org/app", "v1", dig("index"), ociIndex, whenSec)}},
	{file: "github_untagged.json", kind: webhook.GitHub, header: ghPackage, want: []accel.PushEvent{push("ghcr.io", "octo-org/app", "", dig("child-amd64"), ociManifest, whenSec)}},
	{file: "github_chart.json", kind: webhook.GitHub, header: ghPackage, ignored: 1},
	{file: "github_npm.json", kind: webhook.GitHub, header: ghPackage, ignored: 1},
	{file: "github_ping.json", kind: webhook.GitHub, header: headers("X-GitHub-Event", "ping"), ignored: 1},

	{file: "azure.json", kind: webhook.Azure, want: []accel.PushEvent{push("myregistry.azurecr.io", "team/app", "v1", dig("app"), dockerManifest, whenAzure)}},
	{file: "azure_ping.json", kind: webhook.Azure, ignored: 1},
	{file: "azure_chart.json", kind: webhook.Azure, ignored: 1},

	{file: "ecr.json", kind: webhook.ECR, want: []accel.PushEvent{push(ecrHost, "team/app", "v1", dig("app"), ociManifest, whenSec)}},
	{file: "ecr_china_untagged.json", kind: webhook.ECR, want: []accel.PushEvent{push("123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn", "team/app", "", dig("app"), "", whenSec)}},
	{file: "ecr.json", kind: webhook.ECR, host: "ecr.example", want: []accel.PushEvent{push("ecr.example", "team/app", "v1", dig("app"), ociManifest, whenSec)}},
	{file: "ecr_delete.json", kind: webhook.ECR, ignored: 1},
	{file: "ecr_chart.json", kind: webhook.ECR, ignored: 1},
	{file: "ecr_scan.json", kind: webhook.ECR, ignored: 1},

	{file: "gar.json", kind: webhook.GAR, want: []accel.PushEvent{push(garHost, garRepo, "v1", dig("app"), "", "2025-11-20T09:15:02.917Z")}},
	{file: "gar_untagged.json", kind: webhook.GAR, want: []accel.PushEvent{push(garHost, garRepo, "", dig("app"), "", "2025-11-20T09:15:02.917Z")}},
	{file: "gar_delete.json", kind: webhook.GAR, ignored: 1},
	{file: "gar_unwrapped.json", kind: webhook.GAR, want: []accel.PushEvent{push(garHost, garRepo, "v1", dig("app"), "", "")}},
	{file: "gar_unwrapped.json", kind: webhook.GAR, header: headers("X-Goog-Pubsub-Publish-Time", whenSec), want: []accel.PushEvent{push(garHost, garRepo, "v1", dig("app"), "", whenSec)}},

	{file: "aliyun.json", kind: webhook.Aliyun, want: []accel.PushEvent{push(aliHost, "team/app", "v1", dig("app"), "", "")}},

	{file: "artifactory.json", kind: webhook.Artifactory, want: []accel.PushEvent{push("artifactory.example", "docker-local/team/app", "v1", dig("index"), "", "")}},
	{file: "artifactory_untagged.json", kind: webhook.Artifactory, want: []accel.PushEvent{push("artifactory.example", "docker-local/team/app", "", dig("child-amd64"), "", "")}},
	{file: "artifactory.json", kind: webhook.Artifactory, host: "{repo_key}.art.example", want: []accel.PushEvent{push("docker-local.art.example", "team/app", "v1", dig("index"), "", "")}},
	{file: "artifactory.json", kind: webhook.Artifactory, host: "art.example:8443/docker", want: []accel.PushEvent{push("art.example:8443", "docker/team/app", "v1", dig("index"), "", "")}},
	{file: "artifactory.json", kind: webhook.Artifactory, host: "art.example", want: []accel.PushEvent{push("art.example", "docker-local/team/app", "v1", dig("index"), "", "")}},
	{file: "artifactory_deleted.json", kind: webhook.Artifactory, ignored: 1},
	{file: "artifactory_artifact.json", kind: webhook.Artifactory, ignored: 1},

	{file: "zot_binary.json", kind: webhook.Zot, header: zotBinary, want: []accel.PushEvent{push(zotHost, "team/app", "v1", dig("app"), ociManifest, whenNano)}},
	{file: "zot_structured.json", kind: webhook.Zot, header: cloudEvents, want: []accel.PushEvent{push(zotHost, "team/app", "v1", dig("app"), ociManifest, whenNano)}},
	{file: "zot_batch.json", kind: webhook.Zot, header: headers("Content-Type", "application/cloudevents-batch+json"), ignored: 1, want: []accel.PushEvent{push(zotHost, "team/app", "v1", dig("app"), ociManifest, whenNano)}},
	{file: "zot_untagged.json", kind: webhook.Zot, header: cloudEvents, want: []accel.PushEvent{push(zotHost, "team/app", "", dig("app"), ociManifest, whenNano)}},
	{file: "zot_artifact.json", kind: webhook.Zot, header: cloudEvents, ignored: 1},
	{file: "zot_deleted.json", kind: webhook.Zot, header: cloudEvents, ignored: 1},

	{file: "generic_tag.json", kind: webhook.Generic, want: []accel.PushEvent{push(regHost, "team/app", "v1", "", "", "")}},
	{file: "generic_digest.json", kind: webhook.Generic, want: []accel.PushEvent{push("registry.example", "team/app", "", dig("app"), "", "")}},
}

func hmacHex(secret string, body []byte) string {
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write(body)
	return hex.EncodeToString(mac.Sum(nil))
}

func marshal(v any) string {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(data)
}
