package fleet

import (
	"fmt"
	"regexp"
	"slices"

	"accel"

	"github.com/opencontainers/go-digest"
)

// Form is one of the two forms in which an image is there.
type Form string

// The forms of an image.
const (
	FormSource Form = "source" // as it was pushed
	FormTarget Form = "target" // as it was converted
)

// Rule says which nodes get which images as soon as those are Ready.
type Rule struct {
	// Name is shown with every image that the rule brought.
	Name string `yaml:"name"`
	// Repositories are globs over the source's "host/path" (accel.MatchRepository);
	// at least one, and one that matches is enough.
	Repositories []string `yaml:"repositories"`
	// Nodes are labels that a node must have, all of them; none: every node.
	Nodes map[string]string `yaml:"nodes"`
	// Forms to bring; none: FormSource.
	Forms []Form `yaml:"forms"`
}

var ruleName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

// CheckRules says what is wrong with the first rule that cannot be used.
func CheckRules(rules []Rule) error {
	names := map[string]bool{}
	for i, r := range rules {
		if err := r.check(); err != nil {
			return fmt.Errorf("warm[%d]: %w", i, err)
		}
		if names[r.Name] {
			return fmt.Errorf("%w: warm[%d]: name %q is used twice", accel.ErrInvalid, i, r.Name)
		}
		names[r.Name] = true
	}
	return nil
}

func (r *Rule) check() error {
	if !ruleName.MatchString(r.Name) {
		return fmt.Errorf("%w: name %q: want 1 to 63 letters, digits, dots, dashes or underscores", accel.ErrInvalid, r.Name)
	}
	if len(r.Repositories) == 0 {
		return fmt.Errorf("%w: repositories: name at least one, such as registry.example/team/**; */** means all", accel.ErrInvalid)
	}
	for _, g := range r.Repositories {
		if g == "" {
			return fmt.Errorf("%w: repositories: an empty glob matches nothing", accel.ErrInvalid)
		}
		if err := accel.CheckRepositoryGlob(g); err != nil {
			return fmt.Errorf("repositories: %w", err)
		}
	}
	for _, f := range r.Forms {
		if f != FormSource && f != FormTarget {
			return fmt.Errorf("%w: forms: %q: want source or target", accel.ErrInvalid, f)
		}
	}
	return nil
}

func (r *Rule) wants(repository string) bool {
	return slices.ContainsFunc(r.Repositories, func(g string) bool { return accel.MatchRepository(g, repository) })
}

func (r *Rule) selects(labels map[string]string) bool {
	for k, v := range r.Nodes {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}

// readyImage is an image that became Ready, as it is kept for the catch-up: one for each of its
// tags, which Source has.
type readyImage struct {
	Source image `json:"source"`
	Target image `json:"target"` // by digest; zero where there is none
	// TargetTags are under which the target was pushed.
	TargetTags []string `json:"targetTags,omitempty"`
}

// maxTags of one image are brought to nodes; under more it is known there only by digest.
const maxTags = 16

// readyImages are what is kept of a record that is Ready.
func readyImages(rec *accel.Record) []readyImage {
	var r readyImage
	if t := rec.Target; t.Digest != "" {
		r.Target, r.TargetTags = image{Name: name(t.Repository, "", t.Digest), Repository: t.Repository, Digest: t.Digest}, t.Tags[:min(len(t.Tags), maxTags)]
	}
	tags := rec.Tags[:min(len(rec.Tags), maxTags)]
	if len(tags) == 0 {
		tags = []string{""}
	}
	all := make([]readyImage, 0, len(tags))
	for _, tag := range tags {
		r.Source = image{Name: name(rec.Repository, tag, rec.Digest), Repository: rec.Repository, Digest: rec.Digest, Tag: tag}
		all = append(all, r)
	}
	return all
}

// targets are the converted image by each of its tags, without any by digest alone.
func (r *readyImage) targets() []image {
	if len(r.TargetTags) == 0 {
		return []image{r.Target}
	}
	all := make([]image, 0, len(r.TargetTags))
	for _, tag := range r.TargetTags {
		t := r.Target
		t.Name, t.Tag = name(t.Repository, tag, t.Digest), tag
		all = append(all, t)
	}
	return all
}

// image is what one Warm is about.
type image struct {
	Name       string        `json:"name"` // as Warm.Image
	Repository string        `json:"repository"`
	Digest     digest.Digest `json:"digest,omitempty"`
	Tag        string        `json:"tag,omitempty"`
}

// name is how an image is asked for: by the digest where that is known, and with the tag, which the
// node that fetches it is to know too.
func name(repository, tag string, d digest.Digest) string {
	if tag != "" {
		repository += ":" + tag
	}
	if d != "" {
		repository += "@" + d.String()
	}
	return repository
}

// wish is an image with the rule that asks for it.
type wish struct {
	image
	rule string
}

// wishes are what the rules bring to a node with the labels, each once, for the
// first rule that asks for it.
func (o *Options) wishes(ready *readyImage, labels map[string]string) []wish {
	var all []wish
	add := func(w wish) {
		if w.Digest != "" && !slices.ContainsFunc(all, func(had wish) bool { return had.Name == w.Name }) {
			all = append(all, w)
		}
	}
	for i := range o.Rules {
		r := &o.Rules[i]
		if !r.wants(ready.Source.Repository) || !r.selects(labels) {
			continue
		}
		if len(r.Forms) == 0 || slices.Contains(r.Forms, FormSource) {
			add(wish{ready.Source, r.Name})
		}
		if slices.Contains(r.Forms, FormTarget) {
			for _, t := range ready.targets() {
				add(wish{t, r.Name})
			}
		}
	}
	return all
}
