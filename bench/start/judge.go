package main

import (
	"fmt"

	"accel/bench/report"
	"accel/internal/testbed"
)

// The bars that `make bench-start` judges by. Those of time are ratios of medians of one
// run of this program: seconds move with the machine.
const (
	fasterThanStargz = 2.5  // times stargz-untuned, without a profile, over barRate
	readAllCost      = 1.05 // times overlayfs's full pull and reading
	warmCost         = 1.1  // times overlayfs's warm start
	daemonMB         = 150.0
	holderMB         = 40.0
)

var barRate = testbed.LinkSpeed{BitsPerSecond: 1e9, RoundTrip: 10e6}

// judge makes the report: every variant's median, the lower bound, and the bars.
func judge(s setting, b *bed, res *results) error {
	r := report.New("start")
	for _, image := range s.images {
		for _, speed := range s.rates {
			medians(r, image, speed, res)
			bound(r, b, image, speed, res)
		}
		bars(r, s, image, res)
	}
	memoryBars(r, res)
	return r.Close()
}

func medians(r *report.Report, image string, speed testbed.LinkSpeed, res *results) {
	for _, v := range variants {
		if samples := res.of(image, speed, v.name); len(samples) > 0 {
			r.Add(fmt.Sprintf("%s %s %s", image, speed, v.name), spreadOf(samples, totalSeconds).median, "s", note(samples, v.note))
		}
	}
}

// bound adds the lower bound, and what multiple of it each variant takes that starts
// from nothing.
func bound(r *report.Report, b *bed, image string, speed testbed.LinkSpeed, res *results) {
	hot, known := b.hot[image]
	var warmStarts []sample
	for _, s := range res.samples { // the rate does not matter: nothing is fetched
		if s.Image == image && s.Variant == "overlayfs-warm" {
			warmStarts = append(warmStarts, s)
		}
	}
	if !known || len(warmStarts) == 0 {
		r.Missing(fmt.Sprintf("%s %s lower bound", image, speed), "wants overlayfs-warm and a variant of the optimised image")
		return
	}
	least, how := hot.lowerBound(speed, spreadOf(warmStarts, totalSeconds).median)
	r.Add(fmt.Sprintf("%s %s lower bound", image, speed), least, "s", how)
	for _, v := range variants {
		if samples := res.of(image, speed, v.name); len(samples) > 0 && v.at == cold && !v.all {
			r.Add(fmt.Sprintf("%s %s %s over it", image, speed, v.name), spreadOf(samples, totalSeconds).median/least, "x", "")
		}
	}
}

func bars(r *report.Report, s setting, image string, res *results) {
	ratio := func(name string, speed testbed.LinkSpeed, over, under string, judge func(name string, value float64, note string)) {
		name = fmt.Sprintf("%s %s %s", image, speed, name)
		a, b := res.of(image, speed, over), res.of(image, speed, under)
		if len(a) == 0 || len(b) == 0 {
			r.Missing(name, fmt.Sprintf("wants %s and %s at this rate", over, under))
			return
		}
		judge(name, spreadOf(a, totalSeconds).median/spreadOf(b, totalSeconds).median, fmt.Sprintf("medians of %s over %s", over, under))
	}
	ratio("accel is faster than stargz by", barRate, "stargz-untuned", "accel", func(name string, x float64, how string) { r.AtLeast(name, x, fasterThanStargz, "x", how) })
	ratio("accel, all files read", barRate, "accel-all", "overlayfs-all", func(name string, x float64, how string) { r.AtMost(name, x, readAllCost, "x", how) })
	ratio("accel, warm", s.rates[0], "accel-warm", "overlayfs-warm", func(name string, x float64, how string) { r.AtMost(name, x, warmCost, "x", how) })
	// With profiles there will be more to ask: accel-profile against stargz-optimised and
	// overlayfs, and the best peer at every rate.
	name := fmt.Sprintf("%s %s accel, warm: fetched", image, s.rates[0])
	if samples := res.of(image, s.rates[0], "accel-warm"); len(samples) > 0 {
		r.AtMost(name, spreadOf(samples, fetchedMB).most, 0, "MB", "most of all starts")
	} else {
		r.Missing(name, "wants accel-warm")
	}
}

func memoryBars(r *report.Report, res *results) {
	how := fmt.Sprintf("anonymous resident, %d images of %d files mounted, nothing going on", memoryImages, filesEach)
	judged := false
	for _, m := range res.memory {
		if m.system != accelNode {
			r.Add(fmt.Sprintf("memory of %s", m.system), m.daemonMB+m.restMB, "MB", how)
			continue
		}
		judged = true
		r.AtMost("memory of accel's daemon", m.daemonMB, daemonMB, "MB", how)
		r.AtMost("memory of accel's holder", m.restMB, holderMB, "MB", how)
	}
	if !judged {
		r.Missing("memory of accel's daemon and holder", "wants a variant of accel, and -memory")
	}
}
