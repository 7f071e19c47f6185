package accel_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"accel"

	"github.com/opencontainers/go-digest"
)

func TestRecordFinal(t *testing.T) {
	due := time.Date(2025, 11, 20, 9, 15, 0, 0, time.UTC)
	want := map[accel.State][2]bool{ // without and with DueAt
		accel.Pending:    {false, false},
		accel.Converting: {false, false},
		accel.Ready:      {true, true}, // DueAt is the next check of the target
		accel.Failed:     {true, false},
		accel.Rejected:   {true, true},
		accel.Superseded: {true, true},
		accel.Stale:      {false, false},
	}
	if len(want) != len(accel.States) {
		t.Errorf("%d states in the table, %d exist", len(want), len(accel.States))
	}
	for _, s := range accel.States {
		final, ok := want[s]
		if !ok {
			t.Errorf("%s: not in the table", s)
		}
		if got := (accel.Record{State: s}).Final(); got != final[0] {
			t.Errorf("%s without DueAt: final %t", s, got)
		}
		if got := (accel.Record{State: s, DueAt: due}).Final(); got != final[1] {
			t.Errorf("%s with DueAt: final %t", s, got)
		}
	}
	if (accel.Record{}).Final() || (accel.Record{State: "Odd"}).Final() {
		t.Error("an unknown state is final")
	}
}

func TestStateValid(t *testing.T) {
	for _, s := range accel.States {
		if !s.Valid() {
			t.Errorf("%s is not valid", s)
		}
	}
	for _, s := range []accel.State{"", "ready", "Odd"} {
		if s.Valid() {
			t.Errorf("%q is valid", s)
		}
	}
}

func TestRecordImage(t *testing.T) {
	const d = digest.Digest("sha256:" + hex64)
	for _, test := range []struct {
		record accel.Record
		want   string
	}{
		{accel.Record{Repository: "r.example/app", Digest: d, Tags: []string{"v1"}}, "r.example/app@" + string(d)},
		{accel.Record{Repository: "r.example/app", Tags: []string{"v1", "v2"}}, "r.example/app:v1"},
		{accel.Record{Repository: "r.example/app"}, "r.example/app"},
	} {
		if got := test.record.Image(); got != test.want {
			t.Errorf("got %s, want %s", got, test.want)
		}
		if _, err := accel.ParseReference(test.record.Image()); err != nil {
			t.Error(err)
		}
	}
}

// What is stored and sent is read back the same; zero values stay out of it.
func TestRecordJSON(t *testing.T) {
	now := time.Date(2025, 11, 20, 9, 15, 2, 123456789, time.UTC)
	const d = digest.Digest("sha256:" + hex64)
	full := accel.Record{
		ID: "id", Repository: "r.example/app", Digest: d, Tags: []string{"v1"}, MediaType: "m", Params: "p", Origin: "harbor",
		State: accel.Failed, Reason: "r", Rule: "rule", Attempts: 3, SuccessorID: "next",
		CreatedAt: now, UpdatedAt: now, DueAt: now, Lease: 7, CheckedAt: now,
		Target: accel.Target{Repository: "r.example/app", Digest: d, Tags: []string{"v1-esgz"}},
		Result: accel.Result{SourceBytes: 1, TargetBytes: 2, UncompressedBytes: 3, Total: time.Second, Platforms: []string{"linux/amd64"}, Notes: []string{"n"}},
	}
	for name, r := range map[string]accel.Record{"full": full, "empty": {State: accel.Pending, CreatedAt: now, UpdatedAt: now}} {
		data, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		var back accel.Record
		if err := json.Unmarshal(data, &back); err != nil {
			t.Fatal(err)
		}
		again, err := json.Marshal(back)
		if err != nil || string(again) != string(data) {
			t.Errorf("%s: %s, then %s, %v", name, data, again, err)
		}
		if name == "empty" {
			for _, key := range []string{"digest", "dueAt", "target", "result", "lease", "successorId"} {
				if strings.Contains(string(data), `"`+key+`"`) {
					t.Errorf("an empty %s is written: %s", key, data)
				}
			}
		}
	}
}
