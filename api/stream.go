package api

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"strconv"
	"strings"

	"accel/readiness"
)

// maxEventBytes bounds one line of an event stream.
const maxEventBytes = 1 << 20

// errStopped says that the caller of an iteration wants no more.
var errStopped = errors.New("stopped")

// statusError is an answer other than 200.
type statusError struct {
	error
	code int
}

func (e statusError) Unwrap() error { return e.error }

// Events iterates over changes of state after the event with the given number
// (zero: all that are kept), for as long as ctx lasts. A broken connection is
// made again and goes on where it broke; an error that another try will not
// mend ends the iteration.
func (c *Client) Events(ctx context.Context, after uint64) iter.Seq2[readiness.Event, error] {
	return func(yield func(readiness.Event, error) bool) {
		pause := minPause
		for ctx.Err() == nil {
			err := c.events(ctx, after, func(e readiness.Event) bool {
				after, pause = e.Seq, minPause
				return yield(e, nil)
			})
			if errors.Is(err, errStopped) {
				return
			}
			var status statusError
			if errors.As(err, &status) && status.code < http.StatusInternalServerError {
				yield(readiness.Event{}, status.error)
				return
			}
			sleep(ctx, pause)
			pause = min(2*pause, maxPause)
		}
	}
}

func (c *Client) events(ctx context.Context, after uint64, yield func(readiness.Event) bool) error {
	req, err := c.request(ctx, http.MethodGet, "/v1/events", nil, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "text/event-stream")
	if after > 0 {
		req.Header.Set("Last-Event-ID", strconv.FormatUint(after, 10))
	}
	res, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		raw, err := io.ReadAll(io.LimitReader(res.Body, maxAnswerBytes))
		if err != nil {
			return err
		}
		return statusError{ProblemError(res.StatusCode, raw), res.StatusCode}
	}
	lines := bufio.NewScanner(res.Body)
	lines.Buffer(nil, maxEventBytes)
	kind := ""
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), ": ")
		switch name {
		case "event":
			kind = value
		case "data":
			if kind != "state" {
				continue
			}
			var e readiness.Event
			if err := json.Unmarshal([]byte(value), &e); err != nil {
				return fmt.Errorf("event %q: %w", value, err)
			}
			if !yield(e) {
				return errStopped
			}
		}
	}
	return lines.Err()
}
