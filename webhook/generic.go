package webhook

import (
	"net/http"

	"accel"
)

// decodeGeneric reads accel's own form, for scripts and for registries that are
// not in the list: {"image": "host/repo:tag"} or {"image": "host/repo@sha256:..."}.
func decodeGeneric(b *batch, _ http.Header, body []byte) error {
	var event struct {
		Image string `json:"image"`
	}
	if err := b.unmarshal("body", body, &event); err != nil {
		return err
	}
	if event.Image == "" {
		return b.invalid("image", "missing")
	}
	ref, err := accel.ParseReference(event.Image)
	if err != nil {
		return b.invalid("image", "%.300q is no image reference (want HOST/PATH:TAG or HOST/PATH@sha256:DIGEST)", event.Image)
	}
	b.add(push{
		host:       field{"image", ref.Registry},
		repository: field{"image", ref.Repository},
		tag:        field{"image", ref.Tag},
		digest:     field{"image", ref.Digest.String()},
	})
	return nil
}
