package mirror

import (
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"accel"

	"github.com/prometheus/client_golang/prometheus"
)

// The headers by which a platform says whom a pull is for (in containerd's hosts.toml, or
// set by a proxy in front). What is malformed counts as not said.
const (
	TenantHeader = "Accel-Tenant"       // up to 128 printable ASCII characters
	MemoryHeader = "Accel-Memory-Bytes" // the container's memory, a decimal number
)

const (
	maxTenantBytes    = 128
	maxUserAgentBytes = 128
)

// note adds something unusual for the pull's record.
func (x *exchange) note(s string) {
	if x.transfer.Note != "" {
		s = x.transfer.Note + "; " + s
	}
	x.transfer.Note = s
}

// end counts the request, and tells the meter of content that was asked for.
func (x *exchange) end() {
	// The deadline was for this answer; the connection's next request has its own.
	_ = http.NewResponseController(x.w).SetWriteDeadline(time.Time{})
	x.m.metrics.request(x)
	if x.ended == nil {
		return
	}
	t := &x.transfer
	content := x.q.kind == manifest || x.q.kind == blob && x.r.Method == http.MethodGet
	question := x.status == http.StatusUnauthorized && x.client == OwnClient
	if !content || question {
		x.ended(nil)
		return
	}
	t.Client = x.who()
	t.Repository = x.repository()
	t.Tag = x.q.tag
	if t.Digest == "" {
		t.Digest = x.q.digest
	}
	t.Tenant = printable(x.r.Header.Get(TenantHeader), maxTenantBytes)
	if n, ok := parsePlace(x.r.Header.Get(MemoryHeader)); ok {
		t.MemoryBytes = n
	}
	x.m.o.Observe(*t)
	x.ended(t)
}

// who tells the clients of a node apart.
func (x *exchange) who() string {
	address, _, err := net.SplitHostPort(x.r.RemoteAddr)
	if err != nil {
		address = x.r.RemoteAddr
	}
	agent := x.r.UserAgent()
	return fmt.Sprintf("%s %s %q", address, x.client, agent[:min(len(agent), maxUserAgentBytes)])
}

func printable(s string, maxBytes int) string {
	if len(s) > maxBytes || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) {
		return ""
	}
	return s
}

type metrics struct {
	requests *prometheus.CounterVec
	bytes    *prometheus.CounterVec
	fetches  prometheus.Counter
	stale    prometheus.Counter
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "accel_mirror_requests_total",
			Help: "Requests to the mirror by what they asked for and status (499: the client went away).",
		}, []string{"kind", "status"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "accel_mirror_bytes_total",
			Help: "Blob bytes given to clients by where they came from (cache, registry, peer; shared: fetched for another client just then).",
		}, []string{"source"}),
		fetches: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "accel_mirror_fetches_total",
			Help: "Downloads of blobs or ranges that were begun at registries.",
		}),
		stale: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "accel_mirror_stale_total",
			Help: "Requests served from the cache because the registry could not be asked.",
		}),
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.requests, m.bytes, m.fetches, m.stale} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) request(x *exchange) {
	what := x.q.kind
	if what == "" {
		what = "none"
	}
	m.requests.WithLabelValues(string(what), strconv.Itoa(x.status)).Inc()
	m.tally(x.transfer.Tally)
}

func (m *metrics) tally(t accel.Tally) {
	for source, n := range map[string]int64{"cache": t.CacheBytes, "registry": t.RegistryBytes, "peer": t.PeerBytes, "shared": t.SharedBytes} {
		if n > 0 {
			m.bytes.WithLabelValues(source).Add(float64(n))
		}
	}
}
