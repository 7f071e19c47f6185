package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"accel/cache"
	"accel/node"
	"accel/registry"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// contents is a node's cache, asked of the daemon or opened on a stopped one.
type contents interface {
	List(ctx context.Context) ([]node.Blob, error)
	Usage(ctx context.Context) (node.Usage, error)
	Stat(ctx context.Context, what string) (node.Content, error)
	Check(ctx context.Context, progress func(done, total int64)) (cache.Report, error)
	GC(ctx context.Context) (cache.Report, error)
	Pin(ctx context.Context, what string) (node.Content, error)
	Unpin(ctx context.Context, what string) error
	Remove(ctx context.Context, what string) (cache.Report, error)
}

func newCache(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use: "cache", Short: "Look at this machine's cache, and steer it",
		Long: `Asks the node where it runs, and opens its folder where it does not; the answers are
the same. Images are named as ever (HOST/PATH:TAG or @DIGEST), blobs by digest.`,
		Example: "  accel cache stat\n  accel cache ls\n  accel cache stat registry.example/app:v1\n  accel cache pin registry.example/app:v1\n  accel cache check",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usage(fmt.Errorf("unknown command %q; see accel cache --help", args[0]))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	flags := bindNode(cmd.PersistentFlags(), "data", "socket")
	with := func(cmd *cobra.Command, do func(context.Context, contents) error) error {
		conf, err := g.loadNode(cmd, flags)
		if err != nil {
			return usage(err)
		}
		return conf.withContents(cmd.Context(), newLogger(conf.Log, cmd.ErrOrStderr()), do)
	}
	cmd.AddCommand(newCacheList(g, with), newCacheStat(g, with), newCacheCheck(g, with), newCacheGC(g, with), newCachePin(g, with), newCacheUnpin(g, with), newCacheRemove(g, with))
	return cmd
}

// withContents asks the daemon where one answers, and opens the folder otherwise.
func (c *nodeConfig) withContents(ctx context.Context, log *slog.Logger, do func(context.Context, contents) error) error {
	live := node.NewClient(c.Socket)
	defer live.Close()
	_, err := live.Status(ctx)
	if err == nil {
		return do(ctx, live)
	}
	if !errors.Is(err, node.ErrNotRunning) {
		return err
	}
	if _, err := os.Stat(c.Data); err != nil {
		return fmt.Errorf("no node runs (nobody answers on %s), and there is no cache: %w; name its folder with --data or its configuration with --config", c.Socket, err)
	}
	hosts, err := registryHosts(c.Registries)
	if err != nil {
		return usage(err)
	}
	client, err := registry.New(registry.Options{Hosts: hosts, AllowAny: true}) // for names alone; nothing is contacted
	if err != nil {
		return usage(err)
	}
	defer client.Close()
	err = node.Offline(ctx, node.OfflineOptions{
		Dir: c.Data, BudgetBytes: int64(c.Cache.Budget), FreeFloorBytes: int64(c.Cache.FreeFloor), Canonical: client.Canonical, Log: log,
	}, func(ctx context.Context, stopped *node.Contents) error { return do(ctx, stopped) })
	if errors.Is(err, cache.ErrLocked) {
		return fmt.Errorf("%w, but nobody answers on %s; name the node's socket with --socket", err, c.Socket)
	}
	return err
}

// withCache runs do on a node's cache.
type withCache func(cmd *cobra.Command, do func(context.Context, contents) error) error

func newCacheList(g *globals, with withCache) *cobra.Command {
	return &cobra.Command{
		Use: "ls", Short: "List blobs and layers, those used last first", Args: noArgs, Example: "  accel cache ls\n  accel cache ls -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return with(cmd, func(ctx context.Context, c contents) error {
				blobs, err := c.List(ctx)
				if err != nil {
					return err
				}
				return g.print(cmd, blobs, func(w *tabwriter.Writer) { showBlobs(w, blobs) })
			})
		},
	}
}

func showBlobs(w *tabwriter.Writer, blobs []node.Blob) {
	fmt.Fprintln(w, "DIGEST\tFORM\tSIZE\tHERE\tUSED\tSTATE\tPINNED BY")
	for _, b := range blobs {
		here, used := "nothing", ""
		switch {
		case b.Complete:
			here = "all"
		case b.Chunks > 0:
			here = fmt.Sprintf("%s, %d of %d chunks", bytesText(b.PresentBytes), b.PresentChunks, b.Chunks)
		case b.PresentBytes > 0:
			here = bytesText(b.PresentBytes)
		}
		if !b.UsedAt.IsZero() {
			used = b.UsedAt.Local().Format(time.DateTime)
		}
		state := "idle"
		switch {
		case b.Filling:
			state = "filling"
		case b.Readers > 0:
			state = "read"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", b.Digest, b.Form, bytesText(b.SizeBytes), here, used, state, strings.Join(b.PinnedBy, " "))
	}
}

func newCacheStat(g *globals, with withCache) *cobra.Command {
	return &cobra.Command{
		Use: "stat [IMAGE|DIGEST]", Short: "Show how full the cache is, or what it has of an image or blob",
		Example: "  accel cache stat\n  accel cache stat registry.example/app:v1\n  accel cache stat sha256:... -o json",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usage(errors.New("accel cache stat wants at most one IMAGE or DIGEST"))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return with(cmd, func(ctx context.Context, c contents) error {
				if len(args) == 0 {
					u, err := c.Usage(ctx)
					if err != nil {
						return err
					}
					return g.print(cmd, u, func(w *tabwriter.Writer) { showUsage(w, u) })
				}
				content, err := c.Stat(ctx, args[0])
				if err != nil {
					return err
				}
				return g.print(cmd, content, func(w *tabwriter.Writer) { showContent(w, content) })
			})
		},
	}
}

func showUsage(w *tabwriter.Writer, u node.Usage) {
	budget := "none"
	if u.BudgetBytes > 0 {
		budget = bytesText(u.BudgetBytes)
	}
	fmt.Fprintf(w, "used\t%s\n", bytesText(u.UsedBytes))
	fmt.Fprintf(w, "budget\t%s\n", budget)
	fmt.Fprintf(w, "free on disk\t%s\n", bytesText(u.FreeBytes))
	fmt.Fprintf(w, "pinned\t%s\n", bytesText(u.PinnedBytes))
	fmt.Fprintf(w, "blobs\t%d, of which %d complete\n", u.Blobs, u.CompleteBlobs)
	fmt.Fprintf(w, "layers\t%d, of which %d complete\n", u.Layers, u.CompleteLayers)
	for owner, held := range u.Pins {
		fmt.Fprintf(w, "pin\t%s holds %d digests\n", owner, len(held))
	}
}

func showContent(w *tabwriter.Writer, c node.Content) {
	state := "not complete"
	if c.Complete {
		state = "complete"
	}
	fmt.Fprintf(w, "%s\n%s, %s\n\n", c.Image, c.Digest, state)
	showBlobs(w, c.Blobs)
}

func newCacheCheck(g *globals, with withCache) *cobra.Command {
	return &cobra.Command{
		Use: "check", Short: "Read everything again, and drop what is damaged", Args: noArgs, Example: "  accel cache check",
		Long: "Exit codes: 0 all is well, 1 something was damaged (it was dropped, and is fetched again when it is asked for).",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return with(cmd, func(ctx context.Context, c contents) error {
				r, err := c.Check(ctx, checkProgress(cmd))
				if err != nil {
					return err
				}
				err = g.print(cmd, r, func(w *tabwriter.Writer) { showReport(w, r) })
				if err == nil && len(r.Damaged) > 0 {
					err = fmt.Errorf("%d blobs or layers were damaged and dropped", len(r.Damaged))
				} else if err == nil && r.WrongChunks > 0 {
					err = fmt.Errorf("%d chunks of layers were damaged, and are fetched again", r.WrongChunks)
				}
				return err
			})
		},
	}
}

// checkProgress shows how far a check is, on a terminal.
func checkProgress(cmd *cobra.Command) func(done, total int64) {
	f, ok := cmd.ErrOrStderr().(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return nil
	}
	return func(done, total int64) {
		end := ""
		if done == total {
			end = "\n"
		}
		fmt.Fprintf(f, "\r%s of %s %s", bytesText(done), bytesText(total), end)
	}
}

func showReport(w *tabwriter.Writer, r cache.Report) {
	row := func(name string, n int, bytes int64) {
		switch {
		case bytes > 0:
			fmt.Fprintf(w, "%s\t%d\t%s\n", name, n, bytesText(bytes))
		case n > 0:
			fmt.Fprintf(w, "%s\t%d\n", name, n)
		}
	}
	row("checked", r.CheckedBlobs+r.CheckedLayers, r.CheckedBytes)
	row("of which layers", r.CheckedLayers, 0)
	row("not complete, so not checked", r.PartialBlobs, 0)
	row("layers whose chunks were not checked", r.UncheckedLayers, 0)
	row("damaged chunks", r.WrongChunks, 0)
	row("taken back into the index", r.AdoptedBlobs+r.AdoptedLayers, 0)
	row("removed blobs", r.RemovedBlobs, 0)
	row("removed layers", r.RemovedLayers, 0)
	row("removed files", r.RemovedFiles, 0)
	row("freed", r.RemovedBlobs+r.RemovedLayers+r.RemovedFiles, r.FreedBytes)
	for _, d := range r.Damaged {
		fmt.Fprintf(w, "damaged\t%s\n", d)
	}
	if r.CheckedBlobs+r.CheckedLayers+r.PartialBlobs+r.UncheckedLayers+r.AdoptedBlobs+r.AdoptedLayers+r.RemovedBlobs+r.RemovedLayers+r.RemovedFiles+len(r.Damaged) == 0 {
		fmt.Fprintln(w, "nothing to do")
	}
}

func newCacheGC(g *globals, with withCache) *cobra.Command {
	return &cobra.Command{
		Use: "gc", Short: "Evict down to the budget, and remove what is of no use", Args: noArgs, Example: "  accel cache gc",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return with(cmd, func(ctx context.Context, c contents) error {
				r, err := c.GC(ctx)
				if err != nil {
					return err
				}
				return g.print(cmd, r, func(w *tabwriter.Writer) { showReport(w, r) })
			})
		},
	}
}

func newCachePin(g *globals, with withCache) *cobra.Command {
	return &cobra.Command{
		Use: "pin IMAGE|DIGEST", Short: "Keep an image or a blob from being evicted", Args: exactArgs("IMAGE|DIGEST"),
		Long: `On a running node, what is missing of an image is fetched first; on a stopped one
all of it has to be there. What the tag points to now is pinned, not what it may point to later.`,
		Example: "  accel cache pin registry.example/app:v1",
		RunE: func(cmd *cobra.Command, args []string) error {
			return with(cmd, func(ctx context.Context, c contents) error {
				content, err := c.Pin(ctx, args[0])
				if err != nil {
					return err
				}
				return g.print(cmd, content, func(w *tabwriter.Writer) { showContent(w, content) })
			})
		},
	}
}

func newCacheUnpin(g *globals, with withCache) *cobra.Command {
	return &cobra.Command{
		Use: "unpin IMAGE|DIGEST", Short: "Release what was pinned by this name", Args: exactArgs("IMAGE|DIGEST"),
		Example: "  accel cache unpin registry.example/app:v1",
		RunE: func(cmd *cobra.Command, args []string) error {
			return with(cmd, func(ctx context.Context, c contents) error {
				if err := c.Unpin(ctx, args[0]); err != nil {
					return err
				}
				return g.print(cmd, map[string]string{"unpinned": args[0]}, func(w *tabwriter.Writer) { fmt.Fprintln(w, "unpinned", args[0]) })
			})
		},
	}
}

func newCacheRemove(g *globals, with withCache) *cobra.Command {
	return &cobra.Command{
		Use: "rm IMAGE|DIGEST", Short: "Drop what there is of an image or a blob", Args: exactArgs("IMAGE|DIGEST"),
		Long: `What is pinned, mounted, or being read stays, and then nothing is dropped. A layer that other
images have too goes with this one; it is fetched again when it is asked for.`,
		Example: "  accel cache rm registry.example/app:v1",
		RunE: func(cmd *cobra.Command, args []string) error {
			return with(cmd, func(ctx context.Context, c contents) error {
				r, err := c.Remove(ctx, args[0])
				if err != nil {
					return err
				}
				return g.print(cmd, r, func(w *tabwriter.Writer) { showReport(w, r) })
			})
		},
	}
}
