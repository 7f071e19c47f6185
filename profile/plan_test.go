package profile_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"accel"
	"accel/profile"

	"github.com/containerd/stargz-snapshotter/estargz"
)

// ranges are written "layer:first+n".
func ranges(r []profile.Range) string {
	var s []string
	for _, x := range r {
		s = append(s, fmt.Sprintf("%d:%d+%d", x.Layer, x.First, x.N))
	}
	return strings.Join(s, " ")
}

func TestLayer(t *testing.T) {
	l := layerOf(t, dir("d"), file("d/old", 10, "old"), file("d/big", 200_000, "big"), hardlink("d/other", "d/big"), hardlink("d/third", "d/other"),
		file("empty", 0, ""), symlink("s", "d/big"), file("d/small", 100, "small"), file(".prefetch.landmark", 1, "x")).named(t)
	for _, test := range []struct {
		name          string
		offset, bytes int64
		first, n      int
	}{
		{"d/old", 0, 10, 0, 1},
		{"d/big", 0, 200_000, 1, 4},
		{"d/big", 65536, 1, 2, 1},
		{"d/big", 65535, 2, 1, 2},
		{"d/big", 150_000, math.MaxInt64, 3, 2},
		{"d/other", 0, 1, 1, 1},
		{"d/third", 199_999, 1, 4, 1},
		{"d/small", 0, 1 << 40, 5, 1},
		{"d/big", 200_000, 1, 0, 0},
		{"d/big", -1, 5, 0, 0},
		{"d/big", 0, 0, 0, 0},
		{"empty", 0, 1, 0, 0},
		{"s", 0, 1, 0, 0},
		{"d", 0, 1, 0, 0},
		{"gone", 0, 1, 0, 0},
		{".prefetch.landmark", 0, 1, 0, 0},
	} {
		if first, n := l.Chunks(test.name, test.offset, test.bytes); first != test.first || n != test.n {
			t.Errorf("%s, %d at %d: %d+%d, want %d+%d", test.name, test.bytes, test.offset, first, n, test.first, test.n)
		}
	}
	// A table that lacks a file, as one does that a later entry replaced.
	whole := layerOf(t, file("a", 100, "a"), file("b", 100, "b"))
	whole.chunks = whole.chunks[1:]
	l = whole.named(t)
	if _, n := l.Chunks("a", 0, 1); n != 0 {
		t.Error("a replaced file has chunks")
	}
	if first, n := l.Chunks("b", 0, 1); first != 0 || n != 1 {
		t.Errorf("b: %d+%d", first, n)
	}
}

func TestPlan(t *testing.T) {
	lower := layerOf(t, file("a", 4*chunkBytes, "a"), file("gap", 2*chunkBytes, "gap"), file("b", chunkBytes, "b"), file("far", 40*chunkBytes, "far"), file("c", chunkBytes, "c")).named(t)
	upper := layerOf(t, file("x", 2*chunkBytes, "x"), file("y", chunkBytes, "y")).named(t)
	layers := []*profile.Layer{lower, nil, upper}
	plan := func(limits profile.Limits, list ...string) string {
		return ranges(profile.Plan(accel.Profile{Items: items(t, list...)}, layers, limits))
	}
	for _, test := range []struct {
		name   string
		limits profile.Limits
		list   []string
		want   string
	}{
		{"by first use, over the layers", profile.Limits{}, []string{"2:x:0:10", "0:c:0:10", "0:a:0:10"}, "2:0+1 0:47+1 0:0+1"},
		{"a run", profile.Limits{}, []string{"0:a:0:65536", "0:a:65536:196608", "0:gap:0:1"}, "0:0+5"},
		{"the order is kept", profile.Limits{}, []string{"0:a:65536:65536", "2:y:0:1", "0:a:0:65536"}, "0:1+1 2:2+1 0:0+1"},
		{"said twice", profile.Limits{}, []string{"2:x:0:10", "2:x:5:10", "2:x:0:10"}, "2:0+1"},
		{"unknown and out of range", profile.Limits{}, []string{"0:gone:0:1", "0:a:999999999:1", "1:a:0:1", "3:a:0:1", "400:a:0:1", "2:y:0:1"}, "2:2+1"},
		{"the bound", profile.Limits{HotBytes: 3 * chunkBytes}, []string{"0:far:0:999999999", "2:y:0:1"}, "0:7+3"},
		{"there already", profile.Limits{Has: func(layer, chunk int) bool { return layer == 0 && chunk == 1 }}, []string{"0:a:0:262144"}, "0:0+1 0:2+2"},
		{"nothing", profile.Limits{}, nil, ""},
	} {
		if got := plan(test.limits, test.list...); got != test.want {
			t.Errorf("%s: %s, want %s", test.name, got, test.want)
		}
	}
}

// Whatever a profile says: each chunk once, within the image and the bounds, and every
// chunk that it names is there.
func TestPlanProperty(t *testing.T) {
	r := rand.New(rand.NewPCG(4, 9))
	for n := range 300 {
		var layers []*profile.Layer
		var raw []*layer
		for range 1 + r.IntN(4) {
			var entries []*estargz.TOCEntry
			for f := range 1 + r.IntN(40) {
				entries = append(entries, file(fmt.Sprint("f", f), r.Int64N(20*chunkBytes), fmt.Sprint(f)))
			}
			raw = append(raw, layerOf(t, entries...))
			layers = append(layers, raw[len(raw)-1].named(t))
		}
		var p accel.Profile
		for range r.IntN(60) {
			p.Items = append(p.Items, accel.ProfileItem{Layer: r.IntN(6) - 1, Path: fmt.Sprint("f", r.IntN(45)), Offset: r.Int64N(20*chunkBytes) - 100, Bytes: r.Int64N(20 * chunkBytes)})
		}
		have := map[[2]int]bool{}
		limits := profile.Limits{Has: func(layer, chunk int) bool { return have[[2]int{layer, chunk}] }}
		if n%3 == 0 {
			limits.HotBytes = 1 + r.Int64N(4<<20)
		}
		for range r.IntN(50) {
			have[[2]int{r.IntN(4), r.IntN(100)}] = true
		}
		planned := map[[2]int]bool{}
		var hot int64
		plan := profile.Plan(p, layers, limits)
		for _, x := range plan {
			if x.Layer < 0 || x.Layer >= len(layers) || x.First < 0 || x.N <= 0 || x.First+x.N > raw[x.Layer].Len() {
				t.Fatalf("%d: range %+v is outside of the image", n, x)
			}
			for k := x.First; k < x.First+x.N; k++ {
				at := [2]int{x.Layer, k}
				if planned[at] || have[at] {
					t.Fatalf("%d: chunk %v is fetched again", n, at)
				}
				planned[at] = true
				hot += raw[x.Layer].At(k).Bytes
			}
		}
		if limits.HotBytes > 0 && hot > limits.HotBytes {
			t.Fatalf("%d: %d hot bytes, bound %d", n, hot, limits.HotBytes)
		}
		for _, i := range p.Items {
			if limits.HotBytes > 0 || i.Layer < 0 || i.Layer >= len(layers) || i.Offset < 0 {
				continue
			}
			first, c := layers[i.Layer].Chunks(i.Path, i.Offset, i.Bytes)
			for k := first; k < first+c; k++ {
				if at := [2]int{i.Layer, k}; !planned[at] && !have[at] {
					t.Fatalf("%d: chunk %v of %v is missing", n, at, i)
				}
			}
		}
		if again := profile.Plan(p, layers, limits); !reflect.DeepEqual(plan, again) {
			t.Fatalf("%d: another plan the second time", n)
		}
	}
}

func TestCoverage(t *testing.T) {
	c := profile.Coverage(accel.Profile{Items: items(t, "0:a:0:100", "0:b:50:50", "1:a:0:10")}, accel.Profile{Items: items(t, "0:a:90:20", "0:b:0:200", "0:b:0:10", "2:a:0:7")})
	if want := (profile.Cover{RecordedBytes: 160, CoveredBytes: 60, VainBytes: 10 + 150 + 7}); c != want {
		t.Errorf("%+v, want %+v", c, want)
	}
	if s := c.Share(); s != 0.375 {
		t.Errorf("share %v", s)
	}
	if s := (profile.Cover{}).Share(); s != 1 {
		t.Errorf("share of nothing %v", s)
	}
}
