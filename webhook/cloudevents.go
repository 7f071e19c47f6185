package webhook

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"

	"github.com/cloudevents/sdk-go/v2/binding"
	"github.com/cloudevents/sdk-go/v2/event"
	cehttp "github.com/cloudevents/sdk-go/v2/protocol/http"
)

// isCloudEvent reports whether a request carries CloudEvents: in binary mode
// (attributes in headers), or in structured or batched mode. The last two are
// recognised by the body as well, for senders behind something that rewrites
// the content type.
func isCloudEvent(header http.Header, body []byte) bool {
	if header.Get("Ce-Specversion") != "" || strings.HasPrefix(bareMediaType(header.Get("Content-Type")), "application/cloudevents") {
		return true
	}
	var probe struct {
		SpecVersion string `json:"specversion"`
	}
	return json.Unmarshal(body, &probe) == nil && probe.SpecVersion != ""
}

// cloudEvents reads the events of a request with the CNCF SDK, in any of
// CloudEvents' HTTP modes, and checks that they are valid ones.
func (b *batch) cloudEvents(header http.Header, body []byte) ([]event.Event, error) {
	contentType := bareMediaType(header.Get("Content-Type"))
	if header.Get("Ce-Specversion") == "" && !strings.HasPrefix(contentType, "application/cloudevents") {
		contentType = event.ApplicationCloudEventsJSON
	}
	header = onlyAttributes(header, contentType)
	reader := io.NopCloser(bytes.NewReader(body))
	message := cehttp.NewMessage(header, reader)
	ctx := context.Background() // the SDK asks for one; nothing here waits

	var events []event.Event
	if contentType == event.ApplicationCloudEventsBatchJSON {
		var err error
		if events, err = binding.ToEvents(ctx, message, reader); err != nil {
			return nil, b.invalid("body", "no CloudEvents batch: %.300v", err)
		}
	} else {
		single, err := binding.ToEvent(ctx, message)
		if err != nil {
			return nil, b.invalid("body", "no CloudEvent: %.300v", err)
		}
		events = []event.Event{*single}
	}
	if err := b.count("body", len(events)); err != nil {
		return nil, err
	}
	for _, e := range events {
		if err := e.Validate(); err != nil {
			return nil, b.invalid("body", "no valid CloudEvent: %.300v", err)
		}
	}
	return events, nil
}

// onlyAttributes is header without what CloudEvents extensions, proxies and
// others put there: the SDK fails on an extension with an unusual name, and
// panics on one without a name.
func onlyAttributes(header http.Header, contentType string) http.Header {
	kept := http.Header{"Content-Type": {contentType}}
	for _, name := range []string{"Ce-Specversion", "Ce-Id", "Ce-Source", "Ce-Type", "Ce-Time", "Ce-Subject", "Ce-Dataschema"} {
		if value := header.Get(name); value != "" {
			kept.Set(name, value)
		}
	}
	return kept
}
