package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// drive sends total requests from senders goroutines and returns the rate and
// the 99th percentile. Any other status than want is an error.
func drive(ctx context.Context, senders, total, want int, request func(i int) *http.Request) (perSecond float64, p99 time.Duration, err error) {
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: senders, MaxConnsPerHost: senders}}
	defer client.CloseIdleConnections()
	times := make([]time.Duration, total)
	var next atomic.Int64
	var once sync.Once
	var wg sync.WaitGroup
	begin := time.Now()
	for range senders {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= total || ctx.Err() != nil {
					return
				}
				t := time.Now()
				if e := send(client, request(i).WithContext(ctx), want); e != nil {
					once.Do(func() { err = e })
					return
				}
				times[i] = time.Since(t)
			}
		})
	}
	wg.Wait()
	took := time.Since(begin)
	if err == nil {
		err = ctx.Err()
	}
	slices.Sort(times)
	return float64(total) / took.Seconds(), times[total*99/100], err
}

func send(client *http.Client, req *http.Request, want int) error {
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		return err
	}
	if res.StatusCode != want {
		return fmt.Errorf("%s %s answered %d, not %d: %s", req.Method, req.URL.Path, res.StatusCode, want, body)
	}
	return nil
}
