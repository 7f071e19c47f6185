package webhook

import (
	"fmt"
	"net/http"
	"strings"
)

// distributionEvent is one notification event of CNCF Distribution
// (notifications.Event in its source). Azure Container Registry sends the same
// object on its own.
type distributionEvent struct {
	Timestamp timestamp `json:"timestamp"`
	Action    string    `json:"action"`
	Target    struct {
		MediaType  string `json:"mediaType"`
		Digest     string `json:"digest"`
		Repository string `json:"repository"`
		Tag        string `json:"tag"`
		URL        string `json:"url"`
		// References are the manifest's config and layers; sent only where the
		// registry is configured with includereferences.
		References []struct {
			MediaType string `json:"mediaType"`
		} `json:"references"`
	} `json:"target"`
	Request struct {
		Host string `json:"host"`
	} `json:"request"`
}

// push is e as a push; prefix is the path of e in the body.
func (e *distributionEvent) push(prefix string) push {
	p := push{
		host:       field{prefix + "request.host", e.Request.Host},
		repository: field{prefix + "target.repository", e.Target.Repository},
		tag:        field{prefix + "target.tag", e.Target.Tag},
		digest:     field{prefix + "target.digest", e.Target.Digest},
		mediaType:  field{prefix + "target.mediaType", e.Target.MediaType},
		at:         e.Timestamp,
	}
	if p.host.value == "" {
		p.host.value = hostOf(e.Target.URL)
	}
	for i, r := range e.Target.References {
		// Layers are named here too; only a chart's types say what the whole is.
		if strings.HasPrefix(bareMediaType(r.MediaType), "application/vnd.cncf.helm.") {
			p.artifact = field{fmt.Sprintf("%starget.references[%d].mediaType", prefix, i), r.MediaType}
			break
		}
	}
	return p
}

// decodeDistribution reads the envelope of CNCF Distribution and of GitLab's
// registry, content type application/vnd.docker.distribution.events.v2+json.
func decodeDistribution(b *batch, _ http.Header, body []byte) error {
	var envelope struct {
		Events *[]distributionEvent `json:"events"`
	}
	if err := b.unmarshal("body", body, &envelope); err != nil {
		return err
	}
	if envelope.Events == nil {
		return b.invalid("events", "missing")
	}
	if err := b.count("events", len(*envelope.Events)); err != nil {
		return err
	}
	if len(*envelope.Events) == 0 {
		b.ignore("events: empty")
	}
	for i := range *envelope.Events {
		e := &(*envelope.Events)[i]
		prefix := fmt.Sprintf("events[%d].", i)
		if e.Action != "push" {
			if e.Action == "" {
				b.reject(b.invalid(prefix+"action", "missing"))
			} else {
				b.ignore("%saction %.100q: no push", prefix, e.Action)
			}
			continue
		}
		b.add(e.push(prefix))
	}
	return nil
}
