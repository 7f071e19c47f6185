package main

import (
	"errors"
	"fmt"
	"os"
	"text/tabwriter"

	"accel/convert"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/spf13/cobra"
)

func newDiff(g *globals) *cobra.Command {
	var platform string
	var plainHTTP bool
	var sample size
	cmd := &cobra.Command{
		Use: "diff A B", Short: "Compare two images as file trees", Args: exactArgs("A", "B"),
		Long: `Compares names (as bytes), types, modes, owners, times in whole seconds, extended
attributes, links with their identity, devices, whiteouts, sizes and contents, and
says in words what differs. A and B are named as for convert. Exit codes: 0 equal,
1 different, 2 wrong usage.`,
		Example: "  accel diff registry.example/app:v1 registry.example/app:v1-esgz\n  accel diff oci:./a oci:./b --platform linux/arm64 -o json",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			temp, err := os.MkdirTemp("", "accel-diff-")
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, os.RemoveAll(temp)) }()
			var images [2]v1.Image
			for i, from := range args {
				sub := fmt.Sprintf("%s/%d", temp, i)
				src, closeSource, err := openSource(cmd.Context(), from, plainHTTP, sub)
				if err != nil {
					return fmt.Errorf("open %s: %w", from, err)
				}
				defer closeSource()
				if images[i], err = platformImage(src, platform); err != nil {
					return fmt.Errorf("%s: %w", from, err)
				}
			}
			diffs, err := convert.Diff(cmd.Context(), images[0], images[1], convert.DiffOptions{SampleBytes: int64(sample)})
			if err != nil {
				return err
			}
			if diffs == nil {
				diffs = []convert.Difference{}
			}
			err = g.print(cmd, diffs, func(w *tabwriter.Writer) {
				for _, d := range diffs {
					fmt.Fprintln(w, d)
				}
			})
			if err == nil && len(diffs) > 0 {
				err = fmt.Errorf("%d differences", len(diffs))
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&platform, "platform", "linux/amd64", "which platform of an index")
	f.Var(sizeFlag{&sample}, "sample", "compare about so many bytes of each layer only; 0: all")
	f.BoolVar(&plainHTTP, "plain-http", false, "speak HTTP to registries, not HTTPS (loopback names always are)")
	return cmd
}

// platformImage takes the image of one platform.
func platformImage(src convert.Source, platform string) (v1.Image, error) {
	if src.Image != nil {
		return src.Image, nil
	}
	want, err := v1.ParsePlatform(platform)
	if err != nil {
		return nil, usage(fmt.Errorf("--platform %q: %w", platform, err))
	}
	m, err := src.Index.IndexManifest()
	if err != nil {
		return nil, err
	}
	for _, d := range m.Manifests {
		if d.Platform != nil && d.Platform.Satisfies(*want) {
			return src.Index.Image(d.Digest)
		}
	}
	return nil, fmt.Errorf("the index has no platform %s", platform)
}
