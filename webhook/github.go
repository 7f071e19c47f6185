package webhook

import (
	"encoding/json"
	"net/http"
	"net/url"
	"strings"

	"accel"
)

// githubPackage is the object that GitHub's package and registry_package events
// carry under the event's own name.
type githubPackage struct {
	PackageType    string    `json:"package_type"`
	UpdatedAt      timestamp `json:"updated_at"`
	PackageVersion *struct {
		// Version of a container package is the manifest's digest.
		Version           string    `json:"version"`
		PackageURL        string    `json:"package_url"` // "ghcr.io/owner/name:tag", or ending in ':' without a tag
		CreatedAt         timestamp `json:"created_at"`
		UpdatedAt         timestamp `json:"updated_at"`
		ContainerMetadata struct {
			Tag struct {
				Name   string `json:"name"`
				Digest string `json:"digest"`
			} `json:"tag"`
			Manifest githubManifest `json:"manifest"`
		} `json:"container_metadata"`
	} `json:"package_version"`
}

// githubManifest is container_metadata.manifest. GitHub's schema leaves its type
// open, so that anything but an object reads as an unknown manifest.
type githubManifest struct {
	Digest    string
	MediaType string
	Config    string // the config's media type
}

func (m *githubManifest) UnmarshalJSON(data []byte) error {
	var v struct {
		Digest    string `json:"digest"`
		MediaType string `json:"media_type"`
		Config    struct {
			MediaType string `json:"media_type"`
		} `json:"config"`
	}
	if json.Unmarshal(data, &v) == nil {
		*m = githubManifest{v.Digest, v.MediaType, v.Config.MediaType}
	}
	return nil
}

// decodeGitHub reads GitHub's package events. There is one for each manifest
// pushed, so that an index comes with an untagged event for each child.
func decodeGitHub(b *batch, header http.Header, body []byte) error {
	kind := header.Get("X-GitHub-Event")
	switch kind {
	case "package", "registry_package":
	case "":
		return b.invalid("header X-GitHub-Event", "missing")
	default: // ping, push, workflow_run, ...
		b.ignore("X-GitHub-Event %.100q: no package event", kind)
		return nil
	}
	body, err := b.githubPayload(header, body)
	if err != nil {
		return err
	}
	var event struct {
		Action          string         `json:"action"`
		Package         *githubPackage `json:"package"`
		RegistryPackage *githubPackage `json:"registry_package"`
	}
	if err := b.unmarshal("body", body, &event); err != nil {
		return err
	}
	switch event.Action {
	case "published", "updated":
	case "":
		return b.invalid("action", "missing")
	default:
		b.ignore("action %.100q: no push", event.Action)
		return nil
	}
	root, pkg := "package", event.Package
	if pkg == nil {
		root, pkg = "registry_package", event.RegistryPackage
	}
	if pkg == nil {
		return b.invalid(kind, "missing")
	}
	switch strings.ToLower(pkg.PackageType) {
	case "container", "docker":
	case "":
		return b.invalid(root+".package_type", "missing")
	default: // npm, maven, ...
		b.ignore("%s.package_type %.100q: no container package", root, pkg.PackageType)
		return nil
	}
	return b.addGitHub(root+".package_version.", pkg)
}

// githubPayload is the JSON in body, which GitHub wraps in a form unless the
// webhook was configured with content type application/json.
func (b *batch) githubPayload(header http.Header, body []byte) ([]byte, error) {
	if bareMediaType(header.Get("Content-Type")) != "application/x-www-form-urlencoded" {
		return body, nil
	}
	form, err := url.ParseQuery(string(body))
	if err != nil || form.Get("payload") == "" {
		return nil, b.invalid("payload", "missing in the form")
	}
	return []byte(form.Get("payload")), nil
}

func (b *batch) addGitHub(prefix string, pkg *githubPackage) error {
	version := pkg.PackageVersion
	if version == nil {
		return b.invalid(strings.TrimSuffix(prefix, "."), "missing")
	}
	address := strings.TrimSuffix(version.PackageURL, ":")
	if _, rest, ok := strings.Cut(address, "://"); ok {
		address = rest
	}
	host, path, _ := strings.Cut(address, "/")
	if path == "" {
		return b.invalid(prefix+"package_url", "%.200q is no HOST/OWNER/NAME[:TAG]", version.PackageURL)
	}
	// Owners have capitals, image names must not: the registry folds them.
	repository, urlTag, _ := strings.Cut(path, ":")
	repository, _, _ = strings.Cut(repository, "@")

	manifest := version.ContainerMetadata.Manifest
	p := push{
		host:       field{prefix + "package_url", host},
		repository: field{prefix + "package_url", strings.ToLower(repository)},
		tag:        field{prefix + "container_metadata.tag.name", version.ContainerMetadata.Tag.Name},
		digest:     field{prefix + "container_metadata.manifest.digest", manifest.Digest},
		mediaType:  field{prefix + "container_metadata.manifest.media_type", manifest.MediaType},
		artifact:   field{prefix + "container_metadata.manifest.config.media_type", manifest.Config},
		at:         latest(pkg.UpdatedAt, version.CreatedAt, version.UpdatedAt),
	}
	if p.tag.value == "" && strings.Contains(path, ":") && !strings.Contains(path, "@") {
		p.tag = field{prefix + "package_url", urlTag}
	}
	if d := version.ContainerMetadata.Tag.Digest; p.tag.value != "" && d != "" && d != p.digest.value {
		// The tag's own digest is what the tag points to; the manifest described
		// beside it is then another one.
		p.digest = field{prefix + "container_metadata.tag.digest", d}
		p.mediaType.value, p.artifact.value = "", ""
	}
	if p.digest.value == "" {
		if _, err := accel.ParseReference("x/y@" + version.Version); err == nil {
			p.digest = field{prefix + "version", version.Version}
		}
	}
	b.add(p)
	return nil
}

// latest of some times. A tag that moves back to an older version comes with
// that version's old times; the package's own is then the time of the push.
func latest(times ...timestamp) timestamp {
	var last timestamp
	for _, t := range times {
		if t.After(last.Time) {
			last = t
		}
	}
	return last
}
