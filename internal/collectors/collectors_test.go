package collectors_test

import (
	"errors"
	"testing"

	"accel/internal/collectors"

	"github.com/prometheus/client_golang/prometheus"
)

func counter(name string) prometheus.Collector {
	return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: "A test's."})
}

func TestAllOrNone(t *testing.T) {
	r := prometheus.NewRegistry()
	names := func() (names []string) {
		t.Helper()
		families, err := r.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			names = append(names, f.GetName())
		}
		return names
	}
	unregister, err := collectors.Register(r, counter("a"), counter("b"))
	if err != nil || len(names()) != 2 {
		t.Fatal(err, names())
	}
	var twice prometheus.AlreadyRegisteredError
	if _, err := collectors.Register(r, counter("c"), counter("b"), counter("d")); !errors.As(err, &twice) || len(names()) != 2 {
		t.Errorf("one of them twice: %v, and there are %v", err, names())
	}
	unregister()
	if n := names(); len(n) != 0 {
		t.Errorf("left: %v", n)
	}
	if unregister, err = collectors.Register(nil, counter("a")); err != nil {
		t.Error(err)
	}
	unregister()
}
