package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"time"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem" // the embedded registry's storage
	"github.com/sirupsen/logrus"
)

// newEmbeddedRegistry makes distribution's own registry over a directory. It
// tells hook of each push, with secret as the Authorization header. What it has
// not told when the process dies is found by the reconcile.
func newEmbeddedRegistry(ctx context.Context, dir, hook, secret string, log *slog.Logger) (app *handlers.App, err error) {
	defer func() {
		if p := recover(); p != nil { // distribution panics on what it cannot use
			err = fmt.Errorf("embedded registry over %s: %v", dir, p)
		}
	}()
	// distribution logs by a global logger, and each "not found" as an error.
	logrus.SetOutput(io.Discard)
	logrus.SetLevel(logrus.ErrorLevel)
	logrus.AddHook(forward{log})
	c := &configuration.Configuration{
		Version: "0.1",
		Storage: configuration.Storage{
			"filesystem":  {"rootdirectory": dir},
			"delete":      {"enabled": true},
			"maintenance": {"uploadpurging": map[any]any{"enabled": true, "age": "24h", "interval": "24h", "dryrun": false}},
		},
		Catalog: configuration.Catalog{MaxEntries: 1000},
		Notifications: configuration.Notifications{Endpoints: []configuration.Endpoint{{
			Name: "accel", URL: hook, Headers: http.Header{"Authorization": {secret}},
			Timeout: 10 * time.Second, Threshold: 5, Backoff: time.Second,
			Ignore: configuration.Ignore{Actions: []string{"pull", "mount"}},
		}}},
	}
	c.Log.Level = "error"
	c.HTTP.Secret = rand.Text()
	// The app's own context must outlive ctx: it is stopped by Shutdown.
	return handlers.NewApp(context.WithoutCancel(ctx), c), nil
}

// forward gives the registry's errors to our log: answers to clients as debug,
// everything else as warnings.
type forward struct{ log *slog.Logger }

// Levels implements logrus.Hook.
func (forward) Levels() []logrus.Level { return []logrus.Level{logrus.ErrorLevel} }

// Fire implements logrus.Hook.
func (f forward) Fire(e *logrus.Entry) error {
	level := slog.LevelWarn
	if _, answered := e.Data["http.response.status"]; answered {
		level = slog.LevelDebug
	}
	f.log.Log(context.Background(), level, "embedded registry: "+e.Message, "error", e.Data[logrus.ErrorKey], "detail", e.Data["err.detail"])
	return nil
}
