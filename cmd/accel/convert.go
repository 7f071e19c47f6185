package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"accel"
	"accel/convert"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"
)

// converted is what `accel convert` tells about its work.
type converted struct {
	Source    string        `json:"source"`
	Target    string        `json:"target"`
	Digest    digest.Digest `json:"digest"`
	Unchanged bool          `json:"unchanged" doc:"the source was eStargz already"`
	Result    accel.Result  `json:"result"`
	Seconds   float64       `json:"seconds"`
}

func newConvert(g *globals) *cobra.Command {
	def := defaultConfig()
	chunk, limit := def.Convert.ChunkSize, def.Policy.MaxUncompressedSize
	level := def.Convert.Level
	var platforms []string
	var prioritize string
	var plainHTTP bool
	cmd := &cobra.Command{
		Use: "convert SRC DST", Short: "Convert one image, without a server", Args: exactArgs("SRC", "DST"),
		Long: `SRC and DST are each a registry reference, oci:DIR, oci-archive:FILE or
docker-archive:FILE. Registries are reached with the credentials of this machine.
The same source and options give the same digest, always.

--prioritize is for fleets that run the stock stargz-snapshotter, which fetches the
files that it names before a container starts. Layers that hold such files are no
longer shared with images converted by another list.`,
		Example: `  accel convert registry.example/app:v1 registry.example/app:v1-esgz
  accel convert docker-archive:app.tar oci:./out --platform linux/amd64
  accel convert oci:./image 127.0.0.1:5000/app:v1-esgz --level 9 -o json
  accel convert registry.example/app:v1 registry.example/app:v1-stock --prioritize files.txt`,
		RunE: func(cmd *cobra.Command, args []string) error {
			params := convert.Params{ChunkBytes: int64(chunk), Level: level}
			policy := convert.Policy{Platforms: platforms, MaxUncompressedBytes: int64(limit)}
			first, err := readList(prioritize)
			if err != nil {
				return usage(fmt.Errorf("--prioritize: %w", err))
			}
			out, err := convertOne(cmd.Context(), args[0], args[1], plainHTTP, params, policy, first, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			return g.print(cmd, out, func(w *tabwriter.Writer) {
				fmt.Fprintf(w, "%s\t%s\n", out.Target, out.Digest)
				fmt.Fprintf(w, "%s, was %s, in %.1fs\n", bytesText(out.Result.TargetBytes), bytesText(out.Result.SourceBytes), out.Seconds)
				for _, n := range out.Result.Notes {
					fmt.Fprintln(w, "note:", n)
				}
			})
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&platforms, "platform", nil, "only these platforms, such as linux/amd64; default: all")
	f.IntVar(&level, "level", level, "gzip level, 1 to 9, for what is compressed anew")
	f.Var(sizeFlag{&chunk}, "chunk-size", "uncompressed bytes of a chunk")
	f.Var(sizeFlag{&limit}, "max-uncompressed-size", "refuse larger images")
	f.StringVar(&prioritize, "prioritize", "", "file with one path of the image on each line, in the order in which a start reads them")
	f.BoolVar(&plainHTTP, "plain-http", false, "speak HTTP to registries, not HTTPS (loopback names always are)")
	return cmd
}

// maxListBytes bounds a list of files: 100,000 names of a usual length.
const maxListBytes = 16 << 20

// readList reads lines; empty ones do not count, and no path means no list.
func readList(path string) ([]string, error) {
	if path == "" {
		return nil, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxListBytes+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxListBytes {
		return nil, fmt.Errorf("%s has more than %d bytes", path, maxListBytes)
	}
	var list []string
	for line := range strings.Lines(string(text)) {
		if line = strings.TrimRight(line, "\r\n"); line != "" {
			list = append(list, line)
		}
	}
	return list, nil
}

// sizeFlag is a size as a flag.
type sizeFlag struct{ *size }

func (s sizeFlag) Set(text string) error { return s.UnmarshalText([]byte(text)) }
func (s sizeFlag) Type() string          { return "size" }

func convertOne(ctx context.Context, from, to string, plainHTTP bool, params convert.Params, policy convert.Policy, prioritized []string, progress io.Writer) (_ converted, err error) {
	begin := time.Now()
	out := converted{Source: from, Target: to}
	if sameImage(from, to) {
		return out, usage(fmt.Errorf("%s would overwrite its source; name another tag or repository", to))
	}
	temp, err := os.MkdirTemp("", "accel-convert-")
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }()
	dst, err := openDestination(to, plainHTTP)
	if err != nil {
		return out, err
	}
	src, closeSource, err := openSource(ctx, from, plainHTTP, temp)
	if err != nil {
		return out, fmt.Errorf("open %s: %w", from, err)
	}
	defer closeSource()
	show, done := newProgress(progress)
	c := &convert.Converter{Params: params, Policy: policy, TempDir: temp}
	res, err := c.Convert(ctx, src, convert.Options{Progress: show, Prioritized: prioritized})
	done()
	if err != nil {
		return out, fmt.Errorf("convert %s: %w", from, err)
	}
	defer func() { err = errors.Join(err, res.Close()) }()
	out.Unchanged, out.Result = res.Unchanged, res.Stats
	image := res.Image
	index := res.Index
	if res.Unchanged {
		image, index = src.Image, src.Index
	}
	if out.Digest, err = dst.write(ctx, image, index); err != nil {
		return out, fmt.Errorf("write %s: %w", to, err)
	}
	out.Seconds = time.Since(begin).Seconds()
	return out, nil
}

// sameImage reports whether both name one tag of one registry.
func sameImage(from, to string) bool {
	if from == to {
		return true
	}
	for _, s := range []string{from, to} {
		if _, _, local := transportOf(s); local {
			return false
		}
	}
	a, errA := accel.ParseReference(from)
	b, errB := accel.ParseReference(to)
	return errA == nil && errB == nil && a.Name() == b.Name() && a.Tag != "" && a.Tag == b.Tag
}

// newProgress shows the layers' progress: bars on a terminal, a line for each
// finished layer elsewhere.
func newProgress(w io.Writer) (show func(convert.Progress), done func()) {
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return barProgress(f)
	}
	var mu sync.Mutex
	return func(p convert.Progress) {
		if !p.Done {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		fmt.Fprintf(w, "%s layer %d %.19s converted, %s read\n", p.Platform, p.Index+1, p.Layer, bytesText(p.ReadBytes))
	}, func() {}
}

func barProgress(w io.Writer) (show func(convert.Progress), done func()) {
	bars := mpb.New(mpb.WithOutput(w), mpb.WithWidth(40))
	var mu sync.Mutex
	byLayer := map[digest.Digest]*mpb.Bar{}
	return func(p convert.Progress) {
			mu.Lock()
			defer mu.Unlock()
			bar := byLayer[p.Layer]
			if bar == nil {
				bar = bars.AddBar(p.TotalBytes,
					mpb.PrependDecorators(decor.Name(fmt.Sprintf("%s layer %d %.19s ", p.Platform, p.Index+1, p.Layer))),
					mpb.AppendDecorators(decor.CountersKiloByte("% .1f / % .1f")))
				byLayer[p.Layer] = bar
			}
			bar.SetCurrent(p.ReadBytes)
			if p.Done {
				bar.SetTotal(-1, true)
			}
		}, func() {
			mu.Lock()
			for _, b := range byLayer {
				b.Abort(false) // no effect on those that are complete
			}
			mu.Unlock()
			bars.Wait()
		}
}
