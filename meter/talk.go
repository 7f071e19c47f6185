package meter

import (
	"errors"
	"slices"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

// talk is what one client asks of one repository: requests that are running, and the
// pulls that they make up. Clients that cannot be told apart share one.
//
// How a transfer finds its pull:
//
//   - A manifest begins a pull, or belongs to the one that asked for that digest or tag
//     (a HEAD before the GET), or to the one whose index names it. A second platform of an
//     index is a pull of its own.
//   - A blob belongs to the first pull whose manifest names it and that has not had it yet. Where
//     all have had it, another client of the same looks pulls the same image, so it begins a pull
//     of that image. A blob of no known image begins a pull that is named by it.
//   - What was refused or not found before there was a manifest (the question for
//     credentials, a signature that does not exist) is no pull.
type talk struct {
	m          *Meter
	repository string
	running    map[digest.Digest]int // requests by what they ask for; zero for tags
	pulls      []*pull               // under way, in the order of their start
}

// image is what is known of one manifest or index.
type image struct {
	name     string // "repository:tag" or "repository@digest"
	tag      string
	root     digest.Digest           // what was asked for first; zero for a stray blob
	members  []digest.Digest         // of an index
	platform digest.Digest           // the manifest with the layers; zero until it is known
	config   digest.Digest           // its config
	sizes    map[digest.Digest]int64 // its layers
}

// take puts one ended transfer to its pull.
func (t *talk) take(x *accel.Transfer, began, now time.Time) {
	switch {
	case x.Manifest != nil:
		t.manifest(x, began, now)
	case x.Tag != "" || t.isManifest(x.Digest):
		t.failedManifest(x, began, now)
	default:
		t.blob(x, began, now)
	}
}

// held reports whether a request runs that belongs to p.
func (t *talk) held(p *pull) bool {
	for d := range t.running {
		_, named := p.sizes[d]
		_, had := p.layers[d]
		if d != "" && (named || had || d == p.config || d == p.platform || d == p.root || slices.Contains(p.members, d)) {
			return true
		}
	}
	return false
}

// last is when the client was heard of last.
func (t *talk) last() (at time.Time) {
	for _, p := range t.pulls {
		if p.touched.After(at) {
			at = p.touched
		}
	}
	return at
}

// over takes out the pulls whose layers were all delivered.
func (t *talk) over() (done []*pull) {
	t.pulls = slices.DeleteFunc(t.pulls, func(p *pull) bool {
		if !p.delivered() {
			return false
		}
		done = append(done, p)
		return true
	})
	return done
}

func (t *talk) begin(i *image, began time.Time) *pull {
	if len(t.pulls) == maxPulls { // the longest under way gives way
		t.m.finish(t.pulls[0])
		t.pulls = slices.Delete(t.pulls, 0, 1)
	}
	p := &pull{image: i, start: began, end: began, layers: map[digest.Digest]*layer{}}
	t.pulls = append(t.pulls, p)
	return p
}

// isManifest reports whether d is known to be a manifest's digest.
func (t *talk) isManifest(d digest.Digest) bool {
	return slices.ContainsFunc(t.pulls, func(p *pull) bool {
		return p.root == d || p.platform == d || slices.Contains(p.members, d)
	})
}

func (t *talk) manifest(x *accel.Transfer, began, now time.Time) {
	index := len(x.Manifest.Manifests) > 0
	p := t.asked(x)
	if p == nil {
		p = t.member(x.Digest, began)
	}
	if p == nil {
		p = t.begin(&image{name: nameOf(t.repository, x.Tag, x.Digest), tag: x.Tag, root: x.Digest}, began)
	}
	if p.root == "" {
		p.root = x.Digest // an earlier try failed
	}
	p.manifestErr = ""
	if len(p.layers) == 0 {
		p.end = now // later ones are no need of the client's
	}
	p.say(x, now)
	switch {
	case index && x.Digest == p.root && len(p.members) == 0:
		p.members = x.Manifest.Manifests
	case !index && p.platform == "":
		p.platform, p.config = x.Digest, x.Manifest.Config
		p.sizes = map[digest.Digest]int64{}
		if p.config != "" {
			t.m.known.Add(blobKey{t.repository, p.config}, p.image)
		}
		for _, l := range x.Manifest.Layers {
			p.sizes[l.Digest] = l.SizeBytes
			t.m.known.Add(blobKey{t.repository, l.Digest}, p.image)
		}
	}
}

// asked finds the pull that x's digest, or its tag while that was not resolved, was asked for by.
func (t *talk) asked(x *accel.Transfer) *pull {
	for _, p := range t.pulls {
		same := p.root == x.Digest && (x.Tag == "" || x.Tag == p.tag) || p.root == "" && x.Tag != "" && x.Tag == p.tag
		if same || x.Tag == "" && p.platform == x.Digest {
			return p
		}
	}
	return nil
}

// member finds the pull whose index names d, or begins one for another platform of it.
func (t *talk) member(d digest.Digest, began time.Time) *pull {
	var other *pull
	for _, p := range t.pulls {
		if !slices.Contains(p.members, d) {
			continue
		}
		if p.platform == "" {
			return p
		}
		other = p
	}
	if other == nil {
		return nil
	}
	return t.begin(&image{name: other.name, tag: other.tag, root: other.root, members: other.members}, began)
}

func (t *talk) failedManifest(x *accel.Transfer, began, now time.Time) {
	if x.Err == nil || errors.Is(x.Err, accel.ErrUnauthenticated) || errors.Is(x.Err, accel.ErrNotFound) {
		return // the client went away, or there is nothing to pull
	}
	p := t.asked(x)
	if p == nil {
		for _, q := range t.pulls {
			if slices.Contains(q.members, x.Digest) {
				p = q
			}
		}
	}
	if p == nil {
		p = t.begin(&image{name: nameOf(t.repository, x.Tag, x.Digest), tag: x.Tag, root: x.Digest}, began)
	}
	p.manifestErr = x.Err.Error()
	p.end = now
	p.say(x, now)
}

func (t *talk) blob(x *accel.Transfer, began, now time.Time) {
	for _, p := range t.pulls {
		if x.Digest == p.config {
			p.configDone(x, now)
			return
		}
	}
	given := bytesOf(x.Tally)
	if given == 0 && x.Err == nil {
		return // nothing was asked for, or nothing given before the client went away
	}
	p := t.wants(x.Digest)
	if p == nil {
		i := t.imageOf(x.Digest)
		if i.config == x.Digest {
			return // of a pull whose layers are all there
		}
		p = t.begin(i, began)
	}
	p.layer(x, given)
	p.end = now
	p.say(x, now)
}

// wants finds the first pull that has the layer and was not given it yet.
func (t *talk) wants(d digest.Digest) *pull {
	for _, p := range t.pulls {
		size, named := p.sizes[d]
		if named && !p.layers[d].delivered(size) {
			return p
		}
	}
	// A blob of no known image goes on where it began.
	for _, p := range t.pulls {
		if _, had := p.layers[d]; had && p.sizes == nil {
			return p
		}
	}
	return nil
}

// imageOf is the image that a blob was seen in last.
func (t *talk) imageOf(blob digest.Digest) *image {
	if i, ok := t.m.known.Get(blobKey{t.repository, blob}); ok {
		return i
	}
	return &image{name: nameOf(t.repository, "", blob)}
}

func nameOf(repository, tag string, d digest.Digest) string {
	if tag != "" {
		return repository + ":" + tag
	}
	return repository + "@" + d.String()
}

func bytesOf(t accel.Tally) int64 {
	return t.CacheBytes + t.RegistryBytes + t.PeerBytes + t.SharedBytes
}
