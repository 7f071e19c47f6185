// Command start measures container starts: from the begin of the pull until the
// program in the container is ready, by accel and by its peers, interleaved, over a
// network that is as slow and as far away as is asked for. Every cold run has roots
// that are empty, daemons that were just started and a page cache that was dropped.
// `make bench-start` runs it, as root.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"accel/internal/testbed"
)

func main() {
	if p := os.Getenv(partVariable); p != "" {
		if err := playPart(p); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", p+":", err)
			os.Exit(1)
		}
		return
	}
	s := setting{runs: 3, warmRuns: 10, images: []string{barImage}, variants: names(variants)}
	rates := []string{"1gbit:10ms", "100mbit:50ms", "25mbit:50ms"}
	flag.IntVar(&s.runs, "runs", s.runs, "times each cold variant runs at each rate")
	flag.IntVar(&s.warmRuns, "warm-runs", s.warmRuns, "starts of each warm variant")
	list(&rates, "rates", "networks, as RATE:ROUNDTRIP; warm variants, and those that read all, run over the first")
	list(&s.variants, "variants", "what to run, of these; one that ends in * stands for all that begin so")
	list(&s.images, "images", "images to start: all, or of "+strings.Join(names(images), ", "))
	flag.BoolVar(&s.roundTrips, "round-trips", true, "run accel-profile and stargz-optimised over a first link that is farther away, too, to count round trips")
	flag.BoolVar(&s.memory, "memory", true, "measure the daemons' memory with 20 images mounted, too")
	flag.BoolVar(&s.keep, "keep", false, "leave the daemons' logs in their temporary directory")
	flag.BoolVar(&s.buildOnly, "build", false, "make what is missing of the images in the cache, and run nothing")
	list(&s.from, "from", "run nothing: judge what earlier runs have left, in files such as "+runsFile)
	flag.StringVar(&s.docs, "docs", "", "write tables to this file, such as docs/benchmarks.md, and plots to the folder of that name")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := s.parse(rates)
	if err == nil {
		err = run(ctx, s)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// list is a flag of words with commas between.
func list(to *[]string, name, usage string) {
	if len(*to) > 0 {
		usage += " (default " + strings.Join(*to, ",") + ")"
	}
	flag.Func(name, usage, func(text string) error {
		*to = strings.Split(text, ",")
		return nil
	})
}

// setting is what is measured.
type setting struct {
	runs, warmRuns   int
	images, variants []string
	rates            []testbed.LinkSpeed
	roundTrips       bool
	memory, keep     bool
	buildOnly        bool
	from             []string // files of earlier runs
	docs             string
}

func (s *setting) parse(rates []string) error {
	for _, text := range rates {
		speed, err := testbed.ParseLinkSpeed(text)
		if err != nil {
			return err
		}
		s.rates = append(s.rates, speed)
	}
	var chosen []string
	for _, pattern := range s.variants {
		found := false
		for _, v := range variants {
			prefix, all := strings.CutSuffix(pattern, "*")
			if v.name == pattern || (all && strings.HasPrefix(v.name, prefix)) {
				found = true
				chosen = append(chosen, v.name)
			}
		}
		if !found {
			return fmt.Errorf("-variants %q: want some of %s", pattern, strings.Join(names(variants), ", "))
		}
	}
	s.variants = chosen
	if slices.Equal(s.images, []string{"all"}) {
		s.images = names(images)
	}
	for _, name := range s.images {
		if !slices.Contains(names(images), name) {
			return fmt.Errorf("-images %q: want some of %s", name, strings.Join(names(images), ", "))
		}
	}
	if s.runs < 1 || s.warmRuns < 1 || len(s.rates) == 0 {
		return errors.New("want at least one run, one warm run and one rate")
	}
	return nil
}

// chosen are the variants to run of those that want this.
func (s *setting) chosen(want func(variant) bool) []variant {
	var found []variant
	for _, v := range variants {
		if slices.Contains(s.variants, v.name) && want(v) {
			found = append(found, v)
		}
	}
	return found
}

// network is one that cold variants run over.
type network struct {
	speed testbed.LinkSpeed
	wants func(variant) bool
}

func (s *setting) networks() []network {
	var all []network
	for i, speed := range s.rates {
		all = append(all, network{speed, func(v variant) bool { return i == 0 || !v.all }})
	}
	if s.roundTrips {
		all = append(all, network{farther(s.rates[0]), func(v variant) bool { return v.name == "accel-profile" || v.name == "stargz-optimised" }})
	}
	return all
}

func run(ctx context.Context, s setting) error {
	res := &results{}
	var err error
	if len(s.from) > 0 {
		for _, path := range s.from {
			err = errors.Join(err, res.read(path))
		}
	} else {
		err = measure(ctx, s, res)
	}
	if err != nil || s.buildOnly {
		return err
	}
	j, err := judge(res)
	if err != nil {
		return err
	}
	if s.docs != "" {
		if err := writeDocs(s.docs, res, j); err != nil {
			return err
		}
	}
	return j.Close()
}

func measure(ctx context.Context, s setting, res *results) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("starting containers and dropping the page cache need root")
	}
	b, err := openBed(ctx, s)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	if s.buildOnly {
		for _, name := range s.images {
			if err := b.publish(ctx, imageNamed(name), s.chosen(func(variant) bool { return true })); err != nil {
				return fmt.Errorf("image %s: %w", name, err)
			}
		}
		return nil
	}
	if res.about, err = aboutHere(ctx, s); err != nil {
		return err
	}
	err = measureAll(ctx, b, s, res)
	res.about.end()
	res.hot, res.foretold = b.hot, b.foretold
	return errors.Join(err, res.write()) // what was measured is kept in any case
}

func measureAll(ctx context.Context, b *bed, s setting, res *results) error {
	for _, name := range s.images {
		image := imageNamed(name)
		if err := b.publish(ctx, image, s.chosen(func(variant) bool { return true })); err != nil {
			return fmt.Errorf("image %s: %w", name, err)
		}
		if err := coldRuns(ctx, b, s, image, res); err != nil {
			return err
		}
		if err := warmRuns(ctx, b, s, image, res); err != nil {
			return err
		}
	}
	if !s.memory {
		return nil
	}
	return memoryRuns(ctx, b, s, res)
}
