package webhook

import "net/http"

// decodeAliyun reads Alibaba Cloud Container Registry's trigger. It names no
// registry host (an instance has several: public, private, regional), so that
// the configuration supplies it. Its pushed_at has no time zone and is left out.
func decodeAliyun(b *batch, _ http.Header, body []byte) error {
	var event struct {
		PushData *struct {
			Digest string `json:"digest"`
			Tag    string `json:"tag"`
		} `json:"push_data"`
		Repository struct {
			Name         string `json:"name"`
			Namespace    string `json:"namespace"`
			RepoFullName string `json:"repo_full_name"`
		} `json:"repository"`
	}
	if err := b.unmarshal("body", body, &event); err != nil {
		return err
	}
	if event.PushData == nil {
		return b.invalid("push_data", "missing")
	}
	repository := field{"repository.repo_full_name", event.Repository.RepoFullName}
	if repository.value == "" {
		repository.value = joinName(event.Repository.Namespace, event.Repository.Name)
	}
	b.add(push{
		repository: repository,
		tag:        field{"push_data.tag", event.PushData.Tag},
		digest:     field{"push_data.digest", event.PushData.Digest},
	})
	return nil
}
