package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"text/tabwriter"
	"time"

	"accel"
	"accel/api"
	"accel/profile"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
)

func newProfile(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use: "profile", Short: "See and change what is known of images' starts", Args: noArgs,
		Long: `A profile says which parts of which files a start of an image reads, in the order of their
first use; nodes fetch them ahead. docs/profiles.md tells how they come about. IMAGE is a
reference by tag or digest, or the digest of a platform's manifest alone.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(
		newProfileShow(g), newProfileDiff(g), newProfileExport(g), newProfileImport(g), newProfileRm(g),
		newProfileRecord(g),
	)
	return cmd
}

// platformFlag adds --platform.
func platformFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("platform", "", "platform of the image, such as linux/arm64; default: the only one, or this machine's")
}

// platformManifest finds the manifest of one platform of an image.
func (g *globals) platformManifest(ctx context.Context, what, platform string) (*api.Client, digest.Digest, error) {
	c, err := g.client()
	if err != nil {
		return nil, "", err
	}
	if d, err := digest.Parse(what); err == nil {
		return c, d, nil
	}
	img, err := c.Readiness(ctx, what, 0)
	if err != nil {
		return nil, "", err
	}
	var names []string
	for _, p := range img.Profiles {
		names = append(names, p.Platform)
	}
	wanted := platform
	if wanted == "" {
		wanted = "linux/" + runtime.GOARCH
	}
	for _, p := range img.Profiles {
		if p.Platform == wanted || strings.HasPrefix(p.Platform, wanted+"/") || (platform == "" && len(img.Profiles) == 1) {
			return c, digest.Digest(p.Manifest), nil
		}
	}
	if len(names) == 0 {
		return nil, "", fmt.Errorf("%w: nothing is known of the starts of %s, which is %s", accel.ErrNotFound, what, img.State)
	}
	return nil, "", usage(fmt.Errorf("%s has no platform %s; choose one of %s with --platform", what, wanted, strings.Join(names, ", ")))
}

// maxProfileFileBytes bounds what is read as a profile.
const maxProfileFileBytes = profile.MaxEncodedBytes

// readFile reads a file up to a byte more than maxBytes; - is standard input.
func readFile(cmd *cobra.Command, path string, maxBytes int64) ([]byte, error) {
	in := cmd.InOrStdin()
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, maxBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return b, nil
}

func readProfile(cmd *cobra.Command, path string) (accel.Profile, error) {
	b, err := readFile(cmd, path, maxProfileFileBytes)
	if err != nil {
		return accel.Profile{}, err
	}
	p, err := profile.Decode([]byte(strings.TrimSuffix(string(b), "\n")))
	if err != nil {
		return p, fmt.Errorf("%s: %w", path, err)
	}
	return p, nil
}

func newProfileShow(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use: "show IMAGE", Short: "Show what a start of an image reads, in order", Args: exactArgs("IMAGE"),
		Example: "  accel profile show 127.0.0.1:5000/team/app:v1\n  accel profile show 127.0.0.1:5000/team/app:v1 -o json",
	}
	platform := platformFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		p, err := g.profileOf(cmd.Context(), args[0], *platform)
		if err != nil {
			return err
		}
		return g.print(cmd, p, func(w *tabwriter.Writer) {
			fmt.Fprintln(w, "ORDER\tLAYER\tPATH\tRANGE\tBYTES")
			for n, i := range p.Items {
				fmt.Fprintf(w, "%d\t%s\n", n+1, itemText(i))
			}
			fmt.Fprintf(w, "total\t\t%d parts, %s\t\t%d\n", len(p.Items), originText(p), p.Bytes())
		})
	}
	return cmd
}

func itemText(i accel.ProfileItem) string {
	return fmt.Sprintf("%d\t%s\t%d-%d\t%d", i.Layer, printable(i.Path), i.Offset, i.Offset+i.Bytes-1, i.Bytes)
}

// printable keeps names out of the terminal's way: they come from images.
func printable(name string) string {
	if quoted := fmt.Sprintf("%q", name); quoted != `"`+name+`"` {
		return quoted
	}
	return name
}

func originText(p accel.Profile) string {
	if p.Starts == 0 {
		return string(p.Origin)
	}
	return fmt.Sprintf("%s of %d starts until %s", p.Origin, p.Starts, p.RecordedAt.Local().Format(time.DateTime))
}

// profileDifference is what `profile diff -o json` prints.
type profileDifference struct {
	CommonBytes int64               `json:"commonBytes"`
	OnlyFirst   []accel.ProfileItem `json:"onlyFirst"`
	OnlySecond  []accel.ProfileItem `json:"onlySecond"`
}

func newProfileDiff(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use: "diff A B", Short: "Compare two profiles", Args: exactArgs("A", "B"),
		Long: `A and B are images, or files that profile export wrote. Profiles of one image are compared
by layer and path; those of two images by path alone.`,
		Example: "  accel profile diff 127.0.0.1:5000/app:v1 127.0.0.1:5000/app:v2\n  accel profile diff before.json 127.0.0.1:5000/app:v1",
	}
	platform := platformFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var pair [2]accel.Profile
		for n, what := range args {
			var err error
			if pair[n], err = g.profileOrFile(cmd, what, *platform); err != nil {
				return err
			}
		}
		a, b := pair[0], pair[1]
		if a.Manifest != b.Manifest {
			for _, p := range pair {
				for n := range p.Items {
					p.Items[n].Layer = 0
				}
			}
			a, b = profile.Union(a), profile.Union(b) // a path may be in several layers
		}
		d := profileDifference{
			CommonBytes: profile.Coverage(a, b).CoveredBytes,
			OnlyFirst:   notNull(profile.Minus(a, b)), OnlySecond: notNull(profile.Minus(b, a)),
		}
		return g.print(cmd, d, func(w *tabwriter.Writer) {
			fmt.Fprintln(w, "\tLAYER\tPATH\tRANGE\tBYTES")
			for _, i := range d.OnlyFirst {
				fmt.Fprintf(w, "-\t%s\n", itemText(i))
			}
			for _, i := range d.OnlySecond {
				fmt.Fprintf(w, "+\t%s\n", itemText(i))
			}
			fmt.Fprintf(w, "\t\tonly in A\t\t%d\n\t\tonly in B\t\t%d\n\t\tin both\t\t%d\n",
				accel.Profile{Items: d.OnlyFirst}.Bytes(), accel.Profile{Items: d.OnlySecond}.Bytes(), d.CommonBytes)
		})
	}
	return cmd
}

func notNull(items []accel.ProfileItem) []accel.ProfileItem {
	if items == nil {
		return []accel.ProfileItem{}
	}
	return items
}

func (g *globals) profileOrFile(cmd *cobra.Command, what, platform string) (accel.Profile, error) {
	if _, err := os.Stat(what); err == nil || what == "-" {
		return readProfile(cmd, what)
	} else if !errors.Is(err, os.ErrNotExist) && !strings.Contains(what, ":") {
		return accel.Profile{}, err
	}
	return g.profileOf(cmd.Context(), what, platform)
}

// profileOf asks the server for an image's profile.
func (g *globals) profileOf(ctx context.Context, image, platform string) (accel.Profile, error) {
	c, manifest, err := g.platformManifest(ctx, image, platform)
	if err != nil {
		return accel.Profile{}, err
	}
	return c.Profile(ctx, manifest)
}

func newProfileExport(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use: "export IMAGE", Short: "Write an image's profile to standard output, for profile import", Args: exactArgs("IMAGE"),
		Example: "  accel profile export 127.0.0.1:5000/team/app:v1 > app.profile.json",
	}
	platform := platformFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		p, err := g.profileOf(cmd.Context(), args[0], *platform)
		if err != nil {
			return err
		}
		b, err := profile.Encode(p)
		if err != nil {
			return err
		}
		_, err = cmd.OutOrStdout().Write(append(b, '\n'))
		return err
	}
	return cmd
}

func newProfileImport(g *globals) *cobra.Command {
	var paths string
	cmd := &cobra.Command{
		Use: "import IMAGE [FILE]", Short: "Give an image a profile, of this image or another, or a list of files that its starts read",
		Long: `FILE is what profile export wrote. That profile stands until complete starts are recorded from
now on. Parts that the image does not have are passed over.

--paths gives a list instead, a line for each path, directory or pattern (* ? [a-z]) in the image; lines
that begin with # are comments. The files become part of the image's profile for good, whatever is recorded
beside. The list takes the place of the one that was given before; an empty one takes it away.

FILE - is standard input.`,
		Example: `  accel profile import 127.0.0.1:5000/team/app:v2 app.profile.json
  accel profile import 127.0.0.1:5000/team/app:v2 --paths hot-files.txt
  printf '/usr/lib/app/*.so\n/etc/app\n' | accel profile import 127.0.0.1:5000/team/app:v2 --paths -`,
	}
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if cmd.Flags().Changed("paths") {
			return exactArgs("IMAGE")(cmd, args)
		}
		return exactArgs("IMAGE", "FILE")(cmd, args)
	}
	cmd.Flags().StringVar(&paths, "paths", "", "file with a list of paths and patterns, a line each; - is standard input")
	platform := platformFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if cmd.Flags().Changed("paths") {
			return g.listPaths(cmd, args[0], *platform, paths)
		}
		p, err := readProfile(cmd, args[1])
		if err != nil {
			return usage(err)
		}
		c, manifest, err := g.platformManifest(cmd.Context(), args[0], *platform)
		if err != nil {
			return err
		}
		s, err := c.ImportProfile(cmd.Context(), manifest, p)
		if err != nil {
			return err
		}
		return g.print(cmd, s, func(w *tabwriter.Writer) { fmt.Fprintln(w, profileText(s)) })
	}
	return cmd
}

func (g *globals) listPaths(cmd *cobra.Command, image, platform, file string) error {
	list, err := readPaths(cmd, file)
	if err != nil {
		return usage(err)
	}
	c, manifest, err := g.platformManifest(cmd.Context(), image, platform)
	if err != nil {
		return err
	}
	l, err := c.ListPaths(cmd.Context(), manifest, list)
	if err != nil {
		return err
	}
	return g.print(cmd, l, func(w *tabwriter.Writer) {
		fmt.Fprintln(w, profileText(l.ProfileStatus))
		if l.UnmatchedCount > 0 {
			fmt.Fprintf(w, "%d of %d lines mean no file with content in the image:\n", l.UnmatchedCount, len(list))
		}
		for _, p := range l.Unmatched {
			fmt.Fprintln(w, "  "+printable(p))
		}
		if more := l.UnmatchedCount - len(l.Unmatched); more > 0 {
			fmt.Fprintf(w, "  and %d more\n", more)
		}
	})
}

// readPaths reads a list of paths, of which the server takes no more either.
func readPaths(cmd *cobra.Command, file string) (list []string, err error) {
	b, err := readFile(cmd, file, profile.MaxListedBytes)
	if err != nil {
		return nil, err
	}
	if len(b) > profile.MaxListedBytes {
		return nil, fmt.Errorf("%s: a list has at most %d bytes", file, profile.MaxListedBytes)
	}
	for line := range strings.Lines(string(b)) {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		if len(list) == profile.MaxListed {
			return nil, fmt.Errorf("%s: a list has at most %d lines; name directories or patterns instead", file, profile.MaxListed)
		}
		list = append(list, line)
	}
	return list, nil
}

func newProfileRm(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use: "rm IMAGE", Short: "Forget an image's profile with all recorded starts", Args: exactArgs("IMAGE"),
		Long: `The image's next starts are recorded anew; nothing is predicted for it again. Nodes drop what they recorded of it
when they next ask the server for it; what was published in the registry is deleted.`,
		Example: "  accel profile rm 127.0.0.1:5000/team/app:v1",
	}
	platform := platformFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, manifest, err := g.platformManifest(cmd.Context(), args[0], *platform)
		if err != nil {
			return err
		}
		s, err := c.RemoveProfile(cmd.Context(), manifest)
		if err != nil {
			return err
		}
		return g.print(cmd, s, func(w *tabwriter.Writer) { fmt.Fprintln(w, "forgotten:", manifest) })
	}
	return cmd
}

// profileText tells of a profile in a line.
func profileText(p api.ProfileStatus) string {
	words := strings.TrimSpace(p.Platform + " ")
	if p.Origin == "" {
		return words + ": none"
	}
	words += fmt.Sprintf(": %s, %s in %d parts", p.Origin, bytesText(p.Bytes), p.Items)
	if p.Starts > 0 {
		words += fmt.Sprintf("; %d starts reported", p.Starts)
	}
	if c := p.Coverage; c != nil {
		words += fmt.Sprintf(", %.0f %% of what they read was named, %s in vain", 100*c.Share, bytesText(c.VainBytes))
	}
	for _, s := range []struct {
		profile.StatusStarts
		how string
	}{{p.With, "with a profile"}, {p.Without, "without"}} {
		if s.Count > 0 {
			words += fmt.Sprintf("; answered after %.2fs %s (%d)", s.MeanSeconds, s.how, s.Count)
		}
	}
	return words
}
