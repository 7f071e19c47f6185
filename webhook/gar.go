package webhook

import (
	"net/http"

	"accel"
)

// garEvent is Artifact Registry's (and Container Registry's) message.
type garEvent struct {
	Action string `json:"action"`
	Digest string `json:"digest"` // "host/project/repository/image@sha256:..."
	Tag    string `json:"tag"`    // "host/project/repository/image:tag", optional
}

// decodeGAR reads a Pub/Sub push, wrapped or (with the subscription's "payload
// unwrapping") the message alone.
func decodeGAR(b *batch, header http.Header, body []byte) error {
	var envelope struct {
		garEvent
		Message *struct {
			Data        []byte    `json:"data"` // base64 in JSON
			PublishTime timestamp `json:"publishTime"`
		} `json:"message"`
	}
	if err := b.unmarshal("body", body, &envelope); err != nil {
		return err
	}
	event, prefix := envelope.garEvent, ""
	at := timestampOf(header.Get("X-Goog-Pubsub-Publish-Time"))
	if m := envelope.Message; m != nil {
		if len(m.Data) == 0 {
			return b.invalid("message.data", "missing")
		}
		event, prefix, at = garEvent{}, "message.data.", m.PublishTime
		if err := b.unmarshal("message.data", m.Data, &event); err != nil {
			return err
		}
	}
	switch event.Action {
	case "INSERT":
	case "":
		return b.invalid(prefix+"action", "missing")
	default: // DELETE
		b.ignore("%saction %.100q: no push", prefix, event.Action)
		return nil
	}
	return b.addGAR(prefix, event, at)
}

func (b *batch) addGAR(prefix string, event garEvent, at timestamp) error {
	byDigest, byTag := field{prefix + "digest", event.Digest}, field{prefix + "tag", event.Tag}
	if byDigest.value == "" && byTag.value == "" {
		return b.invalid(byDigest.path, "missing, and tag too")
	}
	p := push{tag: byTag, digest: byDigest, at: at}
	p.tag.value, p.digest.value = "", ""
	for _, f := range []field{byDigest, byTag} {
		if f.value == "" {
			continue
		}
		ref, err := accel.ParseReference(f.value)
		if err != nil {
			return b.invalid(f.path, "%.300q is no image reference", f.value)
		}
		if p.host.value == "" {
			p.host, p.repository = field{f.path, ref.Registry}, field{f.path, ref.Repository}
		} else if ref.Registry != p.host.value || ref.Repository != p.repository.value {
			return b.invalid(f.path, "%.300q is another repository than %s", f.value, byDigest.path)
		}
		switch {
		case f == byDigest && ref.Digest == "":
			return b.invalid(f.path, "%.300q names no digest", f.value)
		case f == byDigest:
			p.digest.value = ref.Digest.String()
		default:
			p.tag.value = ref.Tag
		}
	}
	b.add(p)
	return nil
}
