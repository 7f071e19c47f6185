package trust

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"

	"accel"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"
)

const (
	// MaxEnvelopeBytes bounds an envelope. One with the 127 layers that container
	// runtimes allow has about 70 KiB.
	MaxEnvelopeBytes = 1 << 20
	// maxSignatures bounds the work that one envelope can cause.
	maxSignatures = 16
	// maxPublicKeysBytes bounds what NewVerifier reads: some 9,000 keys.
	maxPublicKeysBytes = 1 << 20
)

// Sign wraps m in a DSSE envelope (JSON, https://github.com/secure-systems-lab/dsse)
// of payload type accel.MediaTypeMapping, signed by the active key. Equal m and
// key give equal bytes. The error wraps accel.ErrInvalid where m could not be
// verified later.
func (k *Keyring) Sign(ctx context.Context, m accel.Mapping) ([]byte, error) {
	if err := validate(m); err != nil {
		return nil, err
	}
	payload, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode the mapping of %s: %w", m.SourceManifest, err)
	}
	signer, err := dsse.NewEnvelopeSigner(envelopeSigner{k.signer()})
	if err != nil {
		return nil, fmt.Errorf("sign the mapping of %s: %w", m.SourceManifest, err)
	}
	env, err := signer.SignPayload(ctx, accel.MediaTypeMapping, payload)
	if err != nil {
		return nil, fmt.Errorf("sign the mapping of %s: %w", m.SourceManifest, err)
	}
	out, err := json.Marshal(env)
	if err != nil {
		return nil, fmt.Errorf("encode the envelope of %s: %w", m.SourceManifest, err)
	}
	if len(out) > MaxEnvelopeBytes {
		return nil, fmt.Errorf("%w: the signed mapping of %s has %d bytes, more than %d", accel.ErrInvalid, m.SourceManifest, len(out), MaxEnvelopeBytes)
	}
	return out, nil
}

// Verifier holds trusted public keys. It may be used by several goroutines.
type Verifier struct {
	inner *dsse.EnvelopeVerifier
}

// NewVerifier trusts every PUBLIC KEY block of pemText, as Keyring.Export
// writes them. The error wraps accel.ErrInvalid for anything else in it and
// where there is no key at all.
func NewVerifier(pemText []byte) (*Verifier, error) {
	if len(pemText) > maxPublicKeysBytes {
		return nil, fmt.Errorf("%w: trusted keys: %d bytes are more than %d", accel.ErrInvalid, len(pemText), maxPublicKeysBytes)
	}
	var keys []dsse.Verifier
	seen := map[string]bool{}
	for n := 1; ; n++ {
		block, rest := pem.Decode(pemText)
		if block == nil {
			break
		}
		pemText = rest
		if block.Type != "PUBLIC KEY" {
			return nil, fmt.Errorf("%w: trusted keys: PEM block %d is a %s, want PUBLIC KEY", accel.ErrInvalid, n, block.Type)
		}
		parsed, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%w: trusted keys: PEM block %d: %w", accel.ErrInvalid, n, err)
		}
		public, ok := parsed.(ed25519.PublicKey)
		if !ok {
			return nil, fmt.Errorf("%w: trusted keys: PEM block %d is a %T, not an ed25519 key", accel.ErrInvalid, n, parsed)
		}
		id, err := keyID(public)
		if err != nil {
			return nil, err
		}
		if !seen[id] {
			seen[id] = true
			keys = append(keys, publicKey{id: id, key: public})
		}
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("%w: trusted keys: no PEM block of type PUBLIC KEY", accel.ErrInvalid)
	}
	inner, err := dsse.NewEnvelopeVerifier(keys...)
	if err != nil {
		return nil, fmt.Errorf("trusted keys: %w", err)
	}
	return &Verifier{inner: inner}, nil
}

// Verify checks an envelope and returns the mapping inside. The error wraps
// accel.ErrUnauthenticated where no trusted key signed it, and accel.ErrInvalid
// where it is malformed or says something impossible.
func (v *Verifier) Verify(ctx context.Context, envelope []byte) (accel.Mapping, error) {
	if len(envelope) > MaxEnvelopeBytes {
		return accel.Mapping{}, fmt.Errorf("%w: mapping envelope of %d bytes is larger than %d", accel.ErrInvalid, len(envelope), MaxEnvelopeBytes)
	}
	var env dsse.Envelope
	if err := json.Unmarshal(envelope, &env); err != nil {
		return accel.Mapping{}, fmt.Errorf("%w: mapping envelope: %w", accel.ErrInvalid, err)
	}
	if env.PayloadType != accel.MediaTypeMapping {
		return accel.Mapping{}, fmt.Errorf("%w: mapping envelope: payload type %q, want %q", accel.ErrInvalid, env.PayloadType, accel.MediaTypeMapping)
	}
	if len(env.Signatures) > maxSignatures {
		return accel.Mapping{}, fmt.Errorf("%w: mapping envelope: %d signatures are more than %d", accel.ErrInvalid, len(env.Signatures), maxSignatures)
	}
	// Nothing of the payload is looked at before a signature holds.
	_, payload, err := v.inner.VerifyAndDecode(ctx, &env)
	if err != nil {
		return accel.Mapping{}, fmt.Errorf("%w: mapping envelope: no trusted key signed it: %w", accel.ErrUnauthenticated, err)
	}
	var m accel.Mapping
	if err := json.Unmarshal(payload, &m); err != nil {
		return accel.Mapping{}, fmt.Errorf("%w: signed mapping: %w", accel.ErrInvalid, err)
	}
	if err := validate(m); err != nil {
		return accel.Mapping{}, err
	}
	return m, nil
}

// envelopeSigner is the library's view of a private key.
type envelopeSigner struct{ pair keyPair }

func (s envelopeSigner) Sign(_ context.Context, data []byte) ([]byte, error) {
	return s.pair.private.Sign(nil, data, crypto.Hash(0)) // RFC 8032: no randomness
}

func (s envelopeSigner) KeyID() (string, error) { return s.pair.id, nil }

// publicKey is the library's view of a trusted key.
type publicKey struct {
	id  string
	key ed25519.PublicKey
}

func (p publicKey) Verify(_ context.Context, data, sig []byte) error {
	if !ed25519.Verify(p.key, data, sig) {
		return errors.New("the signature does not match")
	}
	return nil
}

func (p publicKey) KeyID() (string, error)   { return p.id, nil }
func (p publicKey) Public() crypto.PublicKey { return p.key }
