package webhook

import (
	"encoding/json"
	"net/http"
)

// decodeZot reads zot's events, CloudEvents in binary or structured mode. They
// name no registry host, so that the configuration supplies it.
func decodeZot(b *batch, header http.Header, body []byte) error {
	events, err := b.cloudEvents(header, body)
	if err != nil {
		return err
	}
	for _, e := range events {
		if e.Type() != "zotregistry.image.updated" {
			b.ignore("type %.100q: no image push", e.Type())
			continue
		}
		var data struct {
			Name      string `json:"name"`
			Reference string `json:"reference"` // tag or digest
			Digest    string `json:"digest"`
			MediaType string `json:"mediaType"`
			// Manifest is the manifest itself, as a JSON text in a string.
			Manifest json.RawMessage `json:"manifest"`
		}
		if err := b.unmarshal("data", e.Data(), &data); err != nil {
			return err
		}
		at := timestamp{e.Time().UTC()}
		at.bound()
		b.add(push{
			repository: field{"data.name", data.Name},
			tag:        field{"data.reference", data.Reference},
			digest:     field{"data.digest", data.Digest},
			mediaType:  field{"data.mediaType", data.MediaType},
			artifact:   field{"data.manifest", configMediaType(data.Manifest)},
			at:         at,
		})
	}
	return nil
}

// configMediaType is the media type of a manifest's config, which tells images
// from other artifacts; empty for an index and for what cannot be read.
func configMediaType(manifest json.RawMessage) string {
	var text string
	if json.Unmarshal(manifest, &text) == nil {
		manifest = json.RawMessage(text)
	}
	var m struct {
		Config struct {
			MediaType string `json:"mediaType"`
		} `json:"config"`
	}
	if json.Unmarshal(manifest, &m) != nil {
		return ""
	}
	return m.Config.MediaType
}
