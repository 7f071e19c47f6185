package snapshot

import (
	"context"
	"fmt"
	"maps"
	"strings"

	"accel"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/opencontainers/go-digest"
)

// Labels of a lazy snapshot in the metastore, beside those that containerd gave.
const (
	// labelRemote is what other remote snapshotters set too; tools look for it.
	labelRemote = "containerd.io/snapshot/remote"
	valueRemote = "remote snapshot"

	labelPrefix = "dev.accel/"
	// labelLayer: the layer that is mounted. On an active snapshot: the answer has not been given yet.
	labelLayer = labelPrefix + "layer"
	// labelNamespace: containerd's namespace for which it was made.
	labelNamespace = labelPrefix + "namespace"
	// labelAside: why it must not be used any more.
	labelAside = labelPrefix + "set-aside"
)

// maxReasonBytes bounds what a label or an event keeps of an error.
const maxReasonBytes = 1024

// requestLabels are those that a Request is made of; a lazy snapshot keeps them whatever
// Update is told, because a later daemon resolves the layer by them.
var requestLabels = []string{
	snapshotters.TargetRefLabel, snapshotters.TargetManifestDigestLabel, snapshotters.TargetLayerDigestLabel,
	snapshotters.TargetImageLayersLabel, snapshots.LabelSnapshotDiffID, snapshots.LabelSnapshotRef,
}

// requestOf reads containerd's labels for a layer on parent, which is empty for an image's first. The error
// wraps accel.ErrInvalid.
func requestOf(namespace, parent string, labels map[string]string) (Request, error) {
	r := Request{Namespace: namespace, Reference: labels[snapshotters.TargetRefLabel]}
	for _, f := range []struct {
		label string
		to    *digest.Digest
		must  bool
	}{
		{snapshots.LabelSnapshotRef, &r.Chain, true},
		{snapshotters.TargetLayerDigestLabel, &r.Layer, true},
		{snapshotters.TargetManifestDigestLabel, &r.Manifest, false},
		{snapshots.LabelSnapshotDiffID, &r.DiffID, false},
	} {
		value, told := labels[f.label]
		if !told && !f.must {
			continue
		}
		d, err := digest.Parse(value)
		if err != nil {
			return Request{}, fmt.Errorf("%w: label %s of containerd is %q: %w", accel.ErrInvalid, f.label, value, err)
		}
		*f.to = d
	}
	if r.Reference == "" {
		return Request{}, fmt.Errorf("%w: containerd did not give the label %s", accel.ErrInvalid, snapshotters.TargetRefLabel)
	}
	if r.DiffID == "" && parent == "" {
		r.DiffID = r.Chain
	}
	if list := labels[snapshotters.TargetImageLayersLabel]; list != "" {
		for one := range strings.SplitSeq(list, ",") {
			d, err := digest.Parse(one)
			if err != nil {
				return Request{}, fmt.Errorf("%w: label %s of containerd has %q: %w", accel.ErrInvalid, snapshotters.TargetImageLayersLabel, one, err)
			}
			r.Layers = append(r.Layers, d)
		}
	}
	return r, nil
}

// namespaceOf is containerd's namespace of a call, empty where the caller has none.
func namespaceOf(ctx context.Context) string {
	ns, _ := namespaces.Namespace(ctx)
	return ns
}

// lazyLabels are those of a lazy snapshot.
func lazyLabels(given map[string]string, namespace string, layer digest.Digest) map[string]string {
	labels := maps.Clone(given)
	labels[labelRemote], labels[labelLayer] = valueRemote, layer.String()
	if namespace != "" {
		labels[labelNamespace] = namespace
	}
	return labels
}

// keep puts back what an update must not take from a lazy snapshot.
func keep(updated, before map[string]string) map[string]string {
	if before[labelLayer] == "" {
		return updated
	}
	kept := maps.Clone(updated)
	if kept == nil {
		kept = map[string]string{}
	}
	for name, value := range before {
		if strings.HasPrefix(name, labelPrefix) {
			kept[name] = value
		}
	}
	for _, name := range append([]string{labelRemote}, requestLabels...) {
		if value, had := before[name]; had {
			kept[name] = value
		}
	}
	return kept
}

// shorten bounds what is kept of an error.
func shorten(reason string) string {
	if len(reason) > maxReasonBytes {
		return strings.ToValidUTF8(reason[:maxReasonBytes], "") + "…"
	}
	return reason
}
