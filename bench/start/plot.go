package main

import (
	"fmt"
	"html"
	"os"
	"strings"

	"accel/internal/testbed"
)

// Measures of a plot, in the units of an SVG.
const (
	plotWidth  = 860
	labelWidth = 190
	barsWidth  = 540
	rowHeight  = 24
	barHeight  = 14
	panelSpace = 44 // above each panel's rows, with its title
)

// Colours that hold on the plot's own white ground; the pull's part of a bar is the darker one.
const (
	ownPull, ownStart   = "#0b6e4f", "#3fb68b"
	peerPull, peerStart = "#5b6573", "#aab4c0"
)

// plotStarts draws the cold starts of an image over all networks: a panel for each, a bar for
// each variant.
func plotStarts(path string, image startable, speeds []testbed.LinkSpeed, res *results) error {
	var body strings.Builder
	y := 8
	for _, speed := range speeds {
		var shown []variant
		most := 0.0
		for _, v := range variants {
			if samples := res.of(image.name, speed, v.name); len(samples) > 0 && v.at == cold && !v.all {
				shown = append(shown, v)
				most = max(most, spreadOf(samples, totalSeconds).most)
			}
		}
		if len(shown) == 0 {
			continue
		}
		lower, _, hasBound := res.boundsOf(image.name, speed)
		scale := barsWidth / max(most, lower.seconds)
		y += panelSpace
		fmt.Fprintf(&body, `<text x="8" y="%d" class="title">%s, %s</text>`+"\n", y-14, html.EscapeString(image.name), html.EscapeString(speed.String()))
		top := y
		for _, v := range shown {
			plotBar(&body, y, v, res.of(image.name, speed, v.name), scale)
			y += rowHeight
		}
		if hasBound {
			x := labelWidth + lower.seconds*scale
			fmt.Fprintf(&body, `<path d="M%.1f %dV%d" class="bound"><title>lower bound: %.2f s</title></path>`+"\n", x, top-4, y, lower.seconds)
		}
	}
	y += 28
	fmt.Fprintf(&body, `<text x="8" y="%d" class="note">Seconds from the begin of the pull, which is the dark part, until the program is ready: medians; lines: least and most; dashed: lower bound.</text>`+"\n", y-8)
	svg := fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" width="%[1]d" height="%[2]d" viewBox="0 0 %[1]d %[2]d" role="img" aria-label="start times of %[3]s">
<style>text{font:13px sans-serif;fill:#222}.title{font-weight:bold}.note{font-size:11px;fill:#555}.whisker{stroke:#222;fill:none}.bound{stroke:#c0392b;stroke-dasharray:4 3;fill:none}</style>
<rect width="%[1]d" height="%[2]d" fill="#fff"/>
%[4]s</svg>
`, plotWidth, y, html.EscapeString(image.name), body.String())
	return os.WriteFile(path, []byte(svg), 0o644)
}

func plotBar(to *strings.Builder, y int, v variant, samples []sample, scale float64) {
	total, pull := spreadOf(samples, totalSeconds), spreadOf(samples, pullSeconds)
	dark, light := peerPull, peerStart
	if v.system == accelNode {
		dark, light = ownPull, ownStart
	}
	middle := float64(y) + barHeight/2.0
	pulling := min(pull.median, total.median)
	fmt.Fprintf(to, `<text x="%d" y="%.1f" text-anchor="end">%s</text>`, labelWidth-8, middle+4.5, html.EscapeString(v.name))
	fmt.Fprintf(to, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`, labelWidth, y, pulling*scale, barHeight, dark)
	fmt.Fprintf(to, `<rect x="%.1f" y="%d" width="%.1f" height="%d" fill="%s"/>`, labelWidth+pulling*scale, y, (total.median-pulling)*scale, barHeight, light)
	if len(samples) > 1 {
		fmt.Fprintf(to, `<path d="M%.1f %.1fH%.1f" class="whisker"/>`, labelWidth+total.least*scale, middle, labelWidth+total.most*scale)
	}
	fmt.Fprintf(to, `<text x="%.1f" y="%.1f">%.2f s, %.0f MB</text>`+"\n", labelWidth+total.most*scale+8, middle+4.5, total.median, spreadOf(samples, fetchedMB).median)
}
