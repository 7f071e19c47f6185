package install

import (
	"strings"
	"testing"
)

func TestContainerdsConfiguration(t *testing.T) {
	const (
		cri2 = "[plugins.\"io.containerd.grpc.v1.cri\".registry]\n"
		cri3 = "[plugins.'io.containerd.cri.v1.images'.registry]\n"
		dir  = DefaultConfigDir
	)
	for name, c := range map[string]struct {
		text, version string
		says, mend    string // both empty: nothing is wrong
	}{
		"1.6, right":             {"version = 2\n" + cri2 + "config_path = '/etc/containerd/certs.d'\n", "1.6.20", "", ""},
		"1.6, a list":            {"version = 2\n" + cri2 + "config_path = '/x:/etc/containerd/certs.d/'\n", "1.6.20", "", ""},
		"1.6, nothing":           {"version = 2\n", "1.6.20", "not told", "io.containerd.grpc.v1.cri"},
		"1.6, mirrors":           {"version = 2\n" + "[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"docker.io\"]\nendpoint = ['https://m.test']\n", "1.6.20", "mirrors", "config_path"},
		"1.7, format 1":          {"[plugins.cri.registry]\nconfig_path = '/etc/containerd/certs.d'\n", "1.7.1", "", ""},
		"2.x, right":             {"version = 3\n" + cri3 + "config_path = '/etc/containerd/certs.d'\n", "2.4.2", "", ""},
		"2.x, format 2":          {"version = 2\n" + cri2 + "config_path = '/etc/containerd/certs.d'\n", "2.4.2", "", ""},
		"2.x, format 2, a list":  {"version = 2\n" + cri2 + "config_path = '/etc/containerd/certs.d:/x'\n", "2.4.2", "list", "io.containerd.grpc.v1.cri"},
		"2.x, its default list":  {"version = 3\n" + cri3 + "config_path = '/etc/containerd/certs.d:/etc/docker/certs.d'\n", "2.4.2", "list", "io.containerd.cri.v1.images"},
		"2.x, list, local pulls": {"version = 3\n[plugins.'io.containerd.cri.v1.images']\nuse_local_image_pull = true\n" + cri3 + "config_path = '/etc/containerd/certs.d:/etc/docker/certs.d'\n", "2.4.2", "", ""},
		"2.x, elsewhere":         {"version = 3\n" + cri3 + "config_path = '/srv/certs'\n", "2.4.2", "/srv/certs", "--containerd-config-dir"},
		"2.x, no file":           {"", "2.4.2", "not told", "version = 3"},
		"1.7, no file":           {"", "1.7.1", "not told", "version = 2"},
		"2.x, imported":          {"version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n", "2.4.2", "", ""},
		"2.x, imported relative": {"version = 3\nimports = ['conf.d/*.toml', 'config.toml']\n", "2.4.2", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			if c.text != "" {
				b.write(DefaultContainerdConfig, c.text)
			}
			b.write("/etc/containerd/conf.d/accel.toml", "version = 3\n"+cri3+"config_path = '/etc/containerd/certs.d'\n")
			got, err := ReadContainerd(b.o.Root, DefaultContainerdConfig, c.version)
			if err != nil {
				t.Fatal(err)
			}
			problem, mend := got.Problem(dir)
			if (problem == "") != (c.says == "") || !strings.Contains(problem, c.says) || !strings.Contains(mend, c.mend) {
				t.Errorf("says %q, mend with %q; want %q and %q", problem, mend, c.says, c.mend)
			}
		})
	}
	b := newBed(t)
	b.write(DefaultContainerdConfig, "version = [")
	if _, err := ReadContainerd(b.o.Root, DefaultContainerdConfig, ""); err == nil {
		t.Error("a broken file is no error")
	}
}
