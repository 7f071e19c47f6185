package webhook

import (
	"net/http"
	"regexp"
	"strings"
)

var (
	awsAccount = regexp.MustCompile(`^[0-9]{12}$`)
	awsRegion  = regexp.MustCompile(`^[a-z]{2,5}(-[a-z]+)+-[0-9]{1,2}$`)
)

// decodeECR reads Amazon ECR's "ECR Image Action" event as EventBridge delivers
// it to an API destination without an input transformer.
func decodeECR(b *batch, _ http.Header, body []byte) error {
	var event struct {
		Source     string    `json:"source"`
		DetailType string    `json:"detail-type"`
		Account    string    `json:"account"`
		Region     string    `json:"region"`
		Time       timestamp `json:"time"`
		Detail     struct {
			Result            string `json:"result"`
			ActionType        string `json:"action-type"`
			RepositoryName    string `json:"repository-name"`
			ImageDigest       string `json:"image-digest"`
			ImageTag          string `json:"image-tag"`
			ManifestMediaType string `json:"manifest-media-type"`
			ArtifactMediaType string `json:"artifact-media-type"`
		} `json:"detail"`
	}
	if err := b.unmarshal("body", body, &event); err != nil {
		return err
	}
	detail := &event.Detail
	switch {
	case event.Source == "":
		return b.invalid("source", "missing")
	case event.Source != "aws.ecr":
		b.ignore("source %.100q: not ECR", event.Source)
		return nil
	case event.DetailType != "ECR Image Action":
		b.ignore("detail-type %.100q: no image action", event.DetailType)
		return nil
	case detail.ActionType == "":
		return b.invalid("detail.action-type", "missing")
	case detail.ActionType != "PUSH":
		b.ignore("detail.action-type %.100q: no push", detail.ActionType)
		return nil
	case detail.Result != "SUCCESS":
		b.ignore("detail.result %.100q: the push did not succeed", detail.Result)
		return nil
	}
	host := ""
	if b.registry == "" {
		switch {
		case !awsAccount.MatchString(event.Account):
			return b.invalid("account", "%.100q is no 12-digit account id", event.Account)
		case !awsRegion.MatchString(event.Region):
			return b.invalid("region", "%.100q is no region", event.Region)
		}
		host = event.Account + ".dkr.ecr." + event.Region + "." + awsSuffix(event.Region)
	}
	b.add(push{
		host:       field{"account", host},
		repository: field{"detail.repository-name", detail.RepositoryName},
		tag:        field{"detail.image-tag", detail.ImageTag},
		digest:     field{"detail.image-digest", detail.ImageDigest},
		mediaType:  field{"detail.manifest-media-type", detail.ManifestMediaType},
		artifact:   field{"detail.artifact-media-type", detail.ArtifactMediaType},
		at:         event.Time,
	})
	return nil
}

// awsSuffix is the DNS suffix of a region's partition (botocore's
// partitions.json).
func awsSuffix(region string) string {
	for prefix, suffix := range map[string]string{
		"cn-":      "amazonaws.com.cn",
		"eusc-":    "amazonaws.eu",
		"us-iso-":  "c2s.ic.gov",
		"us-isob-": "sc2s.sgov.gov",
		"eu-isoe-": "cloud.adc-e.uk",
		"us-isof-": "csp.hci.ic.gov",
	} {
		if strings.HasPrefix(region, prefix) {
			return suffix
		}
	}
	return "amazonaws.com"
}
