package readiness

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"accel"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The table in the package comment is the table that is applied.
func TestTransitionsAreDocumented(t *testing.T) {
	doc, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	state := func(s string) accel.State {
		if s == "-" {
			return none
		}
		if !accel.State(s).Valid() {
			t.Errorf("the package comment names a state %q", s)
		}
		return accel.State(s)
	}
	documented := map[accel.State][]accel.State{}
	for line := range strings.Lines(string(doc)) {
		f := strings.Fields(line)
		if !strings.HasPrefix(line, "//\t") || len(f) < 4 || f[1] == "from" {
			continue
		}
		documented[state(f[1])] = append(documented[state(f[1])], state(f[2]))
	}
	for _, from := range append([]accel.State{none}, accel.States...) {
		want, got := slices.Clone(transitions[from]), documented[from]
		slices.Sort(want)
		slices.Sort(got)
		if !slices.Equal(want, got) {
			t.Errorf("from %q: the package comment has %q, the table %q", from, got, want)
		}
	}
}

func TestMoveRefusesWhatIsNotInTheTable(t *testing.T) {
	c := &change{o: &Options{}}
	for _, from := range append([]accel.State{none}, accel.States...) {
		for _, to := range append([]accel.State{none}, accel.States...) {
			if slices.Contains(transitions[from], to) {
				continue
			}
			e := Entry{Record: accel.Record{State: from}}
			if err := c.move(&e, to, ""); !errors.Is(err, accel.ErrConflict) || e.State != from {
				t.Errorf("from %q to %q: %v, state %q", from, to, err, e.State)
			}
		}
	}
}

func TestOneLine(t *testing.T) {
	for in, want := range map[string]string{
		"":                        "",
		"a\n\tb\r\nc":             "a b c",
		"\xff":                    "\uFFFD",
		strings.Repeat("a", 2000): strings.Repeat("a", 1021) + "...",
		strings.Repeat("ü", 600):  strings.Repeat("ü", 510) + "...",
	} {
		if got := oneLine(in); got != want {
			t.Errorf("oneLine(%.20q): %q, want %q", in, got, want)
		}
	}
}

func TestBackoffIsBounded(t *testing.T) {
	o := New(nil, Options{BackoffMin: time.Second, BackoffMax: 10 * time.Second}).o
	for _, attempts := range []int{0, 1, 2, 3, 4, 62, 63, 64, 1 << 30} {
		for range 100 {
			if d := o.backoff(attempts); d < time.Second || d > 10*time.Second {
				t.Fatalf("pause %s after %d attempts", d, attempts)
			}
		}
	}
}

func TestHubForgetsTopics(t *testing.T) {
	var h hub
	a, stopA := h.listen("x")
	_, stopB := h.listen("x")
	stopB()
	h.wake(map[string]struct{}{"x": {}, "y": {}})
	<-a
	b, stopC := h.listen("x") // of the next round; the first listener's stop must not end it
	stopA()
	select {
	case <-b:
		t.Error("woken by an old wake")
	default:
	}
	h.wake(map[string]struct{}{"x": {}})
	<-b
	stopC()
	_, stopD := h.listen("z")
	stopD()
	if len(h.topics) != 0 {
		t.Errorf("%d topics are left", len(h.topics))
	}
}
