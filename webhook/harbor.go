package webhook

import (
	"fmt"
	"net/http"
)

// harborData is what both of Harbor's payload formats carry
// (notifier/model.EventData in its source).
type harborData struct {
	Resources []struct {
		Digest string `json:"digest"`
		// Tag repeats the digest for a push without a tag.
		Tag         string `json:"tag"`
		ResourceURL string `json:"resource_url"`
	} `json:"resources"`
	Repository struct {
		Name         string `json:"name"`
		Namespace    string `json:"namespace"`
		RepoFullName string `json:"repo_full_name"`
	} `json:"repository"`
}

// decodeHarbor reads Harbor's default payload, or its CloudEvents one.
func decodeHarbor(b *batch, header http.Header, body []byte) error {
	if isCloudEvent(header, body) {
		return decodeHarborCloudEvents(b, header, body)
	}
	var event struct {
		Type      string      `json:"type"`
		OccurAt   timestamp   `json:"occur_at"` // seconds
		EventData *harborData `json:"event_data"`
	}
	if err := b.unmarshal("body", body, &event); err != nil {
		return err
	}
	switch event.Type {
	case "PUSH_ARTIFACT":
	case "":
		return b.invalid("type", "missing")
	default: // PULL_ARTIFACT, DELETE_ARTIFACT, SCANNING_COMPLETED, REPLICATION, ...
		b.ignore("type %.100q: no image push", event.Type)
		return nil
	}
	if event.EventData == nil {
		return b.invalid("event_data", "missing")
	}
	return b.addHarbor("event_data.", event.EventData, event.OccurAt)
}

func decodeHarborCloudEvents(b *batch, header http.Header, body []byte) error {
	events, err := b.cloudEvents(header, body)
	if err != nil {
		return err
	}
	for _, e := range events {
		if e.Type() != "harbor.artifact.pushed" {
			b.ignore("type %.100q: no image push", e.Type())
			continue
		}
		var data harborData
		if err := b.unmarshal("data", e.Data(), &data); err != nil {
			return err
		}
		at := timestamp{e.Time().UTC()}
		at.bound()
		if err := b.addHarbor("data.", &data, at); err != nil {
			return err
		}
	}
	return nil
}

func (b *batch) addHarbor(prefix string, data *harborData, at timestamp) error {
	if len(data.Resources) == 0 {
		return b.invalid(prefix+"resources", "missing")
	}
	if err := b.count(prefix+"resources", len(b.events)+len(b.ignored)+len(b.rejected)+len(data.Resources)); err != nil {
		return err
	}
	repository := field{prefix + "repository.repo_full_name", data.Repository.RepoFullName}
	if repository.value == "" {
		repository.value = joinName(data.Repository.Namespace, data.Repository.Name)
	}
	for i, r := range data.Resources {
		where := fmt.Sprintf("%sresources[%d].", prefix, i)
		b.add(push{
			host:       field{where + "resource_url", hostOf(r.ResourceURL)},
			repository: repository,
			tag:        field{where + "tag", r.Tag},
			digest:     field{where + "digest", r.Digest},
			at:         at,
		})
	}
	return nil
}
