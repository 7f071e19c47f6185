package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"accel"
	"accel/api"
	"accel/bench/report"
	"accel/convert"
	"accel/internal/debimage"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// pushToReady compares the time from the end of a push to Ready with reading,
// converting and writing the same image locally.
func pushToReady(ctx context.Context, dir string, r *report.Report) error {
	const rounds = 3
	var service, local []time.Duration
	for i := range rounds {
		img, err := debian(ctx, i)
		if err != nil {
			return err
		}
		l, err := convertLocally(ctx, filepath.Join(dir, fmt.Sprintf("local%d", i)), img)
		if err != nil {
			return fmt.Errorf("convert locally: %w", err)
		}
		s, err := pushAndWait(ctx, filepath.Join(dir, fmt.Sprintf("up%d", i)), img)
		if err != nil {
			return fmt.Errorf("push and wait: %w", err)
		}
		service, local = append(service, s), append(local, l)
	}
	slices.Sort(service)
	slices.Sort(local)
	note := fmt.Sprintf("median of %d, Debian minbase image", rounds)
	r.Add("push to Ready", service[rounds/2].Seconds(), "s", note)
	r.Add("local read + convert + write", local[rounds/2].Seconds(), "s", note)
	r.AtMost("overhead of the service", (service[rounds/2] - local[rounds/2]).Seconds(), 1, "s", note)
	return nil
}

// debian is the Debian minbase, a new image in each round.
func debian(ctx context.Context, round int) (v1.Image, error) {
	full, err := debimage.Minbase(ctx, os.Stderr)
	if err != nil {
		return nil, err
	}
	layers, err := full.Layers()
	if err != nil {
		return nil, err
	}
	img, err := mutate.AppendLayers(empty.Image, layers[0])
	if err != nil {
		return nil, err
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture, cfg.Author = "linux", "amd64", fmt.Sprintf("round %d", round)
	return mutate.ConfigFile(img, cfg)
}

func convertLocally(ctx context.Context, dir string, img v1.Image) (time.Duration, error) {
	begin := time.Now()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return 0, err
	}
	c := &convert.Converter{Params: convert.DefaultParams(), TempDir: dir}
	res, err := c.Convert(ctx, convert.Source{Repository: "local/app", Image: img}, convert.Options{})
	if err != nil {
		return 0, err
	}
	path, err := layout.Write(filepath.Join(dir, "out"), empty.Index)
	if err != nil {
		return 0, err
	}
	if err := errors.Join(path.AppendImage(res.Image), res.Close()); err != nil {
		return 0, err
	}
	return time.Since(begin), nil
}

func pushAndWait(ctx context.Context, dir string, img v1.Image) (time.Duration, error) {
	address, err := freeAddress(ctx)
	if err != nil {
		return 0, err
	}
	registry, err := freeAddress(ctx)
	if err != nil {
		return 0, err
	}
	p, err := start(ctx, address, "up", "--data", dir, "--listen", address, "--registry-listen", registry)
	if err != nil {
		return 0, err
	}
	image := registry + "/bench/debian:v1"
	ref, err := name.ParseReference(image, name.Insecure)
	if err != nil {
		return 0, err
	}
	if err := remote.Write(ref, img, remote.WithContext(ctx)); err != nil {
		return 0, err
	}
	begin := time.Now()
	client, err := api.NewClient(p.url)
	if err != nil {
		return 0, err
	}
	got, err := client.Wait(ctx, image, 5*time.Minute)
	took := time.Since(begin)
	if err == nil && got.State != accel.Ready {
		err = fmt.Errorf("%s is %s: %s", image, got.State, got.Reason)
	}
	if err != nil {
		return 0, fmt.Errorf("%w\n%s", err, p.log.String())
	}
	return took, p.stop()
}
