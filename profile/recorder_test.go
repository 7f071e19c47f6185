package profile_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"accel/profile"
)

func TestRecorder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lower := layerOf(t, file("a", 4*chunkBytes, "a"), file("b", 5000, "b"), file("c", 100, "c"))
		upper := layerOf(t, file("x", 2*chunkBytes+10, "x"))
		ln, un := lower.named(t), upper.named(t)
		r := profile.NewRecorder(profile.RecorderOptions{Manifest: imageA, Node: "n", Cold: true})
		time.Sleep(20 * time.Second) // a long wait before the first read is no quiet
		began := time.Now()
		r.Chunks(upper.digest(), upper, 0, 1, began.Add(2*time.Second))
		r.Chunks(lower.digest(), lower, 1, 2, began)
		r.Chunks("sha256:other", upper, 1, 2, began)
		r.Chunks(lower.digest(), lower, -1, 5, began)
		r.Chunks(lower.digest(), lower, 4000, 1<<62, began) // nonsense
		r.Chunks(upper.digest(), upper, 0, 1, began)        // the same chunk earlier
		r.Chunks(lower.digest(), lower, 4, 2, began.Add(3*time.Second))
		r.Wait(t.Context())
		if got := time.Since(began); got != 13*time.Second {
			t.Errorf("over after %v", got)
		}
		r.Chunks(lower.digest(), lower, 0, 1, time.Now().Add(1)) // too late
		rep := r.Report([]*profile.Layer{ln, nil, un})
		same(t, rep.Items, "2:x:0:65536", "0:a:65536:131072", "0:b:0:5000", "0:c:0:100")
		if !rep.Complete || rep.End != profile.EndQuiet || rep.Node != "n" || rep.Manifest != imageA || len(rep.ID) != 32 {
			t.Errorf("%+v", rep)
		}
		if _, err := profile.EncodeReport(rep); err != nil {
			t.Error(err)
		}
		if rep.Items[0].Content.IsZero() {
			t.Error("content is unknown")
		}
	})
}

func TestRecorderEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := layerOf(t, file("a", 1000*chunkBytes, "a"))
		n := l.named(t)
		record := func(o profile.RecorderOptions, during func(r *profile.Recorder)) (profile.Report, time.Duration) {
			began := time.Now()
			o.Manifest = imageA
			r := profile.NewRecorder(o)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
			defer cancel()
			done := make(chan struct{})
			go func() {
				defer close(done)
				r.Wait(ctx)
			}()
			during(r)
			<-done
			return r.Report([]*profile.Layer{n}), time.Since(began)
		}
		// Busy without an end; the same chunk again is nothing new.
		rep, took := record(profile.RecorderOptions{Cold: true}, func(r *profile.Recorder) {
			for k := range 200 {
				r.Chunks(l.digest(), l, k, 1, time.Now())
				time.Sleep(time.Second)
			}
		})
		if rep.End != profile.EndLimit || rep.Complete || rep.Items[0].Bytes != 121*chunkBytes {
			t.Errorf("busy: %v, %+v", took, rep)
		}
		rep, took = record(profile.RecorderOptions{Cold: true, Quiet: 3 * time.Second}, func(r *profile.Recorder) {
			for range 8 {
				r.Chunks(l.digest(), l, 5, 1, time.Now())
				time.Sleep(time.Second)
			}
		})
		if rep.End != profile.EndQuiet || !rep.Complete || took != 8*time.Second {
			t.Errorf("one chunk again and again: %v, %+v", took, rep)
		}
		rep, took = record(profile.RecorderOptions{Cold: true}, func(r *profile.Recorder) {
			r.Chunks(l.digest(), l, 5, 1, time.Now())
			time.Sleep(time.Second)
			r.Answered()
			r.Answered()
		})
		if rep.End != profile.EndAnswered || !rep.Complete || took != time.Second {
			t.Errorf("answered: %v, %+v", took, rep)
		}
		rep, took = record(profile.RecorderOptions{Limit: 5 * time.Second}, func(*profile.Recorder) {})
		if rep.End != profile.EndLimit || rep.Complete || took != 5*time.Second || len(rep.Items) > 0 {
			t.Errorf("nothing read: %v, %+v", took, rep)
		}
		rep, _ = record(profile.RecorderOptions{}, func(r *profile.Recorder) {
			r.Chunks(l.digest(), l, 5, 1, time.Now())
			r.Answered()
		})
		if rep.Complete {
			t.Error("a warm start counts as complete")
		}
		r := profile.NewRecorder(profile.RecorderOptions{Manifest: imageA, Cold: true})
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		r.Wait(ctx)
		if rep := r.Report(nil); rep.End != profile.EndStopped || rep.Complete {
			t.Errorf("stopped: %+v", rep)
		}
	})
}
