package main

import (
	"fmt"
	"math"
	"slices"
	"time"

	"accel/bench/report"
	"accel/internal/testbed"
)

// The bars that `make bench-start` judges by. Those of time are ratios of medians of one
// run of this program: seconds move with the machine.
const (
	// Over barRate, with barImage:
	fasterThanStargz    = 2.5  // times stargz-untuned, without a profile
	fasterThanOptimised = 2.5  // times stargz-optimised, with a profile
	fasterThanOverlayfs = 7.0  // times overlayfs's full pull, with a profile
	readAllCost         = 1.05 // times overlayfs's full pull and reading
	// With every image:
	worstOfBest = 1.05 // times the best peer, with a profile, over every network
	warmCost    = 1.1  // times overlayfs's warm start
	// With foretoldImages: the least share of what a start reads that its prediction names, and what this may name in vain as a
	// part of that.
	foretoldShare, vainShare = 0.6, 1.0
	daemonMB                 = 150.0
	holderMB                 = 40.0

	// aimOverBound is what is aimed at, no bar: times the counted bound.
	aimOverBound = 1.5
)

const barImage = "pyapp"

var foretoldImages = []string{"pyapp", "node", "java", "nginx"}

var barRate = testbed.LinkSpeed{BitsPerSecond: 1e9, RoundTrip: 10e6}

// fartherTime is how much farther away the second link is that round trips are counted by.
const fartherTime = 100 * time.Millisecond

func farther(s testbed.LinkSpeed) testbed.LinkSpeed {
	s.RoundTrip += fartherTime
	return s
}

// judgement is a report's rows, and those with bars once more for the documents.
type judgement struct {
	*report.Report
	bars []barRow
}

type barRow struct {
	name, value, bar, met, note string
}

func (j *judgement) bar(name string, x float64, atMost bool, bar float64, unit, note string) {
	sign, met := ">=", x >= bar
	if atMost {
		sign, met = "<=", x <= bar
		j.AtMost(name, x, bar, unit, note)
	} else {
		j.AtLeast(name, x, bar, unit, note)
	}
	said := "yes"
	if !met {
		said = "**no**"
	}
	j.bars = append(j.bars, barRow{name, fmt.Sprintf("%.3g %s", x, unit), fmt.Sprintf("%s %g", sign, bar), said, note})
}

func (j *judgement) missing(name, why string) {
	j.Missing(name, why)
	j.bars = append(j.bars, barRow{name, "not measured", "", "", why})
}

// judge makes the rows: every variant's median, the lower bounds, and the bars.
func judge(res *results) (*judgement, error) {
	j := &judgement{Report: report.New("start")}
	speeds, err := res.about.speeds()
	if err != nil {
		return nil, err
	}
	for _, image := range res.images() {
		for _, speed := range speeds {
			j.medians(image.name, speed, res)
			j.bounds(image.name, speed, res)
		}
		j.roundTrips(image.name, speeds[0], res)
		j.foretold(image.name, res)
		j.ratios(image, speeds, res)
	}
	j.memory(res)
	return j, nil
}

func (j *judgement) medians(image string, speed testbed.LinkSpeed, res *results) {
	for _, v := range variants {
		if samples := res.of(image, speed, v.name); len(samples) > 0 {
			j.Add(fmt.Sprintf("%s %s %s", image, speed, v.name), spreadOf(samples, totalSeconds).median, "s", note(samples, v.note))
		}
	}
}

// boundsOf are the lower bounds of an image over a network: design's formula, and the counted one.
func (r *results) boundsOf(image string, speed testbed.LinkSpeed) (lower, counted bound, ok bool) {
	hot, known := r.hotOf(image)
	var warmStarts []sample
	for _, s := range r.samples { // the rate does not matter: nothing is fetched
		if s.Image == image && s.Variant == "overlayfs-warm" {
			warmStarts = append(warmStarts, s)
		}
	}
	if !known || len(warmStarts) == 0 {
		return bound{}, bound{}, false
	}
	// The least CPU: what other programs did meanwhile is in it.
	return hot.lowerBound(speed, r.about.Cores, spreadOf(warmStarts, totalSeconds).median),
		hot.countedBound(speed, r.about.Cores, spreadOf(warmStarts, wholeCPU).least), true
}

// bounds adds the lower bounds, and what multiple of them each variant takes that starts
// from nothing.
func (j *judgement) bounds(image string, speed testbed.LinkSpeed, res *results) {
	lower, counted, ok := res.boundsOf(image, speed)
	if !ok {
		j.Missing(fmt.Sprintf("%s %s lower bound", image, speed), "wants overlayfs-warm and a variant of the optimised image")
		return
	}
	j.Add(fmt.Sprintf("%s %s lower bound", image, speed), lower.seconds, "s", lower.how)
	j.Add(fmt.Sprintf("%s %s counted bound", image, speed), counted.seconds, "s", counted.how)
	for _, v := range variants {
		if samples := res.of(image, speed, v.name); len(samples) > 0 && v.at == cold && !v.all {
			median, how := spreadOf(samples, totalSeconds).median, ""
			if v.name == "accel-profile" {
				how = fmt.Sprintf("%.2f times the counted bound; aim %g", median/counted.seconds, aimOverBound)
			}
			j.Add(fmt.Sprintf("%s %s %s over it", image, speed, v.name), median/lower.seconds, "x", how)
		}
	}
}

// tripsOf is how many round trips one after the other a variant's start has: how much longer
// it takes over a link that is farther away.
func (r *results) tripsOf(image string, speed testbed.LinkSpeed, variant string) (float64, bool) {
	near, far := r.of(image, speed, variant), r.of(image, farther(speed), variant)
	if len(near) == 0 || len(far) == 0 {
		return 0, false
	}
	return (spreadOf(far, totalSeconds).median - spreadOf(near, totalSeconds).median) / fartherTime.Seconds(), true
}

func (j *judgement) roundTrips(image string, speed testbed.LinkSpeed, res *results) {
	for _, v := range variants {
		if n, ok := res.tripsOf(image, speed, v.name); ok {
			j.Add(fmt.Sprintf("%s %s round trips", image, v.name), n, "", fmt.Sprintf("one after the other: how much longer it takes over %s", farther(speed)))
		}
	}
}

func (j *judgement) ratios(image startable, speeds []testbed.LinkSpeed, res *results) {
	median := func(speed testbed.LinkSpeed, variant string) (float64, bool) {
		samples := res.of(image.name, speed, variant)
		if len(samples) == 0 {
			return 0, false
		}
		return spreadOf(samples, totalSeconds).median, true
	}
	ratio := func(name string, speed testbed.LinkSpeed, over, under string, atMost bool, bar float64) {
		name = fmt.Sprintf("%s %s %s", image, speed, name)
		a, aKnown := median(speed, over)
		b, bKnown := median(speed, under)
		if !aKnown || !bKnown {
			j.missing(name, fmt.Sprintf("wants %s and %s at this rate", over, under))
			return
		}
		j.bar(name, a/b, atMost, bar, "x", fmt.Sprintf("medians of %s over %s", over, under))
	}
	if image.name == barImage && slices.Contains(speeds, barRate) {
		ratio("accel is faster than stargz by", barRate, "stargz-untuned", "accel", false, fasterThanStargz)
		ratio("accel with a profile is faster than stargz optimised by", barRate, "stargz-optimised", "accel-profile", false, fasterThanOptimised)
		ratio("accel with a profile is faster than overlayfs by", barRate, "overlayfs", "accel-profile", false, fasterThanOverlayfs)
		ratio("accel, all files read", barRate, "accel-all", "overlayfs-all", true, readAllCost)
	}
	for _, speed := range speeds {
		name := fmt.Sprintf("%s %s accel with a profile, over the best peer", image, speed)
		own, known := median(speed, "accel-profile")
		best, peer := math.Inf(1), ""
		for _, v := range variants {
			if m, ok := median(speed, v.name); ok && v.isPeer() && m < best {
				best, peer = m, v.name
			}
		}
		if !known || peer == "" {
			j.missing(name, "wants accel-profile and a peer at this rate")
			continue
		}
		j.bar(name, own/best, true, worstOfBest, "x", "that is "+peer)
	}
	ratio("accel, warm", speeds[0], "accel-warm", "overlayfs-warm", true, warmCost)
	name := fmt.Sprintf("%s %s accel, warm: fetched", image, speeds[0])
	if samples := res.of(image.name, speeds[0], "accel-warm"); len(samples) > 0 {
		j.bar(name, spreadOf(samples, fetchedMB).most, true, 0, "MB", "most of all starts")
	} else {
		j.missing(name, "wants accel-warm")
	}
}

// foretold judges the prediction.
func (j *judgement) foretold(image string, res *results) {
	covers, vain := image+" prediction covers", image+" prediction, in vain"
	c, known := res.foretoldOf(image)
	barred := slices.Contains(foretoldImages, image)
	switch {
	case known && barred:
		j.bar(covers, c.Share(), false, foretoldShare, "", fmt.Sprintf("of %.1f MB that a recorded start read", float64(c.RecordedBytes)/megabyte))
		j.bar(vain, float64(c.VainBytes)/float64(max(c.CoveredBytes, 1)), true, vainShare, "", "bytes that the start did not read, over those that it did")
	case known:
		j.Add(covers, c.Share(), "", fmt.Sprintf("of %.1f MB that a recorded start read; %.1f MB in vain", float64(c.RecordedBytes)/megabyte, float64(c.VainBytes)/megabyte))
	case barred:
		j.missing(covers, "wants accel-predicted and accel-profile")
	}
}

func (j *judgement) memory(res *results) {
	how := fmt.Sprintf("anonymous resident, %d images of %d files mounted, nothing going on", memoryImages, filesEach)
	judged := false
	for _, m := range res.memory {
		if m.System != accelNode {
			j.Add(fmt.Sprintf("memory of %s", m.System), m.DaemonMB+m.RestMB, "MB", how)
			continue
		}
		judged = true
		j.bar("memory of accel's daemon", m.DaemonMB, true, daemonMB, "MB", how)
		j.bar("memory of accel's holder", m.RestMB, true, holderMB, "MB", how)
	}
	if !judged {
		j.missing("memory of accel's daemon and holder", "wants a variant of accel, and -memory")
	}
}
