package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"accel"
	"accel/api"
	"accel/registry"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
	"golang.org/x/time/rate"
)

// candidate is a tag that was pushed before accel was there.
type candidate struct {
	Image   string      `json:"image"`
	Created time.Time   `json:"created,omitzero"` // the image config's; zero for an index without one
	State   accel.State `json:"state,omitempty"`  // after the submission
	Error   string      `json:"error,omitempty"`
}

func newConvertAll(g *globals) *cobra.Command {
	var dryRun, plainHTTP bool
	var perSecond float64
	cmd := &cobra.Command{
		Use: "convert-all REPOSITORY...", Short: "Submit what was pushed before accel was there, newest first",
		Long: `Lists the tags of repositories with the credentials of this machine (docker
config.json, credential helpers) and submits each image to the server, newest first
by the time in its config. What is converted already stays as it is.`,
		Example: "  accel convert-all registry.example/team/app --dry-run\n  accel convert-all registry.example/team/app registry.example/team/db --rate 2",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usage(errors.New("convert-all wants at least one repository, HOST/PATH"))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if perSecond <= 0 {
				return usage(fmt.Errorf("--rate %v: must be positive", perSecond))
			}
			c, err := g.client()
			if err != nil {
				return err
			}
			limit := rate.NewLimiter(rate.Limit(perSecond), 1)
			found, err := candidates(cmd.Context(), args, plainHTTP)
			if err != nil {
				return err
			}
			failed := 0
			for i := range found {
				if dryRun {
					break
				}
				if err := limit.Wait(cmd.Context()); err != nil {
					return err
				}
				if failed += submit(cmd.Context(), c, &found[i]); i%50 == 49 {
					fmt.Fprintf(cmd.ErrOrStderr(), "submitted %d of %d\n", i+1, len(found))
				}
			}
			err = g.print(cmd, found, func(w *tabwriter.Writer) {
				fmt.Fprintln(w, "IMAGE\tCREATED\tSTATE\tERROR")
				for _, f := range found {
					created := "unknown" // many builders write none, for reproducible images
					if f.Created.Year() > 1970 {
						created = f.Created.Local().Format(time.DateTime)
					}
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", f.Image, created, f.State, f.Error)
				}
			})
			if failed > 0 && err == nil {
				err = fmt.Errorf("%d of %d images could not be submitted; see above", failed, len(found))
			}
			return err
		},
	}
	f := cmd.Flags()
	f.BoolVar(&dryRun, "dry-run", false, "list what would be submitted, in order")
	f.Float64Var(&perSecond, "rate", 5, "submissions per second")
	f.BoolVar(&plainHTTP, "plain-http", false, "speak HTTP to the registries, not HTTPS (loopback names always are)")
	return cmd
}

func submit(ctx context.Context, c *api.Client, f *candidate) (failed int) {
	a, err := c.Submit(ctx, f.Image)
	if err != nil {
		f.Error = err.Error()
		return 1
	}
	f.State = a.State
	return 0
}

// candidates lists the image tags of repositories, newest first. accel's own
// output and referrers are left out.
func candidates(ctx context.Context, repositories []string, plainHTTP bool) ([]candidate, error) {
	found := []candidate{}
	for _, repository := range repositories {
		ref, err := accel.ParseReference(repository)
		if err != nil {
			return nil, usage(err)
		}
		client, err := localClient(plainHTTP, ref.Registry)
		if err != nil {
			return nil, err
		}
		defer client.Close()
		tags, err := client.Tags(ctx, ref.Name())
		if err != nil {
			return nil, fmt.Errorf("list the tags of %s: %w", ref.Name(), err)
		}
		for _, tag := range tags {
			if strings.HasPrefix(tag, "sha256-") {
				continue
			}
			c, ok, err := look(ctx, client, ref.Name(), tag)
			if err != nil {
				return nil, fmt.Errorf("look at %s:%s: %w", ref.Name(), tag, err)
			}
			if ok {
				found = append(found, c)
			}
		}
	}
	slices.SortStableFunc(found, func(a, b candidate) int { return b.Created.Compare(a.Created) })
	return found, nil
}

// look says whether a tag is an image to convert, and from when it is.
func look(ctx context.Context, client *registry.Client, repository, tag string) (candidate, bool, error) {
	c := candidate{Image: repository + ":" + tag}
	desc, err := client.Head(ctx, repository, tag)
	if errors.Is(err, accel.ErrNotFound) {
		return c, false, nil // deleted since it was listed
	}
	if err != nil {
		return c, false, err
	}
	m, err := client.Pull(ctx, repository, digest.Digest(desc.Digest.String()))
	if err != nil {
		return c, false, err
	}
	img := m.Image
	var annotations map[string]string
	if m.Index != nil {
		im, err := m.Index.IndexManifest()
		if err != nil {
			return c, false, err
		}
		annotations = im.Annotations
		for _, d := range im.Manifests {
			if img == nil && d.MediaType.IsImage() && (d.Platform == nil || d.Platform.OS != "unknown") {
				if img, err = m.Index.Image(d.Digest); err != nil {
					return c, false, err
				}
			}
		}
	}
	if img == nil {
		return c, false, nil
	}
	manifest, err := img.Manifest()
	if err != nil {
		return c, false, err
	}
	if m.Index == nil {
		annotations = manifest.Annotations
	}
	if annotations[accel.AnnotationSourceDigest] != "" || !manifest.Config.MediaType.IsConfig() {
		return c, false, nil
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		return c, false, err
	}
	c.Created = cfg.Created.UTC()
	return c, true, nil
}
