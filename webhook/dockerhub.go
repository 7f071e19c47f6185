package webhook

import "net/http"

// decodeDockerHub reads Docker Hub's webhook, which names no digest. It also
// has a callback_url, which is never called: it is an address that anybody who
// knows the path can choose.
func decodeDockerHub(b *batch, _ http.Header, body []byte) error {
	var event struct {
		PushData *struct {
			PushedAt timestamp `json:"pushed_at"` // seconds
			Tag      string    `json:"tag"`
		} `json:"push_data"`
		Repository struct {
			RepoName  string `json:"repo_name"`
			Namespace string `json:"namespace"`
			Name      string `json:"name"`
		} `json:"repository"`
	}
	if err := b.unmarshal("body", body, &event); err != nil {
		return err
	}
	if event.PushData == nil {
		return b.invalid("push_data", "missing")
	}
	repository := field{"repository.repo_name", event.Repository.RepoName}
	if repository.value == "" {
		repository.value = joinName(event.Repository.Namespace, event.Repository.Name)
	}
	b.add(push{
		host:       field{"host", dockerHubHost},
		repository: repository,
		tag:        field{"push_data.tag", event.PushData.Tag},
		at:         event.PushData.PushedAt,
	})
	return nil
}
