package webhook

import "net/http"

// decodeAzure reads Azure Container Registry's webhook: one event in the form of
// Distribution's, without an envelope. A ping's target is null.
func decodeAzure(b *batch, _ http.Header, body []byte) error {
	var e distributionEvent
	if err := b.unmarshal("body", body, &e); err != nil {
		return err
	}
	switch e.Action {
	case "push":
		b.add(e.push(""))
	case "":
		return b.invalid("action", "missing")
	default: // ping, delete, quarantine, chart_push, chart_delete
		b.ignore("action %.100q: no image push", e.Action)
	}
	return nil
}
