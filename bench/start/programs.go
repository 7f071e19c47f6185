package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"time"

	"accel/internal/debimage"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

const (
	programAddress = "127.0.0.1:9000"
	// answerPatience is how long one question may take. A listener that accepts nothing yet
	// must not be asked for ever.
	answerPatience = 30 * time.Second
)

// startable is an image, and how one knows that its program is up.
type startable struct {
	name  string
	note  string // what its program is
	build func(context.Context, io.Writer) (v1.Image, error)
	// ready asks the program once. nil: it is done when it ends.
	ready func(context.Context) (bool, error)
}

func (s startable) String() string { return s.name }

// ends reports whether the program ends by itself.
func (s startable) ends() bool { return s.ready == nil }

var images = []startable{
	{"pyapp", "python3 with pandas, scipy and flask", debimage.PyApp, answers("45")},
	{"node", "Node.js with express", debimage.Node, answers("45")},
	{"java", "a Java HTTP server in a jar, OpenJDK 17", debimage.Java, answers("45")},
	{"nginx", "nginx with one page", debimage.Nginx, answers("45")},
	{"redis", "redis, until PING is answered", debimage.Redis, pongs},
	{"golang", "`go run` of a small server, compiled at the start", debimage.Golang, answers("45")},
	{"big", "a python3 server in an image of 2 GB, of which 1.7 GB are never read", debimage.Big, answers("")},
	{"readall", "a program that reads every file of its image and ends", debimage.ReadAll, nil},
}

func imageNamed(name string) startable {
	return images[slices.IndexFunc(images, func(s startable) bool { return s.name == name })]
}

// answers asks by HTTP, where that is the right answer; any is where it is empty.
func answers(want string) func(context.Context) (bool, error) {
	client := &http.Client{Timeout: answerPatience, Transport: &http.Transport{DisableKeepAlives: true}}
	return func(ctx context.Context) (bool, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+programAddress+"/", nil)
		if err != nil {
			return false, err
		}
		res, err := client.Do(req)
		if err != nil {
			return false, nil //nolint:nilerr // not yet
		}
		body, err := io.ReadAll(res.Body)
		if err := errors.Join(err, res.Body.Close()); err != nil {
			return false, err
		}
		if res.StatusCode != http.StatusOK || want != "" && string(body) != want {
			return false, fmt.Errorf("the program answers %s: %.200q", res.Status, body)
		}
		return true, nil
	}
}

// pongs asks as redis's clients do.
func pongs(ctx context.Context) (bool, error) {
	const ping, pong = "PING\r\n", "+PONG\r\n"
	c, err := new(net.Dialer).DialContext(ctx, "tcp", programAddress)
	if err != nil {
		return false, nil //nolint:nilerr // not yet
	}
	defer c.Close() //nolint:errcheck // nothing is written that could be lost
	if err := c.SetDeadline(time.Now().Add(answerPatience)); err != nil {
		return false, err
	}
	if _, err := io.WriteString(c, ping); err != nil {
		return false, nil //nolint:nilerr // closed again: not yet
	}
	said := make([]byte, len(pong))
	if n, err := io.ReadFull(c, said); err != nil {
		if n > 0 {
			return false, fmt.Errorf("the program answers %.200q", said[:n])
		}
		return false, nil
	}
	if string(said) != pong { // "-LOADING ..." would be no error, but there is nothing to load
		return false, fmt.Errorf("the program answers %.200q", said)
	}
	return true, nil
}

// source is the image as it was built.
func (s startable) source(ctx context.Context) (v1.Image, error) { return s.build(ctx, os.Stderr) }
