package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"accel"
	"accel/api"

	"github.com/spf13/cobra"
)

func newWait(g *globals) *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "wait IMAGE", Short: "Wait until an image is Ready, and print its target", Args: exactArgs("IMAGE"),
		Long: `Waits until an image's state is final. One that was not pushed yet is waited for
too. Exit codes: 0 Ready, and the target is printed; 1 Failed or Rejected, with the
reason; 2 wrong usage; 3 the timeout came first.`,
		Example: `  accel wait 127.0.0.1:5000/team/app:v1
  accel wait registry.example/app@sha256:... --timeout 5m -o json`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.client()
			if err != nil {
				return err
			}
			img, err := c.Wait(cmd.Context(), args[0], timeout)
			switch {
			case errors.Is(err, accel.ErrInvalid):
				return usage(err)
			case errors.Is(err, context.DeadlineExceeded):
				state := "not known to " + c.Server()
				if img.State != "" {
					state = strings.TrimSuffix(string(img.State)+": "+img.Reason, ": ")
				}
				return exitError{fmt.Errorf("%s is not final after %s; it is %s%s", args[0], timeout, state, lastCause(err)), exitTimeout}
			case err != nil:
				return err
			}
			if img.State != accel.Ready {
				if g.output == "json" {
					if err := g.print(cmd, img, nil); err != nil {
						return err
					}
				}
				return fmt.Errorf("%s is %s: %s", args[0], img.State, strings.TrimPrefix(img.Rule+": "+img.Reason, ": "))
			}
			return g.print(cmd, img, func(w *tabwriter.Writer) { fmt.Fprintln(w, targetOf(img)) })
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 10*time.Minute, "how long to wait; 0 waits for ever")
	return cmd
}

// lastCause says why the server could not be asked, where that is the reason.
func lastCause(err error) string {
	var words []string
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range joined.Unwrap() {
			if !errors.Is(e, context.DeadlineExceeded) && !errors.Is(e, accel.ErrNotFound) {
				words = append(words, e.Error())
			}
		}
	}
	if len(words) == 0 {
		return ""
	}
	return " (" + strings.Join(words, "; ") + ")"
}

// targetOf is the reference that a person would deploy: by tag where there is
// one, with the digest.
func targetOf(img api.Image) string {
	if img.Target == nil {
		return ""
	}
	if len(img.Target.Tags) > 0 {
		return img.Target.Repository + ":" + img.Target.Tags[0] + "@" + img.Target.Digest
	}
	return img.Target.Image
}

func newStatus(g *globals) *cobra.Command {
	return &cobra.Command{
		Use: "status IMAGE", Short: "Show how an image stands", Args: exactArgs("IMAGE"),
		Example: "  accel status 127.0.0.1:5000/team/app:v1\n  accel status 127.0.0.1:5000/team/app:v1 -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.client()
			if err != nil {
				return err
			}
			img, err := c.Readiness(cmd.Context(), args[0], 0)
			if err != nil {
				return err
			}
			return g.print(cmd, img, func(w *tabwriter.Writer) { describe(w, img) })
		},
	}
}

func describe(w *tabwriter.Writer, img api.Image) {
	row := func(name string, value any) {
		if s := fmt.Sprint(value); s != "" && s != "[]" && s != "0" {
			fmt.Fprintf(w, "%s\t%s\n", name, s)
		}
	}
	row("state", img.State)
	row("rule", img.Rule)
	row("reason", img.Reason)
	row("image", img.Image)
	row("tags", strings.Join(img.Tags, " "))
	row("target", targetOf(img))
	if img.NextTry != nil {
		row("next try", img.NextTry.Local().Format(time.DateTime))
	}
	row("attempts", img.Attempts)
	row("id", img.ID)
	row("successor", img.Successor)
	row("pushed", img.CreatedAt.Local().Format(time.DateTime))
	if s := img.Sizes; s != nil {
		row("size", fmt.Sprintf("%s, was %s; %s uncompressed", bytesText(s.TargetBytes), bytesText(s.SourceBytes), bytesText(s.UncompressedBytes)))
	}
	if t := img.Timings; t != nil {
		row("took", fmt.Sprintf("%.1fs: queued %.1fs, convert %.1fs, push %.1fs, verify %.1fs", t.TotalSeconds, t.QueuedSeconds, t.ConvertSeconds, t.PushSeconds, t.VerifySeconds))
	}
	row("platforms", strings.Join(img.Platforms, " "))
	for _, n := range img.Notes {
		row("note", n)
	}
	for _, p := range img.Profiles {
		row("profile", profileText(p))
	}
	if img.Previous != nil {
		row("previous", targetOf(*img.Previous))
	}
}

func bytesText(n int64) string {
	switch {
	case n >= 1e9:
		return fmt.Sprintf("%.2f GB", float64(n)/1e9)
	case n >= 1e6:
		return fmt.Sprintf("%.1f MB", float64(n)/1e6)
	default:
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	}
}

func newImages(g *globals) *cobra.Command {
	var state, repository string
	var limit int
	cmd := &cobra.Command{
		Use: "images", Short: "List images, newest first", Args: noArgs,
		Example: "  accel images\n  accel images --state Failed\n  accel images --repository 127.0.0.1:5000/team/app -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if state != "" && !accel.State(state).Valid() {
				return usage(fmt.Errorf("--state %q: want one of %v", state, accel.States))
			}
			c, err := g.client()
			if err != nil {
				return err
			}
			images := []api.Image{}
			for img, err := range c.Images(cmd.Context(), api.ListOptions{State: accel.State(state), Repository: repository}) {
				if err != nil {
					return err
				}
				if images = append(images, img); limit > 0 && len(images) == limit {
					break
				}
			}
			return g.print(cmd, images, func(w *tabwriter.Writer) {
				fmt.Fprintln(w, "STATE\tREPOSITORY\tTAGS\tDIGEST\tAGE\tID\tREASON")
				for _, img := range images {
					fmt.Fprintf(w, "%s\t%s\t%s\t%.19s\t%s\t%s\t%s\n", img.State, img.Repository, strings.Join(img.Tags, ","), img.Digest,
						time.Since(img.CreatedAt).Round(time.Second), img.ID, img.Reason)
				}
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&state, "state", "", "only images in this state")
	f.StringVar(&repository, "repository", "", "only images of this repository (host/path)")
	f.IntVar(&limit, "limit", 100, "at most so many; 0: all")
	return cmd
}

// image turns an image's id or reference into its id, with the client to ask.
func (g *globals) image(ctx context.Context, what string) (*api.Client, string, error) {
	c, err := g.client()
	if err != nil || !strings.ContainsAny(what, "/:@") {
		return c, what, err
	}
	img, err := c.Readiness(ctx, what, 0)
	return c, img.ID, err
}

func newRetry(g *globals) *cobra.Command {
	return &cobra.Command{
		Use: "retry IMAGE|ID", Short: "Try an image again now", Args: exactArgs("IMAGE|ID"),
		Long:    "For an image that Failed, was Rejected (after the policy was changed) or Superseded, or waits for its next try.",
		Example: "  accel retry 127.0.0.1:5000/team/app:v1",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, id, err := g.image(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			img, err := c.Retry(cmd.Context(), id)
			if err != nil {
				return err
			}
			return g.print(cmd, img, func(w *tabwriter.Writer) { fmt.Fprintln(w, img.State, img.Image) })
		},
	}
}

func newDelete(g *globals) *cobra.Command {
	var target bool
	cmd := &cobra.Command{
		Use: "delete IMAGE|ID", Short: "Forget an image, and remove its converted form on demand", Args: exactArgs("IMAGE|ID"),
		Long: `The source image is never touched. In a repository that is reconciled (all of them
with accel up) the image comes back at the next search for as long as its tag stands.`,
		Example: "  accel delete 127.0.0.1:5000/team/app:v1 --target",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, id, err := g.image(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			img, err := c.Delete(cmd.Context(), id, target)
			if err != nil {
				return err
			}
			return g.print(cmd, img, func(w *tabwriter.Writer) { fmt.Fprintln(w, "deleted", img.Image) })
		},
	}
	cmd.Flags().BoolVar(&target, "target", false, "remove the converted image from the registry too")
	return cmd
}

func newGC(g *globals) *cobra.Command {
	var dryRun bool
	cmd := &cobra.Command{
		Use: "gc", Short: "Remove converted images whose source is gone", Args: noArgs,
		Example: "  accel gc --dry-run",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := g.client()
			if err != nil {
				return err
			}
			orphans, err := c.GC(cmd.Context(), dryRun)
			if err != nil {
				return err
			}
			err = g.print(cmd, orphans, func(w *tabwriter.Writer) {
				fmt.Fprintln(w, "REMOVED\tTARGET\tSOURCE\tREASON")
				for _, o := range orphans {
					fmt.Fprintf(w, "%t\t%s\t%s\t%s\n", o.Removed, o.Target, o.Image, strings.TrimSuffix(o.Reason+": "+o.Error, ": "))
				}
			})
			for _, o := range orphans {
				if o.Error != "" && err == nil {
					err = errors.New("some targets could not be removed; see above")
				}
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "list only")
	return cmd
}
