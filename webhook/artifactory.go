package webhook

import (
	"net/http"
	"strings"
)

// artifactoryRepoKey is the placeholder in Config.Registry that stands for the
// repository's key, for the sub-domain way of naming ("{repo_key}.example.com").
const artifactoryRepoKey = "{repo_key}"

// decodeArtifactory reads JFrog Artifactory's docker webhooks.
func decodeArtifactory(b *batch, _ http.Header, body []byte) error {
	var event struct {
		Domain    string `json:"domain"`
		EventType string `json:"event_type"`
		Data      struct {
			RepoKey   string `json:"repo_key"`
			Path      string `json:"path"`   // "image/name/tag/manifest.json"
			SHA256    string `json:"sha256"` // of the manifest, bare hex
			ImageName string `json:"image_name"`
			ImageType string `json:"image_type"`
			Tag       string `json:"tag"` // "sha256:..." for a push without a tag
		} `json:"data"`
		Origin string `json:"jpd_origin"` // a URL
	}
	if err := b.unmarshal("body", body, &event); err != nil {
		return err
	}
	switch {
	case event.Domain == "":
		return b.invalid("domain", "missing")
	case event.Domain != "docker":
		b.ignore("domain %.100q: not docker", event.Domain)
		return nil
	case event.EventType != "pushed":
		b.ignore("event_type %.100q: no push", event.EventType)
		return nil
	}
	data := &event.Data
	switch data.ImageType {
	case "", "docker", "oci":
	default:
		b.ignore("data.image_type %.100q: no image", data.ImageType)
		return nil
	}
	if data.RepoKey == "" {
		return b.invalid("data.repo_key", "missing")
	}
	image, tag := field{"data.image_name", data.ImageName}, field{"data.tag", data.Tag}
	if parts := strings.Split(data.Path, "/"); len(parts) > 2 {
		n := len(parts) - 2
		if image.value == "" {
			image = field{"data.path", strings.Join(parts[:n], "/")}
		}
		if tag.value == "" {
			tag = field{"data.path", parts[n]}
		}
	}
	if image.value == "" {
		return b.invalid(image.path, "missing")
	}
	// Older versions write the digest as a folder's name.
	if hex, ok := strings.CutPrefix(tag.value, "sha256__"); ok {
		tag.value = "sha256:" + hex
	}
	dgst := field{"data.sha256", data.SHA256}
	if dgst.value != "" && !strings.Contains(dgst.value, ":") {
		dgst.value = "sha256:" + dgst.value
	}
	host, path := artifactoryName(b.registry, event.Origin, data.RepoKey)
	b.registry = "" // used up: host has it
	b.add(push{
		host:       field{"jpd_origin", host},
		repository: field{image.path, joinName(path, image.value)},
		tag:        tag,
		digest:     dgst,
	})
	return nil
}

// artifactoryName is where clients find a repository: the host, and the path
// before the image's name. By default "<origin's host>/<key>"; a configured
// registry replaces the host, or the whole where it has a path or the
// placeholder (a virtual repository; naming by sub-domain or by port).
func artifactoryName(registry, origin, repoKey string) (host, path string) {
	if registry == "" {
		return hostOf(origin), repoKey
	}
	host, path, hasPath := strings.Cut(registry, "/")
	if !hasPath && !strings.Contains(host, artifactoryRepoKey) {
		path = artifactoryRepoKey
	}
	return strings.ReplaceAll(host, artifactoryRepoKey, repoKey), strings.ReplaceAll(path, artifactoryRepoKey, repoKey)
}
