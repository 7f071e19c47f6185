package main

import (
	"errors"
	"fmt"
	"net"

	"github.com/spf13/cobra"
)

func newServe() *cobra.Command {
	var checkOnly, docs bool
	cmd := &cobra.Command{
		Use: "serve", Short: "Run the service beside registries that exist", Args: noArgs,
		Long: `Takes webhooks in, converts what was pushed and serves the readiness API. Everything
is in one YAML file; every key is a flag and an environment variable too: see
docs/configuration.md.`,
		Example: "  accel serve --config accel.yaml --check-config\n  accel serve --config accel.yaml --listen 127.0.0.1:9000",
	}
	flags := bindConfig(cmd.Flags())
	cmd.Flags().BoolVar(&checkOnly, "check-config", false, "say what is wrong with the configuration, and exit")
	cmd.Flags().BoolVar(&docs, "print-config-docs", false, "print docs/configuration.md")
	if err := cmd.Flags().MarkHidden("print-config-docs"); err != nil {
		panic(err) // the flag is made two lines above
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if docs {
			_, err := fmt.Fprint(cmd.OutOrStdout(), configDocs())
			return err
		}
		conf, err := flags.load()
		if err == nil {
			err = conf.finish()
		}
		if err == nil && len(conf.Registries) == 0 {
			err = errors.New("registries: name at least one registry that may be contacted")
		}
		if err != nil {
			return usage(err)
		}
		if checkOnly {
			fmt.Fprintln(cmd.OutOrStdout(), "the configuration is good")
			return nil
		}
		log := newLogger(conf.Log, cmd.ErrOrStderr())
		s, err := openService(conf, log)
		if err != nil {
			return err
		}
		listener, err := listen(cmd, "--listen", conf.Listen)
		if err == nil {
			err = s.wire(nil, nil)
		}
		if err == nil {
			log.Info("serving", "api", "http://"+listener.Addr().String(), "data", conf.Data, "registries", len(conf.Registries), "webhooks", len(conf.Webhooks))
			err = s.run(cmd.Context(), listener)
		}
		return errors.Join(err, s.close())
	}
	return cmd
}

func listen(cmd *cobra.Command, flag, address string) (net.Listener, error) {
	l, err := new(net.ListenConfig).Listen(cmd.Context(), "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("cannot listen: %w; choose another address with %s", err, flag)
	}
	return l, nil
}
