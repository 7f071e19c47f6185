package webhook_test

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"accel"
	"accel/webhook"
)

// credential is how a request presents a secret.
type credential struct {
	header http.Header
	path   string
}

func basic(user, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

// credentials are the ways in which kind k's sender may present secret.
func credentials(k webhook.Kind, secret string, body []byte) map[string]credential {
	inHeader := func(name, value string) credential { return credential{header: headers(name, value)} }
	switch k {
	case webhook.DockerHub, webhook.Quay, webhook.Aliyun:
		return map[string]credential{"path": {path: secret}}
	case webhook.GitHub:
		return map[string]credential{"HMAC": inHeader("X-Hub-Signature-256", "sha256="+hmacHex(secret, body))}
	case webhook.Artifactory:
		return map[string]credential{
			"token": inHeader("X-JFrog-Event-Auth", secret),
			"HMAC":  inHeader("X-JFrog-Event-Auth", hmacHex(secret, body)),
		}
	case webhook.Generic:
		return map[string]credential{
			"bearer":      inHeader("Authorization", "Bearer "+secret),
			"HMAC":        inHeader("X-Signature", hmacHex(secret, body)),
			"HMAC prefix": inHeader("X-Signature", "sha256="+hmacHex(secret, body)),
		}
	default:
		return map[string]credential{
			"exact":  inHeader("Authorization", secret),
			"bearer": inHeader("Authorization", "bearer "+secret),
			"basic":  inHeader("Authorization", basic("anybody", secret)),
		}
	}
}

// wrong are credentials that must not hold for any kind but by chance of being
// ignored; none of them has the secret where the kind looks for it.
func wrong(secret string, body []byte) map[string]credential {
	return map[string]credential{
		"other secret":      {headers("Authorization", "Bearer x"+secret, "X-JFrog-Event-Auth", "x"+secret), "x" + secret},
		"prefix":            {headers("Authorization", "Bearer "+secret[:5], "X-JFrog-Event-Auth", secret[:5]), secret[:5]},
		"empty values":      {headers("Authorization", "", "X-JFrog-Event-Auth", "", "X-Signature", "", "X-Hub-Signature-256", ""), ""},
		"scheme alone":      {headers("Authorization", "Bearer "), ""},
		"basic user":        {headers("Authorization", basic(secret, "")), ""},
		"bad base64":        {headers("Authorization", "Basic "+secret), ""},
		"HMAC of other":     {headers("X-Hub-Signature-256", "sha256="+hmacHex(secret, append(body[:len(body):len(body)], 'x')), "X-Signature", hmacHex(secret, nil), "X-JFrog-Event-Auth", hmacHex("x", body)), ""},
		"HMAC no hex":       {headers("X-Hub-Signature-256", "sha256=zz", "X-Signature", "zz", "X-JFrog-Event-Auth", "zz"), ""},
		"HMAC truncated":    {headers("X-Hub-Signature-256", "sha256="+hmacHex(secret, body)[:8], "X-Signature", hmacHex(secret, body)[:8], "X-JFrog-Event-Auth", hmacHex(secret, body)[:8]), ""},
		"SHA-1 header":      {headers("X-Hub-Signature", "sha1="+hmacHex(secret, body)), ""},
		"secret as path":    {http.Header{}, "x" + secret + "x"},
		"secret elsewhere":  {headers("X-Secret", secret, "Cookie", secret), ""},
		"signature vs. key": {headers("X-Signature", secret, "X-Hub-Signature-256", secret), ""},
	}
}

// Every fixture with good, absent and wrong credentials.
func TestAuthentication(t *testing.T) {
	for i, f := range fixtures {
		if f.kind == webhook.GAR {
			continue // TestOIDC
		}
		t.Run(fmt.Sprintf("%d %s", i, f.file), func(t *testing.T) {
			body := f.body(t)
			c := configOf(f.kind)
			c.PreviousSecrets = []string{"the-one-before", "the-one-before-that"}
			s := newSource(t, c)
			check := func(c credential) error {
				header := f.header.Clone()
				if header == nil {
					header = http.Header{}
				}
				for k, v := range c.header {
					header[k] = v
				}
				return s.Authenticate(t.Context(), header, c.path, body)
			}
			for _, secret := range append([]string{theSecret}, c.PreviousSecrets...) {
				for how, good := range credentials(f.kind, secret, body) {
					if err := check(good); err != nil {
						t.Errorf("good, %s: %v", how, err)
					}
				}
			}
			if err := check(credential{}); !errors.Is(err, accel.ErrUnauthenticated) {
				t.Errorf("absent: %v, want ErrUnauthenticated", err)
			}
			for how, bad := range credentials(f.kind, "guess", body) {
				if err := check(bad); !errors.Is(err, accel.ErrUnauthenticated) {
					t.Errorf("wrong, %s: %v, want ErrUnauthenticated", how, err)
				}
			}
			for how, bad := range wrong(theSecret, body) {
				err := check(bad)
				if !errors.Is(err, accel.ErrUnauthenticated) {
					t.Errorf("wrong, %s: %v, want ErrUnauthenticated", how, err)
				}
				if err != nil && strings.Contains(err.Error(), theSecret) {
					t.Errorf("wrong, %s: the error tells the secret: %v", how, err)
				}
			}
		})
	}
}

// A signature that does not fit is a refusal, even beside a good token.
func TestGenericWrongSignatureBesideToken(t *testing.T) {
	s := newSource(t, configOf(webhook.Generic))
	body := []byte(`{"image":"r.example/a:v1"}`)
	header := headers("Authorization", "Bearer "+theSecret, "X-Signature", hmacHex("guess", body))
	if err := s.Authenticate(t.Context(), header, "", body); !errors.Is(err, accel.ErrUnauthenticated) {
		t.Errorf("got %v", err)
	}
}

// The configured value may itself look like a scheme with a token.
func TestExactHeaderWithScheme(t *testing.T) {
	c := configOf(webhook.Harbor)
	c.Secret = "Bearer abc"
	s := newSource(t, c)
	if err := s.Authenticate(t.Context(), headers("Authorization", "Bearer abc"), "", nil); err != nil {
		t.Error(err)
	}
	if err := s.Authenticate(t.Context(), headers("Authorization", "Bearer abcd"), "", nil); !errors.Is(err, accel.ErrUnauthenticated) {
		t.Errorf("got %v", err)
	}
}
