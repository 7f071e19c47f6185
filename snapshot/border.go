package snapshot

import (
	"context"
	"time"

	"github.com/opencontainers/go-digest"
)

// Request is what containerd tells about a layer that it is about to download. A field that it does
// not tell is empty.
type Request struct {
	// Namespace is containerd's, such as "k8s.io".
	Namespace string
	// Reference is the image as it was asked for, such as "docker.io/library/nginx:1".
	Reference string
	// Manifest is the digest of the platform's manifest, Layer that of the compressed layer.
	Manifest, Layer digest.Digest
	// Layers are the image's from this one upwards, as many as containerd gets into a label (about 55).
	Layers []digest.Digest
	// DiffID is what containerd would check the unpacked layer against; older containerds (1.6) tell it only of an
	// image's first layer. Chain is the snapshot's name: it stands for this layer on those below.
	DiffID, Chain digest.Digest
}

// Lazy is the answer to a Request: the layer to be mounted.
type Lazy struct {
	// Layer names it to Mounts and Pins: its own digest, or that of a converted layer in its place.
	Layer digest.Digest
}

// Images knows which layers can be mounted lazily, and brings what a mount of them needs.
type Images interface {
	// Layer answers before ctx ends. It gives one answer for a whole image, because after one layer that it
	// declines containerd downloads all above. The error is *Declined where the image cannot be had
	// lazily; with any other error containerd downloads too.
	Layer(ctx context.Context, r Request) (Lazy, error)
}

// Declined says that a layer is not mounted lazily, and why.
type Declined struct {
	// Reason is for people: "repository is not on the allowlist".
	Reason string
}

func (d *Declined) Error() string { return "not lazily: " + d.Reason }

// Mounts mounts layers.
type Mounts interface {
	// Mount mounts a layer for reading at target, a directory, before ctx ends. Where that layer is mounted there already it
	// leaves a mount that works as it is, and puts a new one in the place of one that does not, with no moment without
	// either: a reader must not see the empty directory below. What else is mounted there is an error.
	Mount(ctx context.Context, layer digest.Digest, target string) error
	// Unmount takes away everything that is mounted at target; that there is nothing is no error.
	Unmount(ctx context.Context, target string) error
}

// Pins keeps layers from being evicted; what it answers is durable.
type Pins interface {
	// Pin adds layers to what owner holds.
	Pin(owner string, layers ...digest.Digest) error
	// Unpin releases all that owner holds. accel.ErrNotFound where it holds nothing.
	Unpin(owner string) error
}

// ownerPrefix is what the owners of this package's pins begin with.
const ownerPrefix = "snapshot/"

// Owner is the pins' owner for the snapshot with an ID.
func Owner(id string) string { return ownerPrefix + id }

// Kind is what an Event tells.
type Kind string

// Kinds of Event.
const (
	KindMounted  Kind = "mounted"  // a layer was mounted lazily; containerd downloads nothing of it
	KindShared   Kind = "shared"   // it was mounted before, for another namespace or pull
	KindDeclined Kind = "declined" // containerd downloads it
	KindPrepared Kind = "prepared" // a writable snapshot on an image: a container is about to start
)

// Event is something that a meter wants to know.
type Event struct {
	Kind    Kind
	Request Request // empty where Kind is KindPrepared
	// Key is containerd's name of the snapshot; of a container's it ends with the container's ID.
	Key string
	// Layer is the one that was mounted, in whatever form.
	Layer digest.Digest
	// Layers are, where Kind is KindPrepared, those of the image that are mounted lazily, the topmost first.
	Layers []digest.Digest
	// Cause is, where Kind is KindDeclined, one of the Cause constants; Reason says it for people.
	Cause, Reason string
	Began         time.Time
	Took          time.Duration
}

// Causes of a layer's not being mounted lazily.
const (
	CauseImage    = "image"    // Images declined
	CauseLabels   = "labels"   // containerd did not say what layer it is: its configuration lacks a switch
	CauseTimeout  = "timeout"  // no answer within Limit
	CauseError    = "error"    // Images failed
	CauseMount    = "mount"    // the layer could not be pinned or mounted
	CauseConflict = "conflict" // the same chain is mounted from another layer
)
