package webhook

import (
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"accel"
)

// Kind names a registry product and with it the form of its notifications.
type Kind string

// The kinds, by the names that paths and configuration files use.
const (
	Distribution Kind = "distribution" // CNCF Distribution, GitLab's registry
	Harbor       Kind = "harbor"       // both its default and its CloudEvents payload
	DockerHub    Kind = "dockerhub"
	Quay         Kind = "quay"
	GitHub       Kind = "github" // GitHub Packages: ghcr.io and docker.pkg.github.com
	Azure        Kind = "azure"  // Azure Container Registry
	ECR          Kind = "ecr"    // Amazon ECR through EventBridge
	GAR          Kind = "gar"    // Google Artifact Registry through Pub/Sub push
	Aliyun       Kind = "aliyun" // Alibaba Cloud Container Registry
	Artifactory  Kind = "artifactory"
	Zot          Kind = "zot"
	Generic      Kind = "generic" // {"image": "host/repo:tag"} from anything else
)

// Kinds lists all kinds in the order of the documentation.
var Kinds = []Kind{Distribution, Harbor, DockerHub, Quay, GitHub, Azure, ECR, GAR, Aliyun, Artifactory, Zot, Generic}

const (
	// MaxBodyBytes bounds a notification. The largest known are zot's, which
	// quote the whole manifest (4 MiB at most), and batches of a thousand events.
	MaxBodyBytes int64 = 8 << 20
	// MaxEvents bounds the pushes that one notification may announce.
	MaxEvents = 1000
	// DefaultIssuer signs the tokens that Pub/Sub sends with a push.
	DefaultIssuer = "https://accounts.google.com"
)

// Config is one source of notifications.
type Config struct {
	// Name of the source, in paths and in Record.Origin; default: the kind. Two
	// sources of one kind need different names.
	Name string `yaml:"name"`
	Kind Kind   `yaml:"kind"`
	// Secret that the sender presents in its registry's way. Every kind but gar
	// needs it.
	Secret string `yaml:"secret"`
	// PreviousSecrets are accepted too, while a new Secret is being rolled out.
	PreviousSecrets []string `yaml:"previous_secrets"`
	// Registry is the host that events are about, "host[:port]". aliyun and zot
	// need it, because their events name none; for the others it replaces the
	// host in the event, where that is not the name that clients pull by. For
	// artifactory it may go on with a path and hold the placeholder {repo_key}.
	// generic does not take it: its events name the whole image.
	Registry string `yaml:"registry"`
	// OIDC says whose tokens are accepted; kind gar alone needs it.
	OIDC OIDC `yaml:"oidc"`
}

// OIDC is what a Pub/Sub push subscription's token must say.
type OIDC struct {
	// Issuer of the token; default DefaultIssuer. Its keys are found by OpenID
	// Connect discovery.
	Issuer string `yaml:"issuer"`
	// Audience that the push subscription was configured with.
	Audience string `yaml:"audience"`
	// Email of the service account that the push subscription signs as.
	Email string `yaml:"email"`
}

// Result is what a notification says.
type Result struct {
	// Events are the image pushes, in the order of the body.
	Events []accel.PushEvent
	// Ignored has a reason for each thing in the body that is no image push, and
	// for each malformed one that came together with good ones.
	Ignored []string
}

// Source authenticates and decodes the notifications of one configured sender.
// It is safe for concurrent use.
type Source struct {
	name     string
	kind     Kind
	registry string
	decode   decoder
	auth     authenticator
}

// decoder reads one registry's body into b. It returns an error where the body
// as a whole makes no sense; single malformed events are b's to note.
type decoder func(b *batch, header http.Header, body []byte) error

// Option changes how a Source works.
type Option func(*options)

type options struct{ client *http.Client }

// WithHTTPClient sets the client that fetches an OIDC issuer's metadata and
// keys. Requests through it are rate-limited and their answers bounded.
func WithHTTPClient(c *http.Client) Option { return func(o *options) { o.client = c } }

// name characters: one path segment that needs no escaping.
var namePattern = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$`)

// New checks c and makes its Source. An error is an accel.ErrInvalid that names
// the key of c to set or mend. It does no I/O.
func New(c Config, opts ...Option) (*Source, error) {
	if !slices.Contains(Kinds, c.Kind) {
		return nil, fmt.Errorf("%w: webhook %q: kind: %q is none of %v", accel.ErrInvalid, c.Name, c.Kind, Kinds)
	}
	if c.Name == "" {
		c.Name = string(c.Kind)
	}
	bad := func(key, format string, args ...any) error {
		return fmt.Errorf("%w: webhook %q: %s: %s", accel.ErrInvalid, c.Name, key, fmt.Sprintf(format, args...))
	}
	if !namePattern.MatchString(c.Name) {
		return nil, bad("name", "want up to 63 letters, digits, '.', '_' and '-'")
	}
	if other := Kind(c.Name); other != c.Kind && slices.Contains(Kinds, other) {
		return nil, bad("name", "is the name of another kind than %s", c.Kind)
	}
	var o options
	for _, opt := range opts {
		opt(&o)
	}
	s := &Source{name: c.Name, kind: c.Kind, decode: decoderOf(c.Kind)}
	if err := checkRegistry(c); err != nil {
		return nil, bad("registry", "%v", err)
	}
	s.registry = c.Registry
	if c.Kind != Artifactory {
		s.registry = canonicalHost(c.Registry)
	}
	auth, key, err := newAuthenticator(c, o)
	if err != nil {
		return nil, bad(key, "%v", err)
	}
	s.auth = auth
	return s, nil
}

func decoderOf(k Kind) decoder {
	switch k {
	case Distribution:
		return decodeDistribution
	case Harbor:
		return decodeHarbor
	case DockerHub:
		return decodeDockerHub
	case Quay:
		return decodeQuay
	case GitHub:
		return decodeGitHub
	case Azure:
		return decodeAzure
	case ECR:
		return decodeECR
	case GAR:
		return decodeGAR
	case Aliyun:
		return decodeAliyun
	case Artifactory:
		return decodeArtifactory
	case Zot:
		return decodeZot
	default:
		return decodeGeneric
	}
}

// checkRegistry validates Config.Registry for its kind.
func checkRegistry(c Config) error {
	if c.Registry == "" {
		if c.Kind == Aliyun || c.Kind == Zot {
			return fmt.Errorf("missing; kind %s needs it because its events name no registry host", c.Kind)
		}
		return nil
	}
	host := c.Registry
	switch c.Kind {
	case Generic:
		return fmt.Errorf("kind %s does not take it; its events name the whole image", c.Kind)
	case Artifactory:
		// A stand-in for the placeholder tells whether the rest is well formed.
		name := strings.ReplaceAll(c.Registry, artifactoryRepoKey, "x")
		var path string
		host, path, _ = strings.Cut(name, "/")
		if path != "" {
			if _, err := accel.ParseReference(canonicalHost(host) + "/" + path); err != nil {
				return fmt.Errorf("%q is no HOST[:PORT][/PATH]", c.Registry)
			}
		}
	}
	if !validHost(canonicalHost(host)) {
		return fmt.Errorf("%q is no registry host; want HOST[:PORT], with a dot or a port in it", c.Registry)
	}
	return nil
}

// Name of the source, as configured.
func (s *Source) Name() string { return s.name }

// Kind of the source.
func (s *Source) Kind() Kind { return s.kind }

// Matches reports whether the {source} of a request's path means s: by its name
// or by its kind.
func (s *Source) Matches(pathName string) bool {
	return pathName == s.name || pathName == string(s.kind)
}

// Decode reads a notification's body. It is pure: the same input gives the same
// result. The error is an accel.ErrInvalid that names the field which is missing
// or malformed. A malformed event among good ones is no error, because a sender
// would repeat the whole batch for ever; Result.Ignored tells of it.
func (s *Source) Decode(header http.Header, body []byte) (Result, error) {
	b := &batch{source: s.name, registry: s.registry}
	if int64(len(body)) > MaxBodyBytes {
		return Result{}, b.invalid("body", "%d bytes, more than %d", len(body), MaxBodyBytes)
	}
	if err := s.decode(b, header, body); err != nil {
		return Result{}, err
	}
	return b.result()
}
