package storetest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"accel"
	"accel/readiness"
)

var errStop = errors.New("stop")

func testAtomicity(t *testing.T, s readiness.Store) {
	put(t, s, entry("kept", accel.Pending))
	err := s.Update(t.Context(), func(tx readiness.Tx) error {
		_, aerr := tx.AppendEvent(readiness.Event{ID: "x"})
		return errors.Join(aerr, tx.Put(entry("lost", accel.Pending)), tx.Delete("kept"), tx.PutTag(repo, "v1", readiness.TagPointer{ID: "lost"}),
			tx.PutAlias("a", "lost"), tx.Announce(sha("lost")), tx.PutMemo("lost", nil), errStop)
	})
	if !errors.Is(err, errStop) {
		t.Fatalf("error %v, want the function's own", err)
	}
	view(t, s, func(tx readiness.Tx) error {
		_, lost := tx.Get("lost")
		_, kept := tx.Get("kept")
		_, tag := tx.Tag(repo, "v1")
		_, alias := tx.Alias("a")
		_, memo := tx.Memo("lost")
		ours, err := tx.Announced(sha("lost"))
		evs, _, err2 := tx.Events(0, 10)
		return errors.Join(kept, err, err2, missing("record", lost), missing("tag", tag), missing("alias", alias), missing("memo", memo), want("announced", ours, false), want("events", len(evs), 0))
	})
	// An error that the function gets over is not an error of the update.
	update(t, s, func(tx readiness.Tx) error {
		return errors.Join(missing("delete", tx.Delete("none")), tx.Put(entry("after", accel.Pending)))
	})
	err = s.View(t.Context(), func(tx readiness.Tx) error { return tx.Put(entry("in a view", accel.Pending)) })
	if err == nil {
		t.Error("a write in a View is no error")
	}
}

// testIsolation: updates that fail or panic, at the same time as others, harm only themselves.
func testIsolation(t *testing.T, s readiness.Store) {
	var wg sync.WaitGroup
	errs := make([]error, 60)
	for i := range errs {
		wg.Go(func() {
			errs[i] = s.Update(t.Context(), func(tx readiness.Tx) error {
				if i%4 == 3 {
					return errStop // before it wrote
				}
				if err := tx.Put(entry(fmt.Sprint(i), accel.Pending)); err != nil {
					return err
				}
				switch i % 4 {
				case 1:
					return errStop
				case 2:
					panic("broken update")
				}
				return nil
			})
		})
	}
	wg.Wait()
	for i, err := range errs {
		if failed := err != nil; failed != (i%4 != 0) {
			t.Errorf("update %d: error %v", i, err)
		}
		if i%2 == 1 && !errors.Is(err, errStop) {
			t.Errorf("update %d: error %v, want its own", i, err)
		}
	}
	view(t, s, func(tx readiness.Tx) error {
		es, err := tx.List("", "", 0, 100)
		return errors.Join(err, want("records kept", len(es), 15))
	})
}

// testConcurrent: no update is lost, and each View sees whole ones.
func testConcurrent(t *testing.T, s readiness.Store) {
	const writers, each = 16, 20
	stop := make(chan struct{})
	var readers, wg sync.WaitGroup
	readers.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			err := s.View(t.Context(), func(tx readiness.Tx) error {
				a, err := tx.Memo("a")
				if errors.Is(err, accel.ErrNotFound) {
					return nil
				}
				b, err2 := tx.Memo("b")
				return errors.Join(err, err2, want("two memos of one update", string(a), string(b)))
			})
			if err != nil {
				t.Error(err)
				return
			}
		}
	})
	for range writers {
		wg.Go(func() {
			for range each {
				err := s.Update(t.Context(), func(tx readiness.Tx) error {
					a, err := tx.Memo("a")
					if err != nil && !errors.Is(err, accel.ErrNotFound) {
						return err
					}
					a = append(a, 'x')
					return errors.Join(tx.PutMemo("a", a), tx.PutMemo("b", a))
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	readers.Wait()
	view(t, s, func(tx readiness.Tx) error {
		a, err := tx.Memo("a")
		return errors.Join(err, want("updates counted", len(a), writers*each))
	})
}

func testContexts(t *testing.T, s readiness.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	ran := false
	fn := func(readiness.Tx) error { ran = true; return nil }
	if err := s.Update(ctx, fn); !errors.Is(err, context.Canceled) || ran {
		t.Errorf("update with an ended context: ran %v, error %v", ran, err)
	}
	if err := s.View(ctx, fn); !errors.Is(err, context.Canceled) || ran {
		t.Errorf("view with an ended context: ran %v, error %v", ran, err)
	}
	// One whose context ends while another update holds the store does not wait for that.
	held, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	var wg sync.WaitGroup
	wg.Go(func() {
		err := s.Update(t.Context(), func(tx readiness.Tx) error {
			once.Do(func() { close(held); <-release })
			return tx.PutMemo("slow", nil)
		})
		if err != nil {
			t.Error(err)
		}
	})
	<-held
	ctx, cancel = context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := s.Update(ctx, func(tx readiness.Tx) error { return tx.PutMemo("given up", nil) }); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("update behind a slow one: error %v", err)
	}
	close(release)
	wg.Wait()
	view(t, s, func(tx readiness.Tx) error {
		_, err := tx.Memo("slow")
		_, none := tx.Memo("given up")
		return errors.Join(err, missing("memo of the update that gave up", none))
	})
}
