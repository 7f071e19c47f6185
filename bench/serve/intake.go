package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"accel"
	"accel/bench/report"
	"accel/readiness"
	"accel/readiness/boltstore"

	"github.com/opencontainers/go-digest"
)

const (
	host    = "127.0.0.1:9" // the discard port: nothing answers, so no conversion disturbs
	secret  = "bench-secret"
	records = 100_000
)

// config writes a configuration for `accel serve` over dir/name.
func config(dir, name, address string) (path string, err error) {
	path = filepath.Join(dir, name+".yaml")
	text := fmt.Sprintf("listen: %s\ndata: %s\nlog: {level: error}\nregistries:\n  - {host: %q, plain_http: true}\nwebhooks:\n  - {kind: distribution, secret: %s}\n",
		address, filepath.Join(dir, name), host, secret)
	return path, os.WriteFile(path, []byte(text), 0o600)
}

// serve starts `accel serve` over dir/name.
func serve(ctx context.Context, dir, name string) (*process, error) {
	address, err := freeAddress(ctx)
	if err != nil {
		return nil, err
	}
	path, err := config(dir, name, address)
	if err != nil {
		return nil, err
	}
	return start(ctx, address, "serve", "--config", path, "--tokens", "[]")
}

// intake measures durable webhook intake: every event a new image.
func intake(ctx context.Context, dir string, r *report.Report) error {
	p, err := serve(ctx, dir, "intake")
	if err != nil {
		return err
	}
	const senders, total = 64, 20_000
	perSecond, p99, err := drive(ctx, senders, total, http.StatusAccepted, func(i int) *http.Request {
		body := fmt.Sprintf(`{"events":[{"id":"%d","timestamp":%q,"action":"push","target":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":%q,"size":1000,"repository":"team/app%d","tag":"v%d"},"request":{"host":%q}}]}`,
			i, time.Now().UTC().Format(time.RFC3339Nano), digest.FromString(fmt.Sprint(i)), i%100, i, host)
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.url+"/v1/webhooks/distribution", strings.NewReader(body))
		if err != nil {
			panic(err) // the URL is our own
		}
		req.Header.Set("Content-Type", "application/vnd.docker.distribution.events.v2+json")
		req.Header.Set("Authorization", secret)
		return req
	})
	if err != nil {
		return fmt.Errorf("intake: %w\n%s", err, p.log.String())
	}
	note := fmt.Sprintf("%d events from %d senders, workers running", total, senders)
	r.AtLeast("webhooks accepted durably", perSecond, 1000, "1/s", note)
	r.AtMost("webhook p99", float64(p99.Microseconds())/1000, 100, "ms", note)
	return p.stop()
}

// reads measures start-up, memory and readiness reads over 100,000 records.
func reads(ctx context.Context, dir string, r *report.Report) error {
	if err := seed(ctx, filepath.Join(dir, "reads", "readiness.db")); err != nil {
		return fmt.Errorf("seed %d records: %w", records, err)
	}
	p, err := serve(ctx, dir, "reads")
	if err != nil {
		return err
	}
	note := fmt.Sprintf("%d records", records)
	r.AtMost("start-up to /readyz", p.started.Seconds(), 2, "s", note)
	const senders, total = 16, 60_000
	perSecond, p99, err := drive(ctx, senders, total, http.StatusOK, func(int) *http.Request {
		i := rand.IntN(records)
		image := fmt.Sprintf("%s/team/app%d:v%d", host, i%100, i)
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url+"/v1/readiness?image="+url.QueryEscape(image), nil)
		if err != nil {
			panic(err) // the URL is our own
		}
		return req
	})
	if err != nil {
		return fmt.Errorf("reads: %w\n%s", err, p.log.String())
	}
	r.AtLeast("readiness reads", perSecond, 10_000, "1/s", note+fmt.Sprintf(", %d connections, client on the same cores", senders))
	r.Add("readiness read p99", float64(p99.Microseconds())/1000, "ms", note)
	resident, err := p.residentMiB("VmRSS")
	if err != nil {
		return err
	}
	anonymous, err := p.residentMiB("RssAnon")
	if err != nil {
		return err
	}
	r.AtMost("resident memory after the reads", resident, 150, "MiB", note)
	r.Add("of it anonymous", anonymous, "MiB", "the rest is mapped pages of the store and the program")
	return p.stop()
}

// seed writes Ready records straight into a store.
func seed(ctx context.Context, path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	store, err := boltstore.Open(path)
	if err != nil {
		return err
	}
	now := time.Now().UTC()
	for from := 0; from < records; from += 1000 {
		err := store.Update(ctx, func(tx readiness.Tx) error {
			for i := from; i < from+1000; i++ {
				repository, tag := fmt.Sprintf("%s/team/app%d", host, i%100), fmt.Sprintf("v%d", i)
				rec := accel.Record{
					ID: fmt.Sprintf("seed%022d", i), Repository: repository, Digest: digest.FromString(fmt.Sprint(i)), Tags: []string{tag},
					MediaType: "application/vnd.oci.image.manifest.v1+json", Params: "estargz/1", Origin: "distribution",
					State: accel.Ready, CreatedAt: now, UpdatedAt: now, CheckedAt: now, DueAt: now.Add(time.Hour),
					Target: accel.Target{Repository: repository, Digest: digest.FromString("target" + fmt.Sprint(i)), Tags: []string{tag + "-esgz"}},
					Result: accel.Result{SourceBytes: 1 << 28, TargetBytes: 1 << 28, Platforms: []string{"linux/amd64"}},
				}
				if err := tx.Put(readiness.Entry{Record: rec}); err != nil {
					return err
				}
				if err := tx.PutTag(repository, tag, readiness.TagPointer{ID: rec.ID, MovedAt: now}); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return errors.Join(err, store.Close())
		}
	}
	return store.Close()
}
