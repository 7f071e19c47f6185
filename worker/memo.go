package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"accel"
	"accel/convert"
	"accel/readiness"
	"accel/registry"

	"github.com/opencontainers/go-digest"
)

// maxMemoRepositories bounds how many places of one layer are remembered.
const maxMemoRepositories = 8

// layerMemo is the convert.Memo of conversions into one target repository: what
// a layer became is kept in the store, and is good as long as a registry holds it.
type layerMemo struct {
	tracker    *readiness.Tracker
	registry   *registry.Client
	repository string // of the target
}

var _ convert.Memo = layerMemo{}

func memoKey(source digest.Digest, params string) string {
	return "layer\x00" + source.String() + "\x00" + params
}

func (m layerMemo) load(ctx context.Context, source digest.Digest, params string) (l convert.LayerMemo, known bool, err error) {
	raw, err := m.tracker.Memo(ctx, memoKey(source, params))
	if errors.Is(err, accel.ErrNotFound) {
		return l, false, nil
	}
	if err != nil {
		return l, false, err
	}
	if err := json.Unmarshal(raw, &l); err != nil {
		return l, false, fmt.Errorf("memo of layer %s: %w", source, err)
	}
	return l, true, nil
}

// Lookup answers with the repositories that hold the converted layer now.
func (m layerMemo) Lookup(ctx context.Context, source digest.Digest, params string) (convert.LayerMemo, bool, error) {
	l, known, err := m.load(ctx, source, params)
	if !known || err != nil {
		return l, false, err
	}
	candidates := l.Repositories
	if i := slices.Index(candidates, m.repository); i > 0 {
		candidates[0], candidates[i] = candidates[i], candidates[0]
	}
	for _, repository := range candidates {
		size, err := m.registry.HasBlob(ctx, repository, l.Target)
		if err == nil && size == l.TargetBytes {
			l.Repositories = []string{repository}
			return l, true, nil
		}
		if err != nil && !errors.Is(err, accel.ErrNotFound) {
			return l, false, err
		}
	}
	return l, false, nil
}

// Remember adds the target repository to those that hold the layer.
func (m layerMemo) Remember(ctx context.Context, source digest.Digest, params string, l convert.LayerMemo) error {
	old, known, err := m.load(ctx, source, params)
	if err != nil {
		return err
	}
	l.Repositories = []string{m.repository}
	if known && old.Target == l.Target {
		for _, r := range old.Repositories {
			if r != m.repository && len(l.Repositories) < maxMemoRepositories {
				l.Repositories = append(l.Repositories, r)
			}
		}
		if slices.Equal(l.Repositories, old.Repositories) {
			return nil
		}
	}
	raw, err := json.Marshal(l)
	if err != nil {
		return err
	}
	return m.tracker.Remember(ctx, memoKey(source, params), raw)
}
