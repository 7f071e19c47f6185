package ledger_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"accel"
	"accel/profile/ledger"
)

func TestPublication(t *testing.T) {
	b := newBed(t, ledger.Options{})
	b.learn("a", ledger.Given{Predicted: items(t, "0:bin/a:0:1000")})
	b.expectDue("a")
	b.expectNoneDue()
	b.report(report("a", 1, "n1", items(t, "0:bin/a:0:990"))) // recorded: soon, but not within the minute
	b.expectNoneDue()
	b.clock.pass(time.Minute)
	b.expectDue("a")
	b.report(report("a", 2, "n2", items(t, "0:bin/a:0:1000"))) // little changes
	b.report(report("a", 3, "n3", items(t, "0:bin/a:0:1000")))
	b.clock.pass(time.Minute)
	b.expectNoneDue()
	b.restart()
	b.clock.pass(time.Hour)
	b.expectDue("a")
	b.report(report("a", 4, "n4", items(t, "0:bin/a:0:1000", "0:lib:0:500")))
	b.report(report("a", 5, "n5", items(t, "0:bin/a:0:1000", "0:lib:0:500")))
	b.report(report("a", 6, "n6", items(t, "0:bin/a:0:1000", "0:lib:0:500"))) // much does
	b.clock.pass(time.Minute)
	p, ok := b.due()
	if !ok {
		t.Fatal("a changed profile is not due")
	}
	for range 3 { // the registry is away
		must(t, b.PublicationFailed(t.Context(), p))
		b.expectNoneDue()
		b.report(report("a", 7, "n7", items(t, "0:bin/a:0:1000", "0:lib:0:600")))
		b.expectNoneDue()
		b.clock.pass(time.Hour)
		b.restart()
		if p, ok = b.due(); !ok {
			t.Fatal("what failed is not tried again")
		}
	}
	b.settle(p)
	must(t, b.Remove(t.Context(), manifest("a")))
	b.clock.pass(time.Minute)
	if p, ok = b.due(); !ok || p.Profile != nil || p.Places[0].Artifact == "" {
		t.Errorf("a removed profile stays published: %+v", p)
	}
	b.settle(p)
	b.expectNoneDue()
}

// What is switched off publishes nothing, also of what was due before.
func TestUnpublished(t *testing.T) {
	b := newBed(t, ledger.Options{})
	b.learn("a", ledger.Given{Predicted: items(t, "0:bin/a:0:1000")})
	must(t, b.Close())
	b.o.Unpublished = true
	b.open()
	b.learn("b", ledger.Given{Predicted: items(t, "0:bin/a:0:1000")})
	b.expectNoneDue()
	b.clock.pass(24 * time.Hour)
	b.expectNoneDue()
	b.o.Unpublished = false
	b.restart()
	b.expectDue("a")
}

// Several are published at a time, each by one; those of a registry that may not be asked now wait.
func TestPublicationsAtATime(t *testing.T) {
	b := newBed(t, ledger.Options{})
	ctx := t.Context()
	for _, name := range []string{"slow1", "slow2", "quick"} {
		at := imageOf(name)
		at.Target = strings.TrimRight(name, "12") + ".test/app"
		must(t, b.Learn(ctx, manifest(name), at, layers, ledger.Given{Predicted: items(t, "0:bin/a:0:1000")}))
		b.clock.pass(time.Second)
	}
	first, ok := b.due()
	if !ok || first.Manifest != manifest("slow1") {
		t.Fatalf("%+v", first)
	}
	p, err := b.NextPublication(ctx, func(at ledger.Image) bool { return at.Target != "slow.test/app" })
	must(t, err)
	if p.Manifest != manifest("quick") {
		t.Errorf("%s is published, which may not be", p.Places[0].Target)
	}
	second, ok := b.due()
	if !ok || second.Manifest != manifest("slow2") {
		t.Fatalf("%+v", second)
	}
	b.expectNoneDue() // all are somebody's
	must(t, b.PublicationFailed(ctx, first))
	b.expectNoneDue()
	b.clock.pass(2 * time.Minute)
	b.expectDue("slow1")
	b.settle(second)
	b.settle(p)
	b.expectNoneDue()
}

// What was put off because its image was not Ready is due when that is, also where it is just being found out.
func TestHasten(t *testing.T) {
	b := newBed(t, ledger.Options{})
	ctx := t.Context()
	must(t, b.Hasten(ctx, manifest("unknown")))
	b.learn("a", ledger.Given{Predicted: items(t, "0:bin/a:0:1000")})
	p, ok := b.due()
	if !ok {
		t.Fatal("nothing is due")
	}
	must(t, b.PublicationFailed(ctx, p))
	b.expectNoneDue()
	must(t, b.Hasten(ctx, p.Manifest))
	if p, ok = b.due(); !ok {
		t.Fatal("what was hastened is not due")
	}
	must(t, b.Hasten(ctx, p.Manifest))
	b.expectNoneDue() // it is somebody's
	must(t, b.PublicationFailed(ctx, p))
	if p, ok = b.due(); !ok {
		t.Fatal("what was hastened meanwhile is not due")
	}
	must(t, b.PublicationFailed(ctx, p)) // not once more
	b.expectNoneDue()
	b.clock.pass(2 * time.Minute)
	if p, ok = b.due(); !ok {
		t.Fatal("what failed is not tried again")
	}
	b.settle(p)
	must(t, b.Hasten(ctx, p.Manifest))
	b.expectNoneDue()
}

func TestRegistryThatDeletesNothing(t *testing.T) {
	b := newBed(t, ledger.Options{})
	b.learn("a", ledger.Given{})
	rounds := 0
	for n := range 150 { // ten hours in which it changes every four minutes
		must(t, b.Import(t.Context(), manifest("a"), accel.Profile{Items: items(t, fmt.Sprintf("0:f%d:0:10", n))}))
		if p, ok := b.due(); ok {
			if rounds++; p.Places[0].Artifact != "" {
				p.Places[0].Stale = append(p.Places[0].Stale, p.Places[0].Artifact)
			}
			p.Places[0].Artifact = p.Version
			must(t, b.Published(t.Context(), p))
		}
		b.clock.pass(4 * time.Minute)
	}
	if rounds < 3 || rounds > 12 {
		t.Errorf("published %d times where nothing is deleted", rounds)
	}
}

func TestPlacesComeAndGo(t *testing.T) {
	b := newBed(t, ledger.Options{})
	ctx := t.Context()
	b.learn("a", ledger.Given{Predicted: items(t, "0:bin/a:0:10")})
	for n := range 12 { // a base image in many indexes
		at := imageOf("a")
		at.Digest = manifest(fmt.Sprint("index", n))
		must(t, b.Learn(ctx, manifest("a"), at, layers, ledger.Given{}))
	}
	p, _ := b.due()
	if len(p.Places) != 8 {
		t.Errorf("%d places are kept", len(p.Places))
	}
	all, err := b.OfImage(ctx, manifest("index11"))
	must(t, err)
	if len(all) != 1 || all[0].Manifest != manifest("a") || all[0].Platform != "linux/amd64" || !all[0].Foretold {
		t.Errorf("platforms of an image: %+v", all)
	}
	for n := range 12 {
		must(t, b.Leave(ctx, repository, manifest(fmt.Sprint("index", n))))
	}
	if _, err := b.Status(ctx, manifest("a")); !errors.Is(err, accel.ErrNotFound) {
		t.Errorf("an image without a place is kept: %v", err)
	}
}
