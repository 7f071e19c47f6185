package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"accel"
	"accel/convert"
	"accel/internal/testbed"
	"accel/profile"
	"accel/registry"
	"accel/trust"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// registryDir is where the registry's content is, in a bed's folder.
const registryDir = "content"

// convertedSuffix of a tag is accel's default for the converted form.
const convertedSuffix = "-esgz"

var accelProgram = filepath.Join("bin", "accel")

// bed is what all hosts have in common: a registry at the far end of a link, and
// the key that accel's mappings are signed with.
type bed struct {
	dir      string // logs, the registry's content in memory, conversions' spill
	keep     bool
	registry *testbed.Registry
	link     *testbed.Link
	client   *registry.Client
	keys     *trust.Keyring
	keysFile string   // its public half
	mounted  string   // the registry's folder
	hot      []hotSet // of the images that are published
	foretold []foretold
}

func openBed(ctx context.Context, s setting) (_ *bed, err error) {
	logrus.SetOutput(io.Discard) // distribution's
	b := &bed{keep: s.keep}
	if b.dir, err = os.MkdirTemp("", "accel-bench-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.close())
		}
	}()
	// The registry stands for another machine, whose page cache is not dropped with the node's.
	memory := filepath.Join(b.dir, registryDir)
	if err := os.Mkdir(memory, 0o700); err != nil {
		return nil, err
	}
	if err := unix.Mount("tmpfs", memory, "tmpfs", 0, ""); err != nil {
		return nil, fmt.Errorf("keep the registry's content in memory: %w", err)
	}
	b.mounted = memory
	if b.registry, err = testbed.StartRegistry(testbed.RegistryOptions{Dir: memory}); err != nil {
		return nil, err
	}
	if b.link, err = testbed.StartLink(b.registry.Host()); err != nil {
		return nil, err
	}
	if b.client, err = registry.New(registry.Options{Hosts: []registry.Host{{Name: b.link.Host(), PlainHTTP: true}}}); err != nil {
		return nil, err
	}
	if b.keys, err = trust.CreateKeyring(filepath.Join(b.dir, "keys")); err != nil {
		return nil, err
	}
	b.keysFile = filepath.Join(b.dir, "keys.pem")
	if err := os.WriteFile(b.keysFile, b.keys.Export(), 0o600); err != nil {
		return nil, err
	}
	return b, nil
}

func (b *bed) close() error {
	var errs []error
	if b.client != nil {
		b.client.Close()
	}
	if b.link != nil {
		errs = append(errs, b.link.Close())
	}
	if b.registry != nil {
		errs = append(errs, b.registry.Close())
	}
	if b.mounted != "" {
		errs = append(errs, unix.Unmount(b.mounted, 0))
	}
	if b.keep {
		fmt.Fprintln(os.Stderr, "kept:", b.dir)
		return errors.Join(errs...)
	}
	return errors.Join(append(errs, os.RemoveAll(b.dir))...)
}

// repository of one of an image's forms, and its reference, as clients name them.
func (b *bed) repository(image string, f form) string {
	if _, with, ok := strings.Cut(string(f), "+"); ok {
		image += "-" + with
	}
	return b.link.Host() + "/bench/" + image
}

func (b *bed) reference(image string, f form) string {
	tag := f
	if f.ofAccel() { // that is the point of it
		tag = plainForm
	}
	return b.repository(image, f) + ":" + string(tag)
}

// publish pushes an image in all the forms that variants need.
func (b *bed) publish(ctx context.Context, s startable, variants []variant) error {
	b.link.Shape(testbed.LinkSpeed{})
	needed := map[form]bool{}
	for _, v := range variants {
		needed[v.form] = true
	}
	src, err := s.source(ctx)
	if err != nil {
		return err
	}
	// Recording needs the plain form in the registry, as accel's conversion does.
	if err := b.push(ctx, src, b.reference(s.name, plainForm)); err != nil {
		return err
	}
	if needed[accelForm] || needed[predictedForm] || needed[recordedForm] || needed[rangesForm] {
		fmt.Fprintf(os.Stderr, "%s: converting by accel\n", s.name)
		if err := b.accelerate(ctx, src, s, needed); err != nil {
			return err
		}
	}
	if !needed[stockForm] && !needed[optimisedForm] {
		return nil
	}
	stock, err := stockImage(ctx, s.name, src)
	if err != nil {
		return err
	}
	if err := b.push(ctx, stock, b.reference(s.name, stockForm)); err != nil || !needed[optimisedForm] {
		return err
	}
	optimised, err := b.optimisedImage(ctx, s, src, stock)
	if err != nil {
		return err
	}
	if err := b.push(ctx, optimised, b.reference(s.name, optimisedForm)); err != nil {
		return err
	}
	hot, err := measureHot(optimised)
	hot.Image = s.name
	b.hot = append(b.hot, hot)
	return err
}

func (b *bed) push(ctx context.Context, img v1.Image, reference string) error {
	ref, err := name.ParseReference(reference, name.Insecure)
	if err != nil {
		return err
	}
	return remote.Write(ref, img, remote.WithContext(ctx))
}

// accelerate does what accel's worker does, with the profiles that are needed.
func (b *bed) accelerate(ctx context.Context, src v1.Image, s startable, needed map[form]bool) (err error) {
	c := &convert.Converter{TempDir: b.dir}
	res, err := c.Convert(ctx, convert.Source{Image: src, Repository: b.repository(s.name, accelForm)}, convert.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, res.Close()) }()
	if err := b.pushConverted(ctx, res, s.name, accelForm); err != nil {
		return err
	}
	manifest := res.Mappings[0].SourceManifest
	recorded := sync.OnceValues(func() (accel.Profile, error) { return b.recordedProfile(ctx, s, manifest) })
	var profiles []accel.Profile // the predicted one first
	for _, with := range []struct {
		form    form
		bundled bool
		make    func() (accel.Profile, error)
	}{
		{predictedForm, true, func() (accel.Profile, error) { return predictedProfile(ctx, manifest, res.Image) }},
		{recordedForm, true, recorded},
		{rangesForm, false, recorded},
	} {
		f := with.form
		if !needed[f] {
			continue
		}
		p, err := with.make()
		if err != nil {
			return fmt.Errorf("profile for %s: %w", f, err)
		}
		fmt.Fprintf(os.Stderr, "%s: %s profile of %d items, %.1f MB\n", s.name, p.Origin, len(p.Items), float64(p.Bytes())/megabyte)
		profiles = append(profiles, p)
		if err := b.push(ctx, src, b.reference(s.name, f)); err != nil {
			return err
		}
		if err := b.pushConverted(ctx, res, s.name, f); err != nil {
			return err
		}
		if err := b.attachProfile(ctx, b.repository(s.name, f), p, res.Mappings[0].Layers, with.bundled); err != nil {
			return err
		}
	}
	if needed[predictedForm] && len(profiles) > 1 {
		b.foretold = append(b.foretold, foretold{s.name, profile.Coverage(profiles[1], profiles[0])})
	}
	return nil
}

// pushConverted pushes a conversion beside its source, and attaches the signed mapping to that.
func (b *bed) pushConverted(ctx context.Context, res *convert.Result, image string, f form) error {
	repository := b.repository(image, f)
	if err := b.client.PushImage(ctx, repository, res.Image); err != nil {
		return err
	}
	if err := b.push(ctx, res.Image, b.reference(image, f)+convertedSuffix); err != nil {
		return err
	}
	for _, m := range res.Mappings {
		m.TargetRepository = repository
		envelope, err := b.keys.Sign(ctx, m)
		if err != nil {
			return err
		}
		subject, err := b.client.Head(ctx, repository, m.SourceManifest.String())
		if err != nil {
			return err
		}
		subject = v1.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size}
		if _, err := b.client.Attach(ctx, repository, subject, accel.MediaTypeMapping, map[string]string{accel.AnnotationMapping: string(envelope)}); err != nil {
			return err
		}
	}
	return nil
}
