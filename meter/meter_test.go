package meter_test

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"accel"
	"accel/meter"

	"github.com/opencontainers/go-digest"
)

const quiet = 5 * time.Second

// node is a meter in a synctest bubble, and the clients that pull through it.
type node struct {
	t     *testing.T
	meter *meter.Meter
	spool *meter.Spool
	stop  func()
	end   func() error
}

// measured runs fn with a node, in a time of its own.
func measured(t *testing.T, fn func(n *node)) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, openSpool(t, "", meter.SpoolOptions{}), nil)
		defer n.stop()
		fn(n)
	})
}

// newNode is a node at work. It must be stopped, or ended for the error of its work.
func newNode(t *testing.T, s *meter.Spool, log *slog.Logger) *node {
	t.Helper()
	n := &node{t: t, spool: s}
	var err error
	n.meter, err = meter.New(meter.Options{Node: "n1", Spool: s, Quiet: quiet, Log: log})
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- n.meter.Run(ctx) }()
	stopped := false
	n.end = func() error {
		if stopped {
			return nil
		}
		stopped = true
		cancel()
		return <-done
	}
	n.stop = func() { must(t, n.end()) }
	return n
}

// pulls are those that are over, by their start.
func (n *node) pulls() []accel.Pull {
	n.t.Helper()
	synctest.Wait()
	time.Sleep(50 * time.Millisecond) // the spool gathers writes
	synctest.Wait()
	pulls, err := n.spool.Oldest(10_000)
	must(n.t, err)
	slices.SortFunc(pulls, func(a, b accel.Pull) int { return a.Start.Compare(b.Start) })
	return pulls
}

// one is the only pull that is over.
func (n *node) one() accel.Pull {
	n.t.Helper()
	all := n.pulls()
	if len(all) != 1 {
		n.t.Fatalf("%d pulls: %+v", len(all), all)
	}
	must(n.t, meter.Validate(all[0], time.Now()))
	return all[0]
}

// afterQuiet lets the quiet pass.
func (n *node) afterQuiet() { time.Sleep(2 * quiet) }

// img is an image of the test.
type img struct {
	digest digest.Digest
	accel.ManifestContent
}

func imageWith(name string, layers ...int64) img {
	i := img{digest: digest.FromString(name), ManifestContent: accel.ManifestContent{Config: digest.FromString("config of " + name)}}
	for k, size := range layers {
		i.Layers = append(i.Layers, accel.BlobDescriptor{Digest: digest.FromString(name + string(rune('a'+k))), SizeBytes: size})
	}
	return i
}

func indexOf(members ...img) img {
	i := img{digest: digest.FromString("index of " + members[0].digest.String())}
	for _, m := range members {
		i.Manifests = append(i.Manifests, m.digest)
	}
	return i
}

// request is one request of a client, taking so long.
func (n *node) request(took time.Duration, x accel.Transfer) {
	if x.Client == "" {
		x.Client = "client"
	}
	x.Repository = repository
	asked := x.Digest
	if x.Tag != "" {
		asked = ""
	}
	end := n.meter.Begin(x.Client, x.Repository, asked)
	time.Sleep(took)
	end(&x)
}

func (n *node) manifest(tag string, i img) {
	n.request(100*time.Millisecond, accel.Transfer{Tag: tag, Digest: i.digest, Manifest: &i.ManifestContent, Complete: true})
}

func (n *node) layer(i img, k int, tally accel.Tally) {
	n.request(time.Second, accel.Transfer{Digest: i.Layers[k].Digest, Tally: tally, Complete: true})
}

func registry(b int64) accel.Tally { return accel.Tally{RegistryBytes: b} }
func cached(b int64) accel.Tally   { return accel.Tally{CacheBytes: b} }

func TestColdPull(t *testing.T) {
	measured(t, func(n *node) {
		i := imageWith("app", 30, 70)
		index := indexOf(i, imageWith("arm", 1))
		began := time.Now()
		n.manifest("v1", index) // HEAD
		n.manifest("", index)   // GET by the digest that it told
		n.manifest("", i)
		n.request(100*time.Millisecond, accel.Transfer{Digest: i.Config, Tally: registry(5), Complete: true, Tenant: "t1", MemoryBytes: 1 << 30})
		n.layer(i, 0, registry(30))
		n.layer(i, 1, registry(70))
		p := n.one() // without waiting for quiet
		want := accel.Pull{
			ID: p.ID, Image: repository + ":v1", Digest: i.digest, Node: "n1", Mode: accel.PullMirror, Tenant: "t1", MemoryBytes: 1 << 30,
			Start: began.UTC(), Duration: 2400 * time.Millisecond, RegistryBytes: 100, Outcome: accel.OutcomeMiss,
		}
		if p != want {
			t.Errorf("%+v, want %+v", p, want)
		}
		n.request(time.Second, accel.Transfer{Digest: i.Config, Tally: cached(5), Complete: true}) // late, and of that pull
		n.manifest("v1", index)                                                                    // kubelet looks at the tag
		n.afterQuiet()
		n.one()
	})
}

func TestOutcomes(t *testing.T) {
	i := imageWith("app", 100)
	for name, c := range map[string]struct {
		transfer accel.Transfer
		outcome  accel.Outcome
		cache    int64
	}{
		"hit":               {accel.Transfer{Tally: cached(100), Complete: true}, accel.OutcomeHit, 100},
		"from a peer":       {accel.Transfer{Tally: accel.Tally{PeerBytes: 100}, Complete: true}, accel.OutcomeHit, 0},
		"miss":              {accel.Transfer{Tally: registry(100), Complete: true}, accel.OutcomeMiss, 0},
		"partial":           {accel.Transfer{Tally: accel.Tally{CacheBytes: 40, RegistryBytes: 60}, Complete: true}, accel.OutcomePartial, 40},
		"another's fill":    {accel.Transfer{Tally: accel.Tally{SharedBytes: 100}, Complete: true}, accel.OutcomePartial, 100},
		"client went away":  {accel.Transfer{Tally: cached(10)}, accel.OutcomeError, 10},
		"registry broke":    {accel.Transfer{Tally: registry(10), Err: errors.New("reset")}, accel.OutcomeError, 0},
		"nothing was given": {accel.Transfer{Err: errors.New("503")}, accel.OutcomeError, 0},
	} {
		t.Run(name, func(t *testing.T) {
			measured(t, func(n *node) {
				n.manifest("v1", i)
				c.transfer.Digest = i.Layers[0].Digest
				n.request(time.Second, c.transfer)
				n.afterQuiet()
				p := n.one()
				if p.Outcome != c.outcome || p.CacheBytes != c.cache || (p.Outcome == accel.OutcomeError) != (p.Reason != "") || p.Duration != 1100*time.Millisecond {
					t.Errorf("%+v", p)
				}
			})
		})
	}
}

func TestClientThatHasLayersEndsByQuiet(t *testing.T) {
	measured(t, func(n *node) {
		i := imageWith("app", 30, 70)
		n.manifest("v1", i)
		n.layer(i, 1, registry(70))
		if len(n.pulls()) != 0 {
			t.Fatal("it is not over yet")
		}
		n.afterQuiet()
		if p := n.one(); p.Duration != 1100*time.Millisecond || p.Outcome != accel.OutcomeMiss {
			t.Errorf("%+v", p) // the quiet is not in it
		}
	})
}

func TestLongRequestHoldsItsPull(t *testing.T) {
	measured(t, func(n *node) {
		i := imageWith("app", 30, 70)
		n.manifest("v1", i)
		n.layer(i, 0, registry(30))
		n.request(10*time.Minute, accel.Transfer{Digest: i.Layers[1].Digest, Tally: registry(70), Complete: true})
		if p := n.one(); p.RegistryBytes != 100 || p.Duration != 10*time.Minute+1100*time.Millisecond {
			t.Errorf("%+v", p)
		}
	})
}

func TestRequestOfOtherContentHoldsNothing(t *testing.T) {
	measured(t, func(n *node) {
		i, other := imageWith("app", 30, 70), imageWith("other", 1)
		n.manifest("v1", i)
		n.layer(i, 0, registry(30))
		end := n.meter.Begin("client", repository, other.Layers[0].Digest)
		n.afterQuiet()
		n.one()
		end(nil)
	})
}

func TestRetryMendsAnError(t *testing.T) {
	measured(t, func(n *node) {
		i := imageWith("app", 100)
		n.request(time.Second, accel.Transfer{Tag: "v1", Err: errors.New("502")})
		n.manifest("v1", i)
		d := i.Layers[0].Digest
		n.request(time.Second, accel.Transfer{Digest: d, Tally: registry(60), Err: errors.New("reset"), Note: "the registry knows no ranges"})
		n.request(time.Second, accel.Transfer{Digest: d, Tally: accel.Tally{CacheBytes: 60, RegistryBytes: 40}, Complete: true, Note: "the registry knows no ranges"})
		p := n.one()
		if p.Outcome != accel.OutcomePartial || p.RegistryBytes != 100 || p.Reason != "the registry knows no ranges" || p.Duration != 3100*time.Millisecond {
			t.Errorf("%+v", p)
		}
	})
}

func TestRangesAddUp(t *testing.T) {
	measured(t, func(n *node) {
		i := imageWith("app", 100)
		n.manifest("v1", i)
		for range 4 {
			n.request(time.Second, accel.Transfer{Digest: i.Layers[0].Digest, Tally: registry(25), Complete: true})
		}
		if p := n.one(); p.RegistryBytes != 100 {
			t.Errorf("%+v", p)
		}
	})
}

func TestWhatIsNoPull(t *testing.T) {
	measured(t, func(n *node) {
		i := imageWith("app", 100)
		n.manifest("v1", i) // only looked at
		n.request(time.Second, accel.Transfer{Digest: i.Config, Tally: registry(5), Complete: true})
		n.request(time.Second, accel.Transfer{Client: "b", Tag: "v2", Err: accel.ErrUnauthenticated})
		n.request(time.Second, accel.Transfer{Client: "b", Tag: "sha256-x.sig", Err: accel.ErrNotFound})
		n.request(time.Second, accel.Transfer{Client: "b", Tag: "v3"}) // the client went away
		n.meter.Begin("c", repository, "")(nil)
		n.afterQuiet()
		if all := n.pulls(); len(all) != 0 {
			t.Errorf("%+v", all)
		}
	})
}

func TestManifestThatCannotBeHad(t *testing.T) {
	measured(t, func(n *node) {
		for range 3 { // tries
			n.request(time.Second, accel.Transfer{Tag: "v1", Err: errors.New(strings.Repeat("bad gateway \xff", 500))})
		}
		n.afterQuiet()
		if p := n.one(); p.Outcome != accel.OutcomeError || p.Image != repository+":v1" || !strings.HasPrefix(p.Reason, "bad gateway") {
			t.Errorf("%+v", p)
		}
	})
}

// TestClientsOfTheSameLooks pulls one image by many clients that cannot be told apart.
func TestClientsOfTheSameLooks(t *testing.T) {
	const clients = 50
	measured(t, func(n *node) {
		i := imageWith("app", 30, 70)
		for range clients {
			go func() {
				n.manifest("v1", i)
				go n.layer(i, 1, accel.Tally{SharedBytes: 70})
				n.layer(i, 0, cached(30))
			}()
		}
		time.Sleep(2 * time.Second)
		all := n.pulls()
		if len(all) != clients {
			t.Fatalf("%d pulls of %d", len(all), clients)
		}
		for _, p := range all {
			if p.CacheBytes != 100 || p.Image != repository+":v1" || p.Digest != i.digest || p.Outcome != accel.OutcomePartial {
				t.Fatalf("%+v", p)
			}
		}
	})
}

func TestEachPlatformIsAPull(t *testing.T) {
	measured(t, func(n *node) {
		a, b := imageWith("amd", 10), imageWith("arm", 20)
		n.manifest("v1", indexOf(a, b))
		n.manifest("", a)
		n.manifest("", b)
		n.layer(b, 0, registry(20))
		n.layer(a, 0, registry(10))
		all := n.pulls()
		if len(all) != 2 || all[0].Digest != a.digest || all[1].Digest != b.digest || all[0].RegistryBytes != 10 || all[1].RegistryBytes != 20 || all[1].Image != repository+":v1" {
			t.Errorf("%+v", all)
		}
	})
}

func TestTwoTagsOfOneDigestAreTwoPulls(t *testing.T) {
	measured(t, func(n *node) {
		i := imageWith("app", 10)
		n.manifest("v1", i)
		n.manifest("v2", i)
		n.layer(i, 0, registry(10))
		n.layer(i, 0, cached(10))
		all := n.pulls()
		if len(all) != 2 || all[0].Image != repository+":v1" || all[1].Image != repository+":v2" || all[1].Outcome != accel.OutcomeHit {
			t.Errorf("%+v", all)
		}
	})
}

func TestLayerWithoutItsManifest(t *testing.T) {
	measured(t, func(n *node) {
		i := imageWith("app", 10, 20)
		n.layer(i, 0, registry(4)) // nobody ever asked for the manifest
		n.layer(i, 0, registry(6))
		n.afterQuiet()
		if p := n.one(); p.Image != repository+"@"+i.Layers[0].Digest.String() || p.RegistryBytes != 10 || p.Digest != "" {
			t.Errorf("%+v", p)
		}
		n.manifest("v1", i) // now it is known, and a client that has the manifest comes later
		n.afterQuiet()
		n.layer(i, 1, registry(20))
		n.afterQuiet()
		if all := n.pulls(); len(all) != 2 || all[1].Image != repository+":v1" || all[1].Digest != i.digest {
			t.Errorf("%+v", all)
		}
	})
}

func TestStoppedInTheMiddle(t *testing.T) {
	measured(t, func(n *node) {
		i := imageWith("app", 30, 70)
		n.manifest("v1", i)
		n.layer(i, 0, registry(30))
		end := n.meter.Begin("client", repository, i.Layers[1].Digest)
		n.stop()
		end(&accel.Transfer{Digest: i.Layers[1].Digest})
		if p := n.one(); p.Outcome != accel.OutcomeError || p.Reason != "the node stopped" || p.RegistryBytes != 30 {
			t.Errorf("%+v", p)
		}
	})
}

func TestMeterOptions(t *testing.T) {
	s := openSpool(t, "", meter.SpoolOptions{})
	for _, o := range []meter.Options{{}, {Node: "n1"}, {Spool: s}, {Node: "n 1", Spool: s}, {Node: "n1", Spool: s, Quiet: -1}} {
		if _, err := meter.New(o); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

// FuzzMeter plays any order of requests. Every layer byte must be in one pull, and every pull must be one
// that a server takes.
func FuzzMeter(f *testing.F) {
	f.Add([]byte{0, 0, 0, 4, 1, 0, 8, 1, 0})
	f.Add([]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30})
	images := []img{imageWith("a", 10, 20), imageWith("b", 10), imageWith("c")}
	images[1].Layers[0] = images[0].Layers[0] // a layer that two share
	images = append(images, indexOf(images[0], images[1]))
	f.Fuzz(func(t *testing.T, script []byte) {
		if len(script) > 3*200 {
			return
		}
		measured(t, func(n *node) {
			var given int64
			for ; len(script) >= 3; script = script[3:] {
				op, which, how := script[0], images[int(script[1])%len(images)], script[2]
				x := accel.Transfer{Client: name("c", int(op>>6)), Complete: how&1 == 0}
				if how&2 > 0 {
					x.Err = []error{errors.New("x"), accel.ErrNotFound, accel.ErrUnauthenticated}[int(how>>2)%3]
				}
				switch op % 4 {
				case 0:
					x.Tag, x.Digest, x.Manifest = name("v", int(how>>5)), which.digest, &which.ManifestContent
				case 1:
					x.Digest, x.Manifest = which.digest, &which.ManifestContent
				case 2:
					x.Tag = name("v", int(how>>5))
				default:
					if len(which.Layers) == 0 {
						x.Digest = which.Config
						break
					}
					l := which.Layers[int(how>>4)%len(which.Layers)]
					x.Digest, x.Tally = l.Digest, accel.Tally{RegistryBytes: int64(how) % (l.SizeBytes + 1), SharedBytes: int64(how >> 7)}
					given += x.Tally.RegistryBytes
				}
				n.request(time.Duration(how)*time.Millisecond*50, x)
			}
			n.stop()
			var counted int64
			for _, p := range n.pulls() {
				must(t, meter.Validate(p, time.Now()))
				counted += p.RegistryBytes
			}
			if counted != given {
				t.Errorf("%d bytes in pulls, %d were given", counted, given)
			}
		})
	})
}
