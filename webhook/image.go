package webhook

import (
	"fmt"
	"strings"

	"accel"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const dockerHubHost = "docker.io"

// Docker's media types; OCI's are in package ocispec.
const (
	mediaTypeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	mediaTypeDockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
)

// imageConfigPrefixes are the beginnings of the media types that an image's
// config, or a registry's idea of the artifact's type, can have. An octet stream
// is what Docker 1.10 called its configs.
var imageConfigPrefixes = []string{
	"application/vnd.docker.container.image.",
	"application/vnd.docker.distribution.manifest.",
	"application/vnd.oci.image.",
	"application/octet-stream",
}

// notAnImage says why p is no push of an image, or nothing where it may be one.
func notAnImage(p push) string {
	switch mt := bareMediaType(p.mediaType.value); mt {
	case "", mediaTypeDockerManifest, mediaTypeDockerList, ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex:
	default:
		return fmt.Sprintf("%s %.200q: no image manifest or index", p.mediaType.path, mt)
	}
	mt := bareMediaType(p.artifact.value)
	if mt == "" {
		return ""
	}
	for _, prefix := range imageConfigPrefixes {
		if strings.HasPrefix(mt, prefix) {
			return ""
		}
	}
	return fmt.Sprintf("%s %.200q: an artifact (chart, signature or other), no image", p.artifact.path, mt)
}

// bareMediaType is mt in lower case and without parameters.
func bareMediaType(mt string) string {
	mt, _, _ = strings.Cut(mt, ";")
	return strings.ToLower(strings.TrimSpace(mt))
}

// canonicalHost is host as records spell it: in lower case, without HTTPS's
// default port, and Docker Hub by its short name.
func canonicalHost(host string) string {
	host = strings.ToLower(host)
	if bare := strings.TrimSuffix(host, ":443"); strings.Contains(bare, ".") {
		host = bare
	}
	if host == "index.docker.io" {
		return dockerHubHost
	}
	return host
}

// validHost reports whether references can name host: one without a dot or a
// port would be read as the first part of a Docker Hub repository.
func validHost(host string) bool {
	const probe = "a/b"
	ref, err := accel.ParseReference(host + "/" + probe)
	return err == nil && ref.Registry == host && ref.Repository == probe
}

// hostOf is the part of a URL or an image reference before its path.
func hostOf(url string) string {
	if _, rest, ok := strings.Cut(url, "://"); ok {
		url = rest
	}
	host, _, _ := strings.Cut(url, "/")
	return host
}

// joinName is "namespace/name", or the name alone.
func joinName(namespace, name string) string {
	if namespace == "" || name == "" {
		return name
	}
	return namespace + "/" + name
}
