package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"

	"accel"
	"accel/convert"
	"accel/registry"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/match"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/opencontainers/go-digest"
)

// localClient reaches one registry with the credentials of this machine.
func localClient(plainHTTP bool, host string) (*registry.Client, error) {
	name, _, err := net.SplitHostPort(host)
	if err != nil {
		name = host
	}
	return registry.New(registry.Options{
		Hosts:    []registry.Host{{Name: host, PlainHTTP: plainHTTP || isLoopback(name)}},
		Keychain: registry.DefaultKeychain(),
	})
}

// openSource opens a registry reference, oci:DIR, oci-archive:FILE or
// docker-archive:FILE. temp takes what an archive must be unpacked to.
func openSource(ctx context.Context, from string, plainHTTP bool, temp string) (src convert.Source, closeSource func(), err error) {
	closeSource = func() {}
	kind, path, ok := transportOf(from)
	if !ok {
		return openReference(ctx, from, plainHTTP)
	}
	src.Repository = kind
	switch kind {
	case "docker-archive":
		src.Image, err = tarball.ImageFromPath(path, nil)
	case "oci-archive":
		path, err = unpackLayout(path, filepath.Join(temp, "source"))
		if err != nil {
			return src, closeSource, err
		}
		fallthrough
	case "oci":
		err = openLayout(path, &src)
	}
	return src, closeSource, err
}

// transportOf splits "oci:DIR" and the like; ok is false for a reference.
func transportOf(s string) (kind, path string, ok bool) {
	kind, path, ok = strings.Cut(s, ":")
	switch kind {
	case "oci", "oci-archive", "docker-archive":
		return kind, path, ok
	default:
		return "", "", false
	}
}

func openReference(ctx context.Context, from string, plainHTTP bool) (src convert.Source, closeSource func(), err error) {
	closeSource = func() {}
	ref, err := accel.ParseReference(from)
	if err != nil {
		return src, closeSource, usage(err)
	}
	client, err := localClient(plainHTTP, ref.Registry)
	if err != nil {
		return src, closeSource, err
	}
	closeSource = client.Close
	d := ref.Digest
	if d == "" {
		desc, err := client.Head(ctx, ref.Name(), ref.Tag)
		if err != nil {
			return src, closeSource, err
		}
		d = digest.Digest(desc.Digest.String())
	}
	m, err := client.Pull(ctx, ref.Name(), d)
	if err != nil {
		return src, closeSource, err
	}
	if m.Image == nil && m.Index == nil {
		return src, closeSource, fmt.Errorf("%s is no image: its media type is %q", from, m.Descriptor.MediaType)
	}
	return convert.Source{Repository: ref.Name(), Image: m.Image, Index: m.Index}, closeSource, nil
}

// openLayout takes the one image or index of an OCI layout.
func openLayout(dir string, src *convert.Source) error {
	if err := verifyLayout(dir); err != nil {
		return err
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return err
	}
	m, err := index.IndexManifest()
	if err != nil {
		return err
	}
	if len(m.Manifests) != 1 {
		return fmt.Errorf("%s holds %d images; want exactly one", dir, len(m.Manifests))
	}
	if only := m.Manifests[0]; only.MediaType.IsIndex() {
		src.Index, err = index.ImageIndex(only.Digest)
	} else {
		src.Image, err = index.Image(only.Digest)
	}
	return err
}

// verifyLayout checks every blob against its name, for what reads layouts here
// does not.
func verifyLayout(dir string) error {
	blobs := filepath.Join(dir, "blobs", "sha256")
	entries, err := os.ReadDir(blobs)
	if err != nil {
		return fmt.Errorf("%s is no OCI layout: %w", dir, err)
	}
	for _, e := range entries {
		want := digest.NewDigestFromEncoded(digest.SHA256, e.Name())
		if want.Validate() != nil || !e.Type().IsRegular() {
			continue // no blob: nothing can refer to it
		}
		f, err := os.Open(filepath.Join(blobs, e.Name()))
		if err != nil {
			return err
		}
		got, err := digest.SHA256.FromReader(f)
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
		if got != want {
			return fmt.Errorf("blob %s of %s is damaged: its content has digest %s", want, dir, got)
		}
	}
	return nil
}

// maxArchiveBytes bounds what an OCI archive may unpack to.
const maxArchiveBytes = 100 << 30

// unpackLayout unpacks an OCI archive. Of its names only the layout's own are
// taken; everything else is passed over.
func unpackLayout(file, dir string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o700); err != nil {
		return "", err
	}
	left := int64(maxArchiveBytes)
	for tr := tar.NewReader(f); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return dir, nil
		}
		if err != nil {
			return "", fmt.Errorf("%s is no OCI archive: %w", file, err)
		}
		name, ok := layoutName(h.Name)
		if !ok || h.Typeflag != tar.TypeReg {
			continue
		}
		if left -= h.Size; left < 0 {
			return "", fmt.Errorf("%s unpacks to more than %d bytes", file, int64(maxArchiveBytes))
		}
		if err := writeFile(filepath.Join(dir, name), tr); err != nil {
			return "", err
		}
	}
}

// layoutName maps an entry's name to a file of the layout, built from parts that
// were checked.
func layoutName(name string) (string, bool) {
	name = strings.TrimPrefix(name, "./")
	if name == "index.json" || name == "oci-layout" {
		return name, true
	}
	hex, ok := strings.CutPrefix(name, "blobs/sha256/")
	if !ok || digest.NewDigestFromEncoded(digest.SHA256, hex).Validate() != nil {
		return "", false
	}
	return filepath.Join("blobs", "sha256", hex), true
}

func writeFile(path string, r io.Reader) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}

// destination is where a converted image is written.
type destination interface {
	// write takes exactly one of the two and returns its digest.
	write(ctx context.Context, image v1.Image, index v1.ImageIndex) (digest.Digest, error)
}

func openDestination(to string, plainHTTP bool) (destination, error) {
	if kind, path, ok := transportOf(to); ok {
		if path == "" {
			return nil, usage(fmt.Errorf("%q lacks a path after the colon", to))
		}
		switch kind {
		case "oci":
			return layoutDir(path), nil
		case "oci-archive":
			return layoutArchive(path), nil
		default:
			return nil, usage(fmt.Errorf("%q: a docker-archive cannot carry eStargz layers (its layers are uncompressed); write to oci:DIR or oci-archive:FILE", to))
		}
	}
	ref, err := accel.ParseReference(to)
	if err != nil {
		return nil, usage(err)
	}
	if ref.Digest != "" {
		return nil, usage(fmt.Errorf("%q: the target's digest is not known beforehand; name a tag", to))
	}
	client, err := localClient(plainHTTP, ref.Registry)
	return &remoteImage{ref, client}, err
}

func digestOf(image v1.Image, index v1.ImageIndex) (digest.Digest, error) {
	var h v1.Hash
	var err error
	if index != nil {
		h, err = index.Digest()
	} else {
		h, err = image.Digest()
	}
	return digest.Digest(h.String()), err
}

type remoteImage struct {
	ref    accel.Reference
	client *registry.Client
}

func (r *remoteImage) write(ctx context.Context, image v1.Image, index v1.ImageIndex) (digest.Digest, error) {
	defer r.client.Close()
	d, err := digestOf(image, index)
	if err != nil {
		return d, err
	}
	if index != nil {
		err = r.client.PushIndex(ctx, r.ref.Name(), index)
	} else {
		err = r.client.PushImage(ctx, r.ref.Name(), image)
	}
	if err != nil {
		return d, err
	}
	return d, r.client.Tag(ctx, r.ref.Name(), r.ref.Tag, d)
}

type layoutDir string

func (dir layoutDir) write(_ context.Context, image v1.Image, index v1.ImageIndex) (digest.Digest, error) {
	d, err := digestOf(image, index)
	if err != nil {
		return d, err
	}
	path, err := layout.FromPath(string(dir))
	if err != nil {
		if path, err = layout.Write(string(dir), empty.Index); err != nil {
			return d, err
		}
	}
	// Written again, it replaces itself; other images of the layout stay.
	h, err := v1.NewHash(d.String())
	if err != nil {
		return d, err
	}
	if index != nil {
		return d, path.ReplaceIndex(index, match.Digests(h))
	}
	return d, path.ReplaceImage(image, match.Digests(h))
}

type layoutArchive string

func (file layoutArchive) write(ctx context.Context, image v1.Image, index v1.ImageIndex) (_ digest.Digest, err error) {
	// Beside the target, so that it is on the file system that has to hold it.
	dir, err := os.MkdirTemp(filepath.Dir(string(file)), ".accel-oci-")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	d, err := layoutDir(filepath.Join(dir, "layout")).write(ctx, image, index)
	if err != nil {
		return d, err
	}
	staged := filepath.Join(dir, "archive")
	f, err := os.Create(staged)
	if err != nil {
		return d, err
	}
	tw := tar.NewWriter(f)
	err = tw.AddFS(os.DirFS(filepath.Join(dir, "layout")))
	if err = errors.Join(err, tw.Close(), f.Sync(), f.Close()); err != nil {
		return d, err
	}
	return d, os.Rename(staged, string(file))
}
