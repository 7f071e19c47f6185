package worker

import (
	"context"

	"accel/convert"
	"accel/readiness"

	"github.com/opencontainers/go-digest"
)

// verify reads the pushed image back from the registry: every manifest and
// every layer, byte by byte against its digest.
func (k *Worker) verify(ctx context.Context, _ readiness.Work, _ *convert.Result, repository string, d digest.Digest) error {
	return k.Registry.Verify(ctx, repository, d, true)
}
