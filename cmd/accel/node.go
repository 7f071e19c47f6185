package main

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"

	"accel/cache"
	"accel/node"
	"accel/registry"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
)

func newNode(g *globals) *cobra.Command {
	var checkOnly, docs bool
	cmd := &cobra.Command{
		Use: "node", Short: "Run the daemon of a machine that runs containers", Args: noArgs,
		Long: `Mounts images for containerd before their content is here, mirrors registries for the
clients of this machine from a cache on its disk, measures each pull, and brings images
ahead where the server asks for it. It works without a server and while registries are away. Everything is in one YAML file (` + defaultNodeConfig + `
where it is there); every key is a flag and an environment variable too: see
docs/node.md.`,
		Example: `  accel node --registries '[{host: registry.example}]' --server-url https://accel.example
  accel node install --config ` + defaultNodeConfig + ` --dry-run
  accel node --config node.yaml --check-config
  accel node --lazy=off`,
	}
	flags := bindNode(cmd.Flags())
	cmd.Flags().BoolVar(&checkOnly, "check-config", false, "say what is wrong with the configuration, and exit")
	cmd.Flags().BoolVar(&docs, "print-config-docs", false, "print the table of docs/node.md")
	if err := cmd.Flags().MarkHidden("print-config-docs"); err != nil {
		panic(err) // the flag is made two lines above
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if docs {
			_, err := fmt.Fprint(cmd.OutOrStdout(), nodeConfigDocs())
			return err
		}
		conf, err := g.loadNode(cmd, flags)
		if err == nil && len(conf.Registries) == 0 {
			err = errors.New("registries: name at least one registry that is to be mirrored")
		}
		if err != nil {
			return usage(err)
		}
		if checkOnly {
			fmt.Fprintln(cmd.OutOrStdout(), "the configuration is good")
			return nil
		}
		return runNode(cmd, conf)
	}
	cmd.AddCommand(newNodeInstall(g), newNodeUninstall(g), newNodeHolder(g))
	return cmd
}

func runNode(cmd *cobra.Command, conf nodeConfig) error {
	log := newLogger(conf.Log, cmd.ErrOrStderr())
	hosts, err := registryHosts(conf.Registries)
	if err != nil {
		return usage(err)
	}
	client, err := registry.New(registry.Options{Hosts: hosts, Keychain: registry.DefaultKeychain(), StallTimeout: max(conf.Mirror.StallTimeout/2, 1)})
	if err != nil {
		return usage(err)
	}
	defer client.Close()
	server, err := conf.client()
	if err != nil {
		return usage(err)
	}
	snapshotter, err := conf.snapshotter()
	if err != nil {
		return err
	}
	metrics := prometheus.NewRegistry()
	n, err := node.Open(node.Options{
		Name: conf.Name, Labels: conf.Labels, Version: version(), Dir: conf.Data,
		BudgetBytes: int64(conf.Cache.Budget), FreeFloorBytes: int64(conf.Cache.FreeFloor),
		Registry: client, DefaultRegistry: conf.DefaultRegistry,
		TagTTL: orNever(conf.Mirror.TagTTL), GrantTTL: orNever(conf.Mirror.GrantTTL), GrantGrace: orNever(conf.Mirror.GrantGrace),
		AnswerPatience: conf.Mirror.AnswerTimeout, StallPatience: conf.Mirror.StallTimeout,
		Quiet: conf.Pulls.Quiet, MaxSpooled: conf.Pulls.MaxSpooled, Server: server, Heartbeat: conf.Heartbeat, Warms: conf.Warm.Concurrency,
		WarmForm: conf.Warm.Form, WarmAll: conf.Warm.All, Snapshotter: snapshotter,
		Metrics: metrics, Log: log,
	})
	if errors.Is(err, cache.ErrLocked) {
		return fmt.Errorf("%w; stop that one, or choose another folder with --data", err)
	}
	if err != nil {
		return err
	}
	return errors.Join(listenAndRun(cmd, conf, n, metrics), n.Close())
}

// listenAndRun takes the node's addresses; its folder is taken already.
func listenAndRun(cmd *cobra.Command, conf nodeConfig, n *node.Node, metrics *prometheus.Registry) error {
	ctx := cmd.Context()
	log := newLogger(conf.Log, cmd.ErrOrStderr())
	mirror, err := listen(cmd, "--listen", conf.Listen)
	if err != nil {
		return err
	}
	defer closeQuietly(mirror)
	admin, err := node.ListenAdmin(ctx, conf.Socket)
	if err != nil {
		return fmt.Errorf("%w (--socket)", err)
	}
	defer closeQuietly(admin)
	at := node.Listeners{Mirror: mirror, Admin: admin}
	if at.Snapshotter, err = n.ListenSnapshotter(ctx); err != nil {
		return fmt.Errorf("%w (--snapshotter-socket)", err)
	}
	if at.Snapshotter != nil {
		defer closeQuietly(at.Snapshotter)
	}
	if conf.Metrics.Listen != "" {
		l, err := listen(cmd, "--metrics-listen", conf.Metrics.Listen)
		if err != nil {
			return err
		}
		defer closeQuietly(l)
		at.Beside = append(at.Beside, node.Served{Listener: l, Handler: metricsHandler(metrics)})
	}
	if conf.Server.URL == "" {
		log.Warn("no server is configured (server.url): pulls are measured and kept, but reported to nobody")
	}
	log.Info("the node is up", "name", conf.Name, "mirror", "http://"+mirror.Addr().String(), "socket", conf.Socket, "data", conf.Data,
		"registries", len(conf.Registries), "server", conf.Server.URL)
	if err := notifySystemd("READY=1"); err != nil {
		log.Warn("systemd cannot be told that the node is up", "error", err)
	}
	return n.Run(ctx, at)
}

func metricsHandler(metrics *prometheus.Registry) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}))
	return mux
}

// notifySystemd tells the service manager a state, where there is one (sd_notify(3)).
func notifySystemd(state string) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return err
	}
	_, err = conn.Write([]byte(state))
	return errors.Join(err, conn.Close())
}
