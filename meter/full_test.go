package meter_test

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"accel"
	"accel/meter"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// smallDisk mounts a file system of so many MiB.
func smallDisk(t *testing.T, sizeMiB int) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED here: a small file system can only be mounted by root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+name("", sizeMiB)+"m"); err != nil {
		t.Skipf("SKIPPED here: a small file system cannot be mounted: %v", err)
	}
	t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	return dir
}

// fill takes all room of a disk; the returned function gives it back.
func fill(t *testing.T, dir string) (room func()) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	f, err := os.Create(path)
	must(t, err)
	block := make([]byte, 64<<10)
	for len(block) > 0 {
		if _, err = f.Write(block); err != nil {
			block = block[:len(block)/2]
		}
	}
	must(t, f.Close())
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	return func() { must(t, os.Remove(path)) }
}

// TestLedgerOnAFullDisk: reports are refused for a time, nothing is lost or counted twice, and the log has a line
// for each change.
func TestLedgerOnAFullDisk(t *testing.T) {
	dir := smallDisk(t, 4)
	path := filepath.Join(dir, "ledger.db")
	room := fill(t, dir)
	if _, err := meter.OpenLedger(path, meter.LedgerOptions{}); !errors.Is(err, meter.ErrFull) {
		t.Fatalf("made on a full disk: %v", err)
	}
	room()
	log := &lines{}
	now := noon
	o := meter.LedgerOptions{Log: slog.New(log), KeepPulls: apart, KeepDetail: aDay}
	l := openLedger(t, path, &now, o)
	whole := openLedger(t, "", &now, meter.LedgerOptions{KeepPulls: apart, KeepDetail: apart})
	for outage := range 3 {
		room := fill(t, dir)
		var batches [][]accel.Pull
		full := 0
		for i := range 40 {
			now = now.Add(time.Hour)
			var batch []accel.Pull
			for k := range 50 {
				batch = append(batch, pullOf(now.Add(time.Duration(k)*time.Second), of(repository+":"+name("v", i)), on(name("n", k))))
			}
			batches = append(batches, batch)
			now = now.Add(time.Hour)
			if _, err := l.Add(t.Context(), batch); err != nil {
				if !errors.Is(err, meter.ErrFull) || !strings.Contains(err.Error(), path) {
					t.Fatalf("%v", err)
				}
				full++
			}
			if err := l.Prune(t.Context()); err != nil && !errors.Is(err, meter.ErrFull) {
				t.Fatalf("%v", err)
			}
			usage(t, l, meter.Query{By: meter.ByImage}) // is answered
		}
		if got := log.take(slog.LevelInfo); full < 2 || len(got) != 1 || got[0].Level != slog.LevelError {
			t.Errorf("outage %d: %d reports were refused, and the log says %v", outage, full, got)
		}
		if outage == 1 { // it can be opened on a full disk
			must(t, l.Close())
			l = openLedger(t, path, &now, o)
			if _, err := l.Add(t.Context(), batches[39]); !errors.Is(err, meter.ErrFull) {
				t.Errorf("%v", err)
			}
		}
		room()
		for _, batch := range batches { // as their nodes do
			add(t, l, batch...)
			add(t, whole, batch...)
		}
		must(t, l.Prune(t.Context()))
		if got := log.take(slog.LevelInfo); len(got) == 0 || got[len(got)-1].Level != slog.LevelInfo {
			t.Errorf("outage %d: the log says %v", outage, got)
		}
		for _, by := range []string{meter.ByImage, meter.ByTenant, meter.ByNode, meter.ByDay} {
			if got, want := comparable(usage(t, l, meter.Query{By: by}), true), comparable(usage(t, whole, meter.Query{By: by}), true); got.Total != want.Total || !slices.Equal(got.Lines, want.Lines) {
				t.Fatalf("outage %d, by %s: %+v\nwant %+v", outage, by, got, want)
			}
		}
	}
}

// TestSpoolOnAFullDisk: pulls wait in memory, the oldest above the bound are counted as dropped, and all others
// are reported when there is room.
func TestSpoolOnAFullDisk(t *testing.T) {
	dir := smallDisk(t, 16)
	synctest.Test(t, func(t *testing.T) {
		room := fill(t, dir)
		path := filepath.Join(dir, "spool.db")
		if _, err := meter.OpenSpool(path, meter.SpoolOptions{}); !errors.Is(err, meter.ErrFull) {
			t.Fatalf("made on a full disk: %v", err)
		}
		room()
		log := &lines{}
		n := newNode(t, openSpool(t, path, meter.SpoolOptions{}), slog.New(log))
		defer n.stop()
		i := imageWith("app", 30)
		n.manifest("v1", i)
		pulls := func(count int) {
			for k := range count {
				n.request(time.Millisecond, accel.Transfer{Client: name("c", k%8), Tag: "v1", Digest: i.digest, Manifest: &i.ManifestContent, Complete: true})
				n.request(time.Millisecond, accel.Transfer{Client: name("c", k%8), Digest: i.Layers[0].Digest, Tally: registry(30), Complete: true})
			}
			time.Sleep(50 * time.Millisecond) // the spool gathers writes
			synctest.Wait()
		}
		pulls(10)
		if got := log.take(slog.LevelInfo); n.spool.Len() != 10 || len(got) != 0 {
			t.Errorf("%d wait; the log says %v", n.spool.Len(), got)
		}
		room = fill(t, dir)
		pulls(10_100)
		n.afterQuiet()
		got := log.take(slog.LevelInfo)
		kept := int64(n.spool.Len())
		if len(got) != 1 || got[0].Level != slog.LevelError || n.spool.Dropped() == 0 || kept < 10 {
			t.Errorf("%d dropped, %d wait; the log says %v", n.spool.Dropped(), kept, got)
		}
		room()
		n.afterQuiet()
		if got := log.take(slog.LevelInfo); len(got) != 1 || got[0].Level != slog.LevelInfo {
			t.Errorf("the log says %v", got)
		}
		if all := int64(n.spool.Len()) + n.spool.Dropped(); all != 10_110 || n.spool.Len() < 10_000 {
			t.Errorf("%d wait, %d dropped", n.spool.Len(), n.spool.Dropped())
		}
		taken := map[string]bool{}
		report(t, n.spool, sink(func(batch []accel.Pull) error {
			for _, p := range batch {
				taken[p.ID] = true
			}
			return nil
		}))
		if int64(len(taken))+n.spool.Dropped() != 10_110 {
			t.Errorf("%d taken, %d dropped", len(taken), n.spool.Dropped())
		}
	})
}

// TestReporterOnAFullDisk: a pull that cannot be forgotten is reported again, and the reporter goes on.
func TestReporterOnAFullDisk(t *testing.T) {
	dir := smallDisk(t, 4)
	synctest.Test(t, func(t *testing.T) {
		s := openSpool(t, filepath.Join(dir, "spool.db"), meter.SpoolOptions{})
		pulls := series(3000)
		must(t, s.Add(pulls...))
		room := fill(t, dir)
		taken := map[string]int{}
		calls := 0
		report(t, s, sink(func(batch []accel.Pull) error {
			if calls++; calls == 20 {
				room()
			}
			for _, p := range batch {
				taken[p.ID]++
			}
			return nil
		}))
		if calls < 20 {
			room()
		}
		if len(taken) != len(pulls) || s.Dropped() != 0 {
			t.Errorf("%d taken, %d dropped", len(taken), s.Dropped())
		}
	})
}

// TestStopOnAFullDisk: what a node cannot keep when it stops is counted and said.
func TestStopOnAFullDisk(t *testing.T) {
	dir := smallDisk(t, 4)
	synctest.Test(t, func(t *testing.T) {
		log := &lines{}
		n := newNode(t, openSpool(t, filepath.Join(dir, "spool.db"), meter.SpoolOptions{}), slog.New(log))
		room := fill(t, dir)
		defer room()
		i := imageWith("app", 30)
		for k := range 3000 {
			n.request(time.Millisecond, accel.Transfer{Client: "c", Tag: "v1", Digest: i.digest, Manifest: &i.ManifestContent, Complete: true})
			n.request(time.Millisecond, accel.Transfer{Client: "c", Digest: digest.FromString("appa"), Tally: registry(int64(k)), Complete: true})
		}
		if err := n.end(); !errors.Is(err, meter.ErrFull) {
			t.Errorf("%v", err)
		}
		got := log.take(slog.LevelInfo)
		if all := int64(n.spool.Len()) + n.spool.Dropped(); n.spool.Dropped() == 0 || all == 0 || len(got) != 2 || attr(got[1], "dropped").Int64() != n.spool.Dropped() {
			t.Errorf("%d wait, %d dropped; the log says %v", n.spool.Len(), n.spool.Dropped(), got)
		}
	})
}
