package worker

import (
	"fmt"

	"accel"
)

// VerifyMode is how a pushed image is checked before it is Ready. In every mode
// the manifests and all layers are read back and their digests checked.
type VerifyMode string

const (
	// VerifyDigest: nothing beyond the read-back.
	VerifyDigest VerifyMode = "digest"
	// VerifySampled: the file trees are compared too, contents of a sample.
	VerifySampled VerifyMode = "sampled"
	// VerifyFull: the file trees are compared with all contents.
	VerifyFull VerifyMode = "full"
)

func (m VerifyMode) valid() bool {
	return m == VerifyDigest || m == VerifySampled || m == VerifyFull
}

// RepositoryPolicy says which repositories are converted, by globs over
// "host/path" (see accel.MatchRepository). Deny wins; an empty Allow allows all.
type RepositoryPolicy struct {
	Allow []string
	Deny  []string
}

func (p RepositoryPolicy) validate() error {
	for key, globs := range map[string][]string{"policy.allow": p.Allow, "policy.deny": p.Deny} {
		for _, g := range globs {
			if err := accel.CheckRepositoryGlob(g); err != nil {
				return fmt.Errorf("%s: %w", key, err)
			}
		}
	}
	return nil
}

// check returns a Rejection where repository may not be converted.
func (p RepositoryPolicy) check(repository string) error {
	for _, g := range p.Deny {
		if accel.MatchRepository(g, repository) {
			return &accel.Rejection{Rule: "policy.deny", Detail: fmt.Sprintf("repository %s matches %q", repository, g)}
		}
	}
	if len(p.Allow) == 0 {
		return nil
	}
	for _, g := range p.Allow {
		if accel.MatchRepository(g, repository) {
			return nil
		}
	}
	return &accel.Rejection{Rule: "policy.allow", Detail: fmt.Sprintf("repository %s matches none of %q", repository, p.Allow)}
}
