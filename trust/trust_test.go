package trust_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"

	"accel"
	"accel/trust"

	"github.com/opencontainers/go-digest"
	"github.com/secure-systems-lab/go-securesystemslib/dsse"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func mapping() accel.Mapping {
	return accel.Mapping{
		SourceRepository: "registry.example:5000/team/app",
		SourceManifest:   digest.FromString("source"),
		SourceIndex:      digest.FromString("index"),
		Platform:         "linux/amd64",
		TargetRepository: "registry.example:5000/team/app",
		TargetManifest:   digest.FromString("target"),
		Params:           "estargz/1;chunk=1048576;level=6",
		Layers: []accel.LayerMapping{
			{Source: digest.FromString("l1"), DiffID: digest.FromString("d1"), Target: digest.FromString("t1"), TargetBytes: 1000, TOCDigest: digest.FromString("toc"), TOCOffset: 900},
			{Source: digest.FromString("foreign"), DiffID: digest.FromString("d2"), Target: digest.FromString("foreign"), TargetBytes: 5},
		},
	}
}

func newKeyring(t *testing.T) *trust.Keyring {
	t.Helper()
	k, err := trust.CreateKeyring(filepath.Join(t.TempDir(), "keys"))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func verifierOf(t *testing.T, k *trust.Keyring) *trust.Verifier {
	t.Helper()
	v, err := trust.NewVerifier(k.Export())
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func sign(t *testing.T, k *trust.Keyring, m accel.Mapping) []byte {
	t.Helper()
	env, err := k.Sign(context.Background(), m)
	if err != nil {
		t.Fatal(err)
	}
	return env
}

func TestSignedMappingVerifies(t *testing.T) {
	k := newKeyring(t)
	env := sign(t, k, mapping())
	if again := sign(t, k, mapping()); !bytes.Equal(env, again) {
		t.Errorf("signing twice gave different bytes:\n%s\n%s", env, again)
	}
	got, err := verifierOf(t, k).Verify(context.Background(), env)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, mapping()) {
		t.Errorf("got %+v, want %+v", got, mapping())
	}
}

func TestKeysSurviveReopening(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	if _, err := trust.OpenKeyring(dir); !errors.Is(err, accel.ErrNotFound) {
		t.Fatalf("opening no directory: %v, want ErrNotFound", err)
	}
	k, err := trust.CreateKeyring(dir)
	if err != nil {
		t.Fatal(err)
	}
	again, err := trust.CreateKeyring(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(k.List(), again.List()) || len(k.List()) != 1 {
		t.Errorf("keys changed by opening again: %+v, then %+v", k.List(), again.List())
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		info, err := f.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v, want 0600", f.Name(), info.Mode())
		}
	}
}

func TestRotation(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	k, err := trust.CreateKeyring(dir)
	if err != nil {
		t.Fatal(err)
	}
	before := sign(t, k, mapping())
	onlyOld := verifierOf(t, k)

	// Another process rotates; the one that has the keyring open notices.
	other, err := trust.OpenKeyring(dir)
	if err != nil {
		t.Fatal(err)
	}
	key, err := other.New()
	if err != nil {
		t.Fatal(err)
	}
	after := sign(t, k, mapping())
	if !strings.Contains(string(after), key.ID) || bytes.Equal(before, after) {
		t.Errorf("after rotation the new key %s does not sign: %s", key.ID, after)
	}
	for _, env := range [][]byte{before, after} {
		if _, err := verifierOf(t, k).Verify(context.Background(), env); err != nil {
			t.Errorf("an envelope no longer verifies after rotation: %v", err)
		}
	}
	if _, err := onlyOld.Verify(context.Background(), after); !errors.Is(err, accel.ErrUnauthenticated) {
		t.Errorf("unknown key: %v, want ErrUnauthenticated", err)
	}
	var active int
	for _, key := range k.List() {
		if key.Active {
			active++
		}
	}
	if active != 1 || len(k.List()) != 2 {
		t.Errorf("%d active of %d keys, want 1 of 2", active, len(k.List()))
	}
}

func TestConcurrentNew(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	k, err := trust.CreateKeyring(dir)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := k.New(); err != nil {
				t.Error(err)
			}
			if _, err := k.Sign(context.Background(), mapping()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	again, err := trust.OpenKeyring(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(again.List(), k.List()) || len(k.List()) != 9 {
		t.Errorf("on disk %d keys, in memory %d, want 9 alike", len(again.List()), len(k.List()))
	}
}

func TestDamagedDirectories(t *testing.T) {
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(ecKey)
	if err != nil {
		t.Fatal(err)
	}
	ecPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	for name, c := range map[string]struct {
		damage func(t *testing.T, dir, id string)
		want   error // nil: opens
	}{
		"half-written file is ignored": {func(t *testing.T, dir, id string) {
			write(t, filepath.Join(dir, id+".pem.123.tmp"), []byte("-----BEGIN PRIV"))
		}, nil},
		"no active file": {func(t *testing.T, dir, id string) { remove(t, filepath.Join(dir, "active")) }, nil},
		"active names no key": {func(t *testing.T, dir, id string) {
			write(t, filepath.Join(dir, "active"), []byte("00\n"))
		}, accel.ErrInvalid},
		"truncated key":   {func(t *testing.T, dir, id string) { write(t, filepath.Join(dir, id+".pem"), []byte("-----BEGIN")) }, accel.ErrInvalid},
		"other algorithm": {func(t *testing.T, dir, id string) { write(t, filepath.Join(dir, "ec.pem"), ecPEM) }, accel.ErrInvalid},
		"huge file":       {func(t *testing.T, dir, id string) { write(t, filepath.Join(dir, "x.pem"), make([]byte, 1<<20)) }, accel.ErrInvalid},
		"name and key differ": {func(t *testing.T, dir, id string) {
			if err := os.Rename(filepath.Join(dir, id+".pem"), filepath.Join(dir, "other.pem")); err != nil {
				t.Fatal(err)
			}
		}, accel.ErrInvalid},
		"no key": {func(t *testing.T, dir, id string) { remove(t, filepath.Join(dir, id+".pem")) }, accel.ErrNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "keys")
			k, err := trust.CreateKeyring(dir)
			if err != nil {
				t.Fatal(err)
			}
			c.damage(t, dir, k.List()[0].ID)
			opened, err := trust.OpenKeyring(dir)
			if !errors.Is(err, c.want) || (c.want == nil) != (err == nil) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			if err == nil {
				sign(t, opened, mapping())
			}
		})
	}
}

func TestSignRefusesWhatCannotBeVerified(t *testing.T) {
	k := newKeyring(t)
	for name, spoil := range map[string]func(*accel.Mapping){
		"no source repository":       func(m *accel.Mapping) { m.SourceRepository = "" },
		"target repository path":     func(m *accel.Mapping) { m.TargetRepository = "host/../etc" },
		"short manifest digest":      func(m *accel.Mapping) { m.SourceManifest = "sha256:abcd" },
		"no target":                  func(m *accel.Mapping) { m.TargetManifest = "" },
		"index digest of no kind":    func(m *accel.Mapping) { m.SourceIndex = "md5:00" },
		"layer without diffID":       func(m *accel.Mapping) { m.Layers[0].DiffID = "" },
		"layer source with a slash":  func(m *accel.Mapping) { m.Layers[0].Source = "sha256:../../x" },
		"negative size":              func(m *accel.Mapping) { m.Layers[1].TargetBytes = -1 },
		"TOC behind the end":         func(m *accel.Mapping) { m.Layers[0].TOCOffset = 1000 },
		"TOC offset without digest":  func(m *accel.Mapping) { m.Layers[1].TOCOffset = 1 },
		"more layers than can mount": func(m *accel.Mapping) { m.Layers = make([]accel.LayerMapping, 2000) },
		"platform without end":       func(m *accel.Mapping) { m.Platform = strings.Repeat("x", 1000) },
	} {
		t.Run(name, func(t *testing.T) {
			m := mapping()
			spoil(&m)
			if _, err := k.Sign(context.Background(), m); !errors.Is(err, accel.ErrInvalid) {
				t.Errorf("got %v, want ErrInvalid", err)
			}
		})
	}
}

func TestVerifyRefuses(t *testing.T) {
	k := newKeyring(t)
	good := sign(t, k, mapping())
	edit := func(change func(*dsse.Envelope)) []byte {
		var env dsse.Envelope
		if err := json.Unmarshal(good, &env); err != nil {
			t.Fatal(err)
		}
		change(&env)
		out, err := json.Marshal(env)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	for name, c := range map[string]struct {
		envelope []byte
		want     error
	}{
		"nothing":      {nil, accel.ErrInvalid},
		"no JSON":      {[]byte("{"), accel.ErrInvalid},
		"too large":    {append(bytes.Clone(good), bytes.Repeat([]byte(" "), 1<<20)...), accel.ErrInvalid},
		"other type":   {edit(func(e *dsse.Envelope) { e.PayloadType = "application/vnd.in-toto+json" }), accel.ErrInvalid},
		"unsigned":     {edit(func(e *dsse.Envelope) { e.Signatures = nil }), accel.ErrUnauthenticated},
		"many":         {edit(func(e *dsse.Envelope) { e.Signatures = make([]dsse.Signature, 1000) }), accel.ErrInvalid},
		"other keyid":  {edit(func(e *dsse.Envelope) { e.Signatures[0].KeyID = "ff" }), accel.ErrUnauthenticated},
		"foreign key":  {sign(t, newKeyring(t), mapping()), accel.ErrUnauthenticated},
		"no base64":    {edit(func(e *dsse.Envelope) { e.Payload = "!" }), accel.ErrUnauthenticated},
		"swapped body": {edit(func(e *dsse.Envelope) { e.Payload = base64.StdEncoding.EncodeToString([]byte(`{}`)) }), accel.ErrUnauthenticated},
	} {
		t.Run(name, func(t *testing.T) {
			if m, err := verifierOf(t, k).Verify(context.Background(), c.envelope); !errors.Is(err, c.want) {
				t.Errorf("got %+v, %v, want %v", m, err, c.want)
			}
		})
	}
}

func TestNewVerifierRefuses(t *testing.T) {
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(ecKey.Public())
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{
		"empty":       nil,
		"text":        []byte("hello"),
		"private key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
		"ecdsa":       pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}),
		"garbage":     pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: []byte("x")}),
		"huge":        bytes.Repeat([]byte("x"), 2<<20),
	} {
		if _, err := trust.NewVerifier(text); !errors.Is(err, accel.ErrInvalid) {
			t.Errorf("%s: got %v, want ErrInvalid", name, err)
		}
	}
}

// FuzzVerify holds that an envelope is either refused with one of the two
// errors of the contract, or says what was signed.
func FuzzVerify(f *testing.F) {
	k, err := trust.CreateKeyring(filepath.Join(f.TempDir(), "keys"))
	if err != nil {
		f.Fatal(err)
	}
	v, err := trust.NewVerifier(k.Export())
	if err != nil {
		f.Fatal(err)
	}
	good, err := k.Sign(context.Background(), mapping())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"payloadType":"application/vnd.dev.accel.mapping.v1+json","payload":"","signatures":[{"keyid":"","sig":""}]}`))
	f.Add([]byte(`{"signatures":null}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, envelope []byte) {
		m, err := v.Verify(context.Background(), envelope)
		switch {
		case err == nil:
			if !reflect.DeepEqual(m, mapping()) {
				t.Errorf("accepted what was never signed: %+v", m)
			}
		case !errors.Is(err, accel.ErrInvalid) && !errors.Is(err, accel.ErrUnauthenticated):
			t.Errorf("error of no kind: %v", err)
		}
	})
}

func write(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}
