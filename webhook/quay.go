package webhook

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// decodeQuay reads Quay's repository push notification, which names tags but no
// digests. Its other notifications (builds, scans, mirroring) have no
// updated_tags.
func decodeQuay(b *batch, _ http.Header, body []byte) error {
	var event struct {
		Repository  string          `json:"repository"` // "namespace/name"
		Namespace   string          `json:"namespace"`
		Name        string          `json:"name"`
		DockerURL   string          `json:"docker_url"` // "host/namespace/name"
		UpdatedTags json.RawMessage `json:"updated_tags"`
	}
	if err := b.unmarshal("body", body, &event); err != nil {
		return err
	}
	if event.UpdatedTags == nil {
		if event.Repository == "" && event.DockerURL == "" {
			return b.invalid("repository", "missing")
		}
		b.ignore("updated_tags: absent, no push")
		return nil
	}
	tags, err := b.quayTags(event.UpdatedTags)
	if err != nil {
		return err
	}
	if len(tags) == 0 {
		b.ignore("updated_tags: empty")
	}
	host, repository := "", field{"repository", event.Repository}
	if before, after, ok := strings.Cut(event.DockerURL, "/"); ok && before != "" {
		host, repository = before, field{"docker_url", after}
	} else if repository.value == "" {
		repository.value = joinName(event.Namespace, event.Name)
	}
	for i, tag := range tags {
		b.add(push{
			host:       field{"docker_url", host},
			repository: repository,
			tag:        field{fmt.Sprintf("updated_tags[%d]", i), tag},
		})
	}
	return nil
}

// quayTags reads the list of tags, or the map from tag to image id that older
// versions send; the id is Quay's own and no digest.
func (b *batch) quayTags(raw json.RawMessage) ([]string, error) {
	var tags []string
	if json.Unmarshal(raw, &tags) != nil {
		var ids map[string]json.RawMessage
		if json.Unmarshal(raw, &ids) != nil {
			return nil, b.invalid("updated_tags", "neither a list of tags nor a map from tag to image id")
		}
		tags = make([]string, 0, len(ids))
		for tag := range ids {
			tags = append(tags, tag)
		}
		slices.Sort(tags)
	}
	return tags, b.count("updated_tags", len(tags))
}
