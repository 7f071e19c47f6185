package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"accel/registry"
	"accel/webhook"

	"github.com/spf13/cobra"
)

// upReconcile is how often the embedded registry is searched for pushes whose
// notification was lost with a killed process.
const upReconcile = 30 * time.Second

func newUp() *cobra.Command {
	var registryListen string
	var aliases []string
	cmd := &cobra.Command{
		Use: "up", Short: "Run everything in one process, with a registry of its own", Args: noArgs,
		Long: `Starts an OCI registry, the service and its API, all under one data directory. Push
an image to the registry with any client, and it becomes Ready by itself. Stopped and
started again, it goes on where it was. Ctrl-C stops; a second one stops at once.`,
		Example: "  accel up\n  accel up --data /var/lib/accel --registry-listen 127.0.0.1:5001",
	}
	flags := bindConfig(cmd.Flags())
	cmd.Flags().StringVar(&registryListen, "registry-listen", "127.0.0.1:5000", "address of the embedded registry")
	cmd.Flags().StringSliceVar(&aliases, "registry-alias", nil, "other HOST:PORT names by which clients reach the embedded registry")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		conf, err := flags.load()
		if err != nil {
			return usage(err)
		}
		if conf.Reconcile.Interval == defaultConfig().Reconcile.Interval {
			conf.Reconcile.Interval = upReconcile
		}
		if err := conf.finish(); err != nil {
			return usage(err)
		}
		s, err := openService(conf, newLogger(conf.Log, cmd.ErrOrStderr()))
		if err != nil {
			return err
		}
		return errors.Join(s.up(cmd, registryListen, aliases), s.close())
	}
	return cmd
}

// up runs the service with an embedded registry.
func (s *service) up(cmd *cobra.Command, registryListen string, aliases []string) error {
	apiListener, err := listen(cmd, "--listen", s.conf.Listen)
	if err != nil {
		return err
	}
	defer closeQuietly(apiListener)
	regListener, err := listen(cmd, "--registry-listen", registryListen)
	if err != nil {
		return err
	}
	defer closeQuietly(regListener)
	host, names := registryNames(regListener.Addr())
	s.conf.Reconcile.Repositories = append(s.conf.Reconcile.Repositories, host+"/**")
	secret := "Bearer " + rand.Text()
	source, err := webhook.New(webhook.Config{
		Name: "embedded", Kind: webhook.Distribution, Secret: secret,
		// By whatever name a client reached the registry, it is this one. An event that
		// was refused would be sent again for ever, ahead of all others.
		Registry: host,
	})
	if err != nil {
		return err
	}
	if err := s.wire([]registry.Host{{Name: host, Aliases: append(names, aliases...), PlainHTTP: true}}, []*webhook.Source{source}); err != nil {
		return err
	}
	embedded, err := newEmbeddedRegistry(cmd.Context(), filepath.Join(s.conf.Data, "registry"), hookURL(apiListener.Addr()), secret, s.log)
	if err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), `accel is up.
  registry   %[1]s
  API        http://%[2]s   (pages at / and /docs)
  data       %[3]s
Push an image with any client, for instance:
  crane push app.tar %[1]s/team/app:v1
  skopeo copy --dest-tls-verify=false docker-archive:app.tar docker://%[1]s/team/app:v1
then wait for it:
  accel wait %[1]s/team/app:v1%[4]s
`, host, apiListener.Addr(), s.conf.Data, serverFlag(apiListener.Addr()))
	err = s.run(cmd.Context(), apiListener, served{regListener, embedded})
	return errors.Join(err, embedded.Shutdown())
}

// closeQuietly closes a listener that a server may have closed already.
func closeQuietly(l net.Listener) {
	//nolint:errcheck // there is nothing left to lose
	l.Close()
}

// registryNames is the name that records have for the embedded registry, and
// the others that clients on this machine use for it.
func registryNames(addr net.Addr) (canonical string, aliases []string) {
	host, port, err := net.SplitHostPort(addr.String())
	if err != nil {
		return addr.String(), nil
	}
	if ip := net.ParseIP(host); ip != nil && (ip.IsUnspecified() || ip.IsLoopback()) {
		return net.JoinHostPort("127.0.0.1", port), []string{net.JoinHostPort("localhost", port)}
	}
	return addr.String(), nil
}

// hookURL is where the embedded registry sends its notifications.
func hookURL(addr net.Addr) string {
	host, port, err := net.SplitHostPort(addr.String())
	if err == nil && net.ParseIP(host).IsUnspecified() {
		return "http://127.0.0.1:" + port + "/v1/webhooks/embedded"
	}
	return "http://" + addr.String() + "/v1/webhooks/embedded"
}

func serverFlag(addr net.Addr) string {
	if addr.String() == defaultConfig().Listen {
		return ""
	}
	return " --server http://" + addr.String()
}
