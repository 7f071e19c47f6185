// Package storetest is the one conformance suite for every readiness.Store: the
// contract of Store and Tx, and the Tracker's rules over that store, with a
// randomised test against a model. A store's own tests call Run.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"accel"
	"accel/readiness"

	"github.com/opencontainers/go-digest"
)

// Open returns an empty store. It closes it in t's cleanup. It is called inside
// testing/synctest bubbles, so a store must not leave goroutines behind its Close.
type Open func(t *testing.T) readiness.Store

// Run runs the suite. A store with a method Check(context.Context) error, which
// compares its indexes with its records, has it called at the end of each test.
func Run(t *testing.T, open Open) {
	for name, test := range map[string]func(*testing.T, readiness.Store){
		"records": testRecords, "queues": testQueues, "digests": testDigests, "lists": testLists,
		"tags and aliases": testTagsAliases, "event log": testEventLog, "mappings": testMappings,
		"announced and memos": testAnnouncedMemos, "atomicity": testAtomicity, "isolation of failures": testIsolation,
		"concurrent updates": testConcurrent, "contexts": testContexts,
	} {
		t.Run("store/"+name, func(t *testing.T) {
			store := open(t)
			test(t, store)
			check(t, store)
		})
	}
	for _, group := range []map[string]func(*env){pushTests, claimTests, intakeTests, foldTests, checkTests, findTests, waitTests} {
		for name, test := range group {
			t.Run("tracker/"+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					store := open(t)
					test(newEnv(t, store, readiness.Options{Params: "p1"}))
					check(t, store)
				})
			})
		}
	}
	for seed := range uint64(10) {
		t.Run(fmt.Sprintf("model/seed %d", seed), func(t *testing.T) { RunModel(t, open, seed, 300) })
	}
}

// RunModel runs the model test alone, with a seed and a number of steps of the caller's choice.
func RunModel(t *testing.T, open Open, seed uint64, steps int) {
	synctest.Test(t, func(t *testing.T) { runModel(t, open(t), seed, steps) })
}

func check(t *testing.T, store readiness.Store) {
	t.Helper()
	if c, ok := store.(interface{ Check(context.Context) error }); ok {
		if err := c.Check(context.Background()); err != nil {
			t.Errorf("indexes and records disagree: %v", err)
		}
	}
}

const repo = "registry.example:5000/team/app"

// sha makes a digest that is told apart by name.
func sha(name string) digest.Digest { return digest.FromString(name) }

const (
	imageType = "application/vnd.oci.image.manifest.v1+json"
	indexType = "application/vnd.oci.image.index.v1+json"
)

// env is a Tracker with the words that the tests are written in. Any error that a
// test does not ask for ends it.
type env struct {
	*testing.T
	store readiness.Store
	*readiness.Tracker
	ctx context.Context
}

func newEnv(t *testing.T, store readiness.Store, o readiness.Options) *env {
	return &env{T: t, store: store, Tracker: readiness.New(store, o), ctx: t.Context()}
}

// event is a push of tag (may be empty) and digest (may be empty) with a time in
// seconds (zero: none).
func event(tag string, d digest.Digest, at int) accel.PushEvent {
	ev := accel.PushEvent{Source: "hook", Registry: "registry.example:5000", Repository: "team/app", Tag: tag, Digest: d}
	if at != 0 {
		ev.OccurredAt = time.Date(1999, 1, 1, 0, 0, at, 0, time.UTC)
	}
	return ev
}

func ofType(ev accel.PushEvent, mediaType string) accel.PushEvent {
	ev.MediaType = mediaType
	return ev
}

func from(source string, ev accel.PushEvent) accel.PushEvent {
	ev.Source = source
	return ev
}

func (e *env) push(ev accel.PushEvent) accel.Record {
	e.Helper()
	recs, err := e.Push(e.ctx, ev)
	e.ok(err)
	return recs[0]
}

func (e *env) ok(err error) {
	e.Helper()
	if err != nil {
		e.Fatalf("unexpected error: %v", err)
	}
}

func (e *env) is(err, want error) {
	e.Helper()
	if !errors.Is(err, want) {
		e.Fatalf("error %v, want %v", err, want)
	}
}

// try claims what is due at this instant.
func (e *env) try() (readiness.Work, bool) {
	e.Helper()
	ctx, cancel := context.WithTimeout(e.ctx, time.Nanosecond)
	defer cancel()
	w, err := e.Claim(ctx)
	if err != nil {
		e.is(err, context.DeadlineExceeded)
	}
	return w, err == nil
}

func (e *env) claim() readiness.Work {
	e.Helper()
	w, ok := e.try()
	if !ok {
		e.Fatal("nothing is due")
	}
	return w
}

func (e *env) idle() {
	e.Helper()
	if w, ok := e.try(); ok {
		e.Fatalf("%s is due, want nothing", w.Image())
	}
}

func (e *env) finish(w readiness.Work) {
	e.Helper()
	e.ok(e.Finish(e.ctx, w, accel.Target{Repository: w.Repository, Digest: sha("target of " + w.Digest.String()), Tags: w.Tags},
		accel.Result{SourceBytes: 1}, map[digest.Digest][]byte{w.Digest: []byte("mapping of " + w.Digest)}))
}

// makeReady pushes and converts.
func (e *env) makeReady(ev accel.PushEvent) accel.Record {
	e.Helper()
	rec := e.push(ev)
	w := e.claim()
	if w.ID != rec.ID {
		e.Fatalf("claimed %s, want %s", w.Image(), rec.Image())
	}
	e.finish(w)
	return e.get(rec.ID)
}

func (e *env) get(id string) accel.Record {
	e.Helper()
	rec, err := e.Get(e.ctx, id)
	e.ok(err)
	return rec
}

func (e *env) state(id string, want accel.State) accel.Record {
	e.Helper()
	rec := e.get(id)
	if rec.State != want {
		e.Fatalf("%s is %s (%s), want %s", rec.Image(), rec.State, rec.Reason, want)
	}
	return rec
}

// holds asserts which digest a tag points to.
func (e *env) holds(tag string, want digest.Digest) {
	e.Helper()
	rec, err := e.Holder(e.ctx, repo, tag)
	e.ok(err)
	if rec.Digest != want {
		e.Fatalf("tag %s points to %q, want %q", tag, rec.Digest, want)
	}
}

func reference(tag string, d digest.Digest) accel.Reference {
	return accel.Reference{Registry: "registry.example:5000", Repository: "team/app", Tag: tag, Digest: d}
}

func (e *env) equal(what string, got, want any) {
	e.Helper()
	if g, w := fmt.Sprint(got), fmt.Sprint(want); g != w {
		e.Fatalf("%s: %s, want %s", what, g, w)
	}
}

// trail is the states that a record went through, as the event log tells it.
func (e *env) trail(id string) string {
	e.Helper()
	evs, _, err := e.Events(e.ctx, 0, 1000)
	e.ok(err)
	trail := ""
	for _, ev := range evs {
		if ev.ID == id {
			trail += ">" + string(ev.To)
		}
	}
	return trail
}

func second[T any](_ T, err error) error { return err }
