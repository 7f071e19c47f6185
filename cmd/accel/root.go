package main

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"text/tabwriter"

	"accel/api"

	"github.com/spf13/cobra"
)

// globals are the flags that every verb has.
type globals struct {
	output    string
	server    string
	token     string
	tokenFile string
}

func newRoot() *cobra.Command {
	g := &globals{}
	root := &cobra.Command{
		Use:   "accel",
		Short: "Make container images start before they are pulled",
		Long: `accel turns pushed container images into lazily loadable eStargz ones, and says
when they are ready.

Exit codes: 0 it worked, 1 it did not (or the image Failed or was Rejected),
2 wrong usage or configuration, 3 timeout (wait only).`,
		Example: `  accel up                                         # everything in one process, registry included
  accel wait 127.0.0.1:5000/team/app:v1            # until it is Ready
  accel convert registry.example/app:v1 oci:./out  # one image, no server`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       version(),
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usage(fmt.Errorf("unknown command %q; see accel --help", args[0]))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage(err) })
	f := root.PersistentFlags()
	f.StringVarP(&g.output, "output", "o", "table", "result format: table or json; csv too where a verb's help says so")
	f.StringVar(&g.server, "server", envOr("ACCEL_SERVER", "http://127.0.0.1:8080"), "URL of the accel server (ACCEL_SERVER)")
	f.StringVar(&g.token, "token", "", "bearer token of the API (ACCEL_TOKEN)")
	f.StringVar(&g.tokenFile, "token-file", "", "file that holds the token")
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		_, lists := cmd.Annotations[listsCSV]
		if g.output != "table" && g.output != "json" && (g.output != "csv" || !lists) {
			return usage(fmt.Errorf("--output %q: want table or json", g.output))
		}
		return nil
	}
	root.AddCommand(
		newUp(), newServe(),
		newWait(g), newStatus(g), newImages(g), newRetry(g), newDelete(g), newGC(g), newConvertAll(g),
		newNodes(g), newWarm(g), newPulls(g), newUsage(g), newProfile(g),
		newConvert(g), newDiff(g), newKeys(g), newVersion(g),
		newNode(g), newPS(g), newCache(g), newDoctor(g), newBench(g),
	)
	return root
}

// listsCSV is the annotation of verbs that take --output csv.
const listsCSV = "csv"

func envOr(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

// maxTokenBytes bounds a token file.
const maxTokenBytes = 64 << 10

func (g *globals) client() (*api.Client, error) {
	token := g.token
	if token == "" {
		token = os.Getenv("ACCEL_TOKEN")
	}
	if g.tokenFile != "" {
		text, err := readSecret(g.tokenFile)
		if err != nil {
			return nil, usage(fmt.Errorf("--token-file: %w", err))
		}
		token = text
	}
	c, err := api.NewClient(g.server, api.WithToken(token))
	return c, usage(err)
}

// readSecret reads a file that holds one secret, without the newline at its end.
func readSecret(path string) (string, error) {
	st, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if st.Size() > maxTokenBytes {
		return "", fmt.Errorf("%s has %d bytes, more than %d: not a secret", path, st.Size(), maxTokenBytes)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	secret := strings.TrimSpace(string(text))
	if secret == "" {
		return "", fmt.Errorf("%s is empty", path)
	}
	return secret, nil
}

// print writes a result: as JSON, or by table.
func (g *globals) print(cmd *cobra.Command, v any, table func(w *tabwriter.Writer)) error {
	if g.output == "json" {
		enc := json.NewEncoder(cmd.OutOrStdout())
		enc.SetIndent("", "  ")
		return enc.Encode(v)
	}
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
	table(w)
	return w.Flush()
}

// exactArgs is cobra.ExactArgs with our exit code and the argument's names.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != len(names) {
			return usage(fmt.Errorf("%s wants %s; see %s --help", cmd.CommandPath(), strings.Join(names, " "), cmd.CommandPath()))
		}
		return nil
	}
}

func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage(fmt.Errorf("%s takes no argument, but got %q", cmd.CommandPath(), args[0]))
	}
	return nil
}

// version is the module's, with the commit where the build knows it.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := info.Main.Version
	if v == "" {
		v = "(devel)"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			v += " " + s.Value
		}
	}
	return v
}

func newVersion(g *globals) *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: noArgs, Example: "  accel version -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.print(cmd, map[string]string{"version": version()}, func(w *tabwriter.Writer) { fmt.Fprintln(w, version()) })
		},
	}
}
