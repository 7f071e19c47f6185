package main

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"math"
)

// A plot has two panels, the time and the bytes of each row, as bars that begin at zero. Sizes are in pixels.
const (
	plotLeft    = 300 // for the names
	plotPanel   = 360 // a panel's width
	plotGap     = 110 // between the panels and behind them, for the figures
	plotTop     = 50
	plotBar     = 18
	plotRow     = 24
	plotSpace   = 16 // between images
	plotNameMax = 44 // characters of an image's name
)

// plotBench draws the medians as an SVG image.
func plotBench(rows []benchRow) []byte {
	var mostSeconds, mostBytes float64
	images := 0
	for i, r := range rows {
		mostSeconds = max(mostSeconds, r.PullSeconds+r.StartSeconds)
		mostBytes = max(mostBytes, float64(r.FetchedBytes))
		if i == 0 || rows[i-1].Image != r.Image {
			images++
		}
	}
	width, height := plotLeft+2*plotPanel+2*plotGap, plotTop+len(rows)*plotRow+images*(plotRow+plotSpace)
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n", width, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="white"/>`+"\n", width, height)
	second := plotLeft + plotPanel + plotGap
	text(&b, plotLeft, 20, "start", "black", "seconds until the program answers, medians: ")
	text(&b, plotLeft, 36, "start", "#4472c4", "pull")
	text(&b, plotLeft+40, 36, "start", "#ed7d31", "start")
	text(&b, second, 20, "start", "black", "bytes that had come by then")
	y := plotTop
	for i, r := range rows {
		if i == 0 || rows[i-1].Image != r.Image {
			y += plotSpace
			text(&b, plotLeft-8, y+plotBar-5, "end", "black", shortened(r.Image))
			y += plotRow
		}
		text(&b, plotLeft-8, y+plotBar-5, "end", "#555555", r.Way)
		pull, start := scaled(r.PullSeconds, mostSeconds), scaled(r.StartSeconds, mostSeconds)
		bar(&b, plotLeft, y, pull, "#4472c4")
		bar(&b, plotLeft+pull, y, start, "#ed7d31")
		text(&b, plotLeft+pull+start+6, y+plotBar-5, "start", "black", fmt.Sprintf("%.2f s", r.PullSeconds+r.StartSeconds))
		came := scaled(float64(r.FetchedBytes), mostBytes)
		bar(&b, second, y, came, "#70ad47")
		text(&b, second+came+6, y+plotBar-5, "start", "black", bytesText(r.FetchedBytes))
		y += plotRow
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

// scaled is a figure's width in its panel.
func scaled(v, most float64) int {
	if most <= 0 {
		return 0
	}
	return int(math.Round(v / most * plotPanel))
}

func bar(b *bytes.Buffer, x, y, width int, colour string) {
	fmt.Fprintf(b, `<rect x="%d" y="%d" width="%d" height="%d" fill="%s"/>`+"\n", x, y, width, plotBar, colour)
}

// text writes what may come from outside.
func text(b *bytes.Buffer, x, y int, anchor, colour, s string) {
	fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="%s" fill="%s">`, x, y, anchor, colour)
	_ = xml.EscapeText(b, []byte(s)) // a buffer takes everything
	b.WriteString("</text>\n")
}

// shortened is the end of a name, which tells images apart.
func shortened(name string) string {
	if r := []rune(name); len(r) > plotNameMax {
		return "…" + string(r[len(r)-plotNameMax+1:])
	}
	return name
}
