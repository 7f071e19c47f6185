package profile_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"accel"
	"accel/profile"
)

func summaryOf(t testing.TB, reports ...profile.Report) *profile.Summary {
	t.Helper()
	s := profile.NewSummary(imageA)
	for _, r := range reports {
		_, err := s.Add(r)
		must(t, err)
	}
	return s
}

// A hundred nodes' reports, some sent twice, added one by one or by way of other
// summaries, in any order: the same summary and the same profile.
func TestSummaryOrder(t *testing.T) {
	r := rand.New(rand.NewPCG(2, 3))
	var reports []profile.Report
	for n := range 100 {
		one := report(n, fmt.Sprintf("node-%d", n%40), randomStart(r))
		if n%9 == 0 {
			one.Complete = false
		}
		reports = append(reports, one)
		if n%10 == 0 { // an id that was used twice
			one.Items = randomStart(r)
			reports = append(reports, one)
		}
	}
	var want, wantProfile []byte
	for try := range 8 {
		parts := make([]*profile.Summary, 1+try%6)
		for n := range parts {
			parts[n] = profile.NewSummary(imageA)
		}
		for _, n := range append(r.Perm(len(reports)), r.Perm(len(reports))[:20]...) {
			_, err := parts[r.IntN(len(parts))].Add(reports[n])
			must(t, err)
		}
		for len(parts) > 1 {
			a, b := r.IntN(len(parts)), len(parts)-1
			if a == b {
				a = 0
			}
			if try%2 == 0 { // as it comes from a store
				back, err := profile.DecodeSummary(parts[b].Encode())
				must(t, err)
				parts[b] = back
			}
			_, err := parts[a].Merge(parts[b])
			must(t, err)
			parts = parts[:b]
		}
		got := parts[0].Encode()
		p, err := profile.Encode(parts[0].Profile(0))
		must(t, err)
		if want == nil {
			want, wantProfile = got, p
			t.Logf("a summary of %d reports: %d bytes; the profile %d", parts[0].Reports(), len(want), len(p))
		}
		if !bytes.Equal(got, want) || !bytes.Equal(p, wantProfile) {
			t.Fatalf("try %d: another summary or profile", try)
		}
		if changed, err := parts[0].Merge(parts[0]); changed || err != nil {
			t.Errorf("merged with itself: %t, %v", changed, err)
		}
	}
}

func TestSummaryMajority(t *testing.T) {
	a := items(t, "0:sh:0:8192", "1:app:0:4096", "1:lib:0:16384")
	b := items(t, "0:sh:0:8192", "1:lib:8192:16384", "1:app:0:4096")
	c := items(t, "0:sh:4096:4096", "1:lib:8192:4096", "1:rare:0:4096")
	same(t, summaryOf(t, report(1, "x", a)).Profile(0).Items, "0:sh:0:8192", "1:app:0:4096", "1:lib:0:16384")
	s := summaryOf(t, report(1, "x", a), report(2, "y", b), report(3, "z", c))
	p := s.Profile(0)
	same(t, p.Items, "0:sh:0:8192", "1:app:0:4096", "1:lib:8192:8192")
	if p.Starts != 3 || !p.RecordedAt.Equal(report(3, "", nil).StartedAt) || p.Origin != accel.ProfileRecorded || p.Manifest != imageA {
		t.Errorf("%+v", p)
	}
	same(t, s.Profile(1).Items, "0:sh:4096:4096", "1:lib:8192:4096")
	if got := s.Profile(0.01).Bytes(); got != 8192+4096+24576+4096 {
		t.Errorf("everything is %d bytes", got)
	}
	if got, want := texts(s.Profile(7).Items), texts(p.Items); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("a share of 7: %v", got)
	}
}

// What was in the kernel's cache is missing in a report; that says nothing.
func TestSummaryIncomplete(t *testing.T) {
	whole := report(1, "x", items(t, "0:a:0:4096", "0:b:0:4096"))
	warm := func(n int, list ...string) profile.Report {
		r := report(n, fmt.Sprintf("n%d", n), items(t, list...))
		r.Complete = false
		return r
	}
	s := summaryOf(t, whole, warm(2), warm(3), warm(4), warm(5, "0:c:0:4096"))
	same(t, s.Profile(0).Items, "0:a:0:4096", "0:c:0:4096", "0:b:0:4096")
	same(t, summaryOf(t, warm(5, "0:c:0:4096"), warm(6)).Profile(0).Items, "0:c:0:4096")
	// Incomplete reports never push a complete one out.
	for n := range 100 {
		_, err := s.Add(warm(1000+n, "0:d:0:4096"))
		must(t, err)
	}
	if s.Reports() != profile.MaxReports || s.Profile(1).Items[0].Path != "a" {
		t.Errorf("%d reports, %v", s.Reports(), texts(s.Profile(1).Items))
	}
}

// One node has no majority, however much it reports, and its bytes are bounded.
func TestSummaryHostile(t *testing.T) {
	s := profile.NewSummary(imageA)
	for n := range 200 {
		_, err := s.Add(report(n, "bad", items(t, "0:junk:0:1073741824", "0:more:0:1073741824")))
		must(t, err)
	}
	if s.Reports() != profile.MaxReportsOfNode {
		t.Errorf("%d reports of one node", s.Reports())
	}
	if got := s.Profile(0).Bytes(); got != profile.MaxHotBytes {
		t.Errorf("%d bytes are hot", got)
	}
	for n := range 6 {
		_, err := s.Add(report(1000+n, fmt.Sprintf("n%d", n), items(t, "0:good:0:4096")))
		must(t, err)
	}
	same(t, s.Profile(0).Items, "0:good:0:4096")

	odd := report(1, "x", append(items(t, "0:a:0:10", "0:a:5:10", "0:a:2:3"),
		accel.ProfileItem{Path: "../x", Bytes: 1}, accel.ProfileItem{Path: "x"}, accel.ProfileItem{Path: "x", Offset: -5, Bytes: 9},
		accel.ProfileItem{Path: "x", Offset: 1 << 62, Bytes: 1 << 62}, accel.ProfileItem{Layer: -1, Path: "x", Bytes: 1}))
	same(t, summaryOf(t, odd).Profile(0).Items, "0:a:0:15")

	// Very many items of one file, from all reports.
	s = profile.NewSummary(imageA)
	for n := range profile.MaxReports {
		var many []accel.ProfileItem
		for k := range profile.MaxItems {
			many = append(many, accel.ProfileItem{Path: "f", Offset: int64(k*64 + n), Bytes: 32})
		}
		_, err := s.Add(report(n, fmt.Sprintf("n%d", n), many))
		must(t, err)
	}
	if got := len(s.Profile(0).Items); got > profile.MaxItems {
		t.Errorf("%d items", got)
	}
	back, err := profile.DecodeSummary(s.Encode())
	must(t, err)
	if back.Reports() != profile.MaxReports {
		t.Errorf("%d reports", back.Reports())
	}
}

func TestSummaryRefuses(t *testing.T) {
	s := profile.NewSummary(imageA)
	for name, change := range map[string]func(*profile.Report){
		"another image": func(r *profile.Report) { r.Manifest = imageB },
		"no id":         func(r *profile.Report) { r.ID = "" },
		"upper case":    func(r *profile.Report) { r.ID = "A" + r.ID[1:] },
		"end":           func(r *profile.Report) { r.End = "" },
		"time":          func(r *profile.Report) { r.StartedAt = dayOne.Add(5) },
		"no time":       func(r *profile.Report) { r.StartedAt = dayOne.AddDate(-9000, 0, 0) },
		"node":          func(r *profile.Report) { r.Node = "a\nb" },
	} {
		r := report(1, "x", nil)
		change(&r)
		if _, err := s.Add(r); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.Merge(profile.NewSummary(imageB)); !errors.Is(err, accel.ErrInvalid) {
		t.Errorf("merged with another image's: %v", err)
	}
	for _, bad := range []string{"", "{}", `{"v":1,"manifest":"` + string(imageA) + `","layers":[],"parts":[],"reports":[{"id":"00000000000000000000000000000001","startedAt":1,"end":"quiet","parts":[0]}]}`} {
		if _, err := profile.DecodeSummary([]byte(bad)); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

func FuzzDecodeSummary(f *testing.F) {
	r := rand.New(rand.NewPCG(5, 5))
	f.Add(summaryOf(f, report(1, "x", randomStart(r)[:9]), report(2, "y", randomStart(r)[:9])).Encode())
	f.Add(profile.NewSummary(imageA).Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := profile.DecodeSummary(b)
		if err != nil {
			if !errors.Is(err, accel.ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		if _, err := profile.Encode(s.Profile(0)); err != nil {
			t.Fatal(err)
		}
	})
}

func BenchmarkSummary(b *testing.B) {
	r := rand.New(rand.NewPCG(5, 5))
	s := profile.NewSummary(imageA)
	for n := range 30 {
		_, err := s.Add(report(n, fmt.Sprint(n), randomStart(r)))
		must(b, err)
	}
	stored := s.Encode()
	for b.Loop() { // one report comes in
		s, err := profile.DecodeSummary(stored)
		must(b, err)
		_, err = s.Add(report(1000, "new", randomStart(r)))
		must(b, err)
		s.Encode()
		s.Profile(0)
	}
}

func TestBarSaysWhatNeedNotBeAdded(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	s := profile.NewSummary(imageA)
	skipped := 0
	for n := range 300 {
		one := report(n, fmt.Sprint("node", n%60), randomStart(r)[:3])
		one.Complete = n%4 > 0
		bar := s.Bar()
		if (bar == "") != (s.Reports() < profile.MaxReports) {
			t.Fatalf("%d reports and the bar %q", s.Reports(), bar)
		}
		changed, err := s.Add(one)
		must(t, err)
		if bar != "" && profile.Rank(one) > bar {
			if skipped++; changed {
				t.Fatal("a report behind the bar changed the sample")
			}
		}
	}
	if skipped < 200 {
		t.Errorf("the bar spares %d of 300 additions", skipped)
	}
}
