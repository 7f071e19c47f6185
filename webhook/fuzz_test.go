package webhook_test

import (
	"encoding/json"
	"errors"
	"net/http"
	"reflect"
	"regexp"
	"testing"

	"accel"
	"accel/webhook"
)

func FuzzDistribution(f *testing.F) { fuzzDecoder(f, webhook.Distribution) }
func FuzzHarbor(f *testing.F)       { fuzzDecoder(f, webhook.Harbor) }
func FuzzDockerHub(f *testing.F)    { fuzzDecoder(f, webhook.DockerHub) }
func FuzzQuay(f *testing.F)         { fuzzDecoder(f, webhook.Quay) }
func FuzzGitHub(f *testing.F)       { fuzzDecoder(f, webhook.GitHub) }
func FuzzAzure(f *testing.F)        { fuzzDecoder(f, webhook.Azure) }
func FuzzECR(f *testing.F)          { fuzzDecoder(f, webhook.ECR) }
func FuzzGAR(f *testing.F)          { fuzzDecoder(f, webhook.GAR) }
func FuzzAliyun(f *testing.F)       { fuzzDecoder(f, webhook.Aliyun) }
func FuzzArtifactory(f *testing.F)  { fuzzDecoder(f, webhook.Artifactory) }
func FuzzZot(f *testing.F)          { fuzzDecoder(f, webhook.Zot) }
func FuzzGeneric(f *testing.F)      { fuzzDecoder(f, webhook.Generic) }

var attachedTag = regexp.MustCompile(`^sha256-[0-9a-f]{64}`)

// fuzzDecoder checks that whatever the body and the headers that a decoder looks
// at are, it does not panic, it says ErrInvalid or gives a result, and what it
// gives is an image reference in its canonical form.
func fuzzDecoder(f *testing.F, kind webhook.Kind) {
	for _, fixture := range fixtures {
		if fixture.kind == kind {
			event := fixture.header.Get("X-GitHub-Event") + fixture.header.Get("Ce-Type")
			f.Add(fixture.body(f), fixture.header.Get("Content-Type"), event, fixture.header.Get("Ce-Time"))
		}
	}
	s := newSource(f, configOf(kind))
	f.Fuzz(func(t *testing.T, body []byte, contentType, event, when string) {
		header := http.Header{"Content-Type": {contentType}, "X-Github-Event": {event}, "X-Goog-Pubsub-Publish-Time": {when}}
		if when != "" {
			for name, value := range map[string]string{"Specversion": "1.0", "Id": "1", "Source": "s", "Type": event, "Time": when, "": event, event: when} {
				header["Ce-"+name] = []string{value}
			}
		}
		result, err := s.Decode(header, body)
		if err != nil {
			if !errors.Is(err, accel.ErrInvalid) || len(result.Events)+len(result.Ignored) > 0 {
				t.Fatalf("error %v with %+v", err, result)
			}
			return
		}
		if len(result.Events)+len(result.Ignored) == 0 {
			t.Fatal("neither an event, nor a reason, nor an error")
		}
		if len(result.Events) > webhook.MaxEvents {
			t.Fatalf("%d events", len(result.Events))
		}
		for _, e := range result.Events {
			checkEvent(t, s, e)
		}
		again, err := s.Decode(header, body)
		if err != nil || !reflect.DeepEqual(again, result) {
			t.Fatalf("decoded again: %+v, %v; first %+v", again, err, result)
		}
	})
}

func checkEvent(t *testing.T, s *webhook.Source, e accel.PushEvent) {
	t.Helper()
	want := accel.Reference{Registry: e.Registry, Repository: e.Repository, Tag: e.Tag, Digest: e.Digest}
	got, err := accel.ParseReference(want.String())
	if err != nil || got != want {
		t.Fatalf("event %+v reads back as %+v, %v", e, got, err)
	}
	if e.Tag == "" && e.Digest == "" {
		t.Fatalf("event %+v has neither tag nor digest", e)
	}
	if attachedTag.MatchString(e.Tag) {
		t.Fatalf("event %+v is about an attachment", e)
	}
	if e.Source != s.Name() {
		t.Fatalf("event %+v is not of %s", e, s.Name())
	}
	if _, err := json.Marshal(e); err != nil {
		t.Fatalf("event %+v: %v", e, err)
	}
}
