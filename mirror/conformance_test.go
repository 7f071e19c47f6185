package mirror_test

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"accel/mirror"
)

// suite runs the OCI distribution conformance suite (a tool of this module) against a
// registry, and returns the names of the tests that failed.
func suite(t *testing.T, url string, env ...string) (failed []string) {
	t.Helper()
	dir := t.TempDir()
	bin := filepath.Join(dir, "conformance")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", bin, "github.com/opencontainers/distribution-spec/conformance").CombinedOutput(); err != nil {
		t.Fatalf("build the suite: %v\n%s", err, out)
	}
	cmd := exec.CommandContext(t.Context(), bin)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), append([]string{
		"OCI_REGISTRY=" + strings.TrimPrefix(url, "http://"), "OCI_TLS=disabled", "OCI_RESULTS_DIR=" + dir,
		"OCI_REPO1=public/one", "OCI_REPO2=public/two",
	}, env...)...)
	var report bytes.Buffer
	cmd.Stdout, cmd.Stderr = &report, &report
	// Its exit status says nothing in read-only mode: this version crashes when it has
	// printed the report and is about to write it as YAML. The report itself counts.
	runErr := cmd.Run()
	if ctxErr := t.Context().Err(); ctxErr != nil {
		t.Fatal(ctxErr)
	}
	count := func(outcome string) int {
		m := regexp.MustCompile(`(?m)^\s*` + outcome + `\.+:\s+(\d+)$`).FindStringSubmatch(report.String())
		if m == nil {
			t.Fatalf("no report (%v):\n%s", runErr, report.String())
		}
		n, err := strconv.Atoi(m[1])
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	t.Logf("%d passed, %d failed, %d skipped, %d disabled", count("Pass"), count("FAIL"), count("Skip"), count("Disabled"))
	if count("Error") > 0 || count("Pass") == 0 {
		t.Errorf("the suite itself failed:\n%s", report.String())
	}
	for _, m := range regexp.MustCompile(`(?m)^\s*(OCI Conformance Test\S*/\S+): FAIL$`).FindAllStringSubmatch(report.String(), -1) {
		failed = append(failed, m[1])
	}
	if len(failed) < count("FAIL") {
		t.Errorf("%d failures, only %d of them named:\n%s", count("FAIL"), len(failed), report.String())
	}
	return failed
}

// TestConformance runs the suite's pull part in two ways: read-only against the mirror
// alone; and whole, with all content checked, where what is written goes to the registry
// and what is read comes by way of the mirror. The registry has failures of its own there: the
// mirror is to have no others.
func TestConformance(t *testing.T) {
	up := newUpstream(t)
	img := image(t, 1<<20, 10)
	d := up.push(t, "public/one", img, "v1")
	blob, _ := layer(t, img, 0)
	n := newNode(t, up, own("admin"), func(o *mirror.Options) { o.Default, o.TagTTL = up.host, -1 })
	if failed := suite(t, n.url, "OCI_API_PUSH=false", "OCI_API_BLOBS_DELETE=false", "OCI_API_MANIFESTS_DELETE=false", "OCI_API_TAGS_DELETE=false",
		"OCI_RO_DATA_TAGS=v1", "OCI_RO_DATA_MANIFESTS="+d.String(), "OCI_RO_DATA_BLOBS="+blob.String(), "OCI_RO_DATA_REFERRERS="+d.String()); len(failed) > 0 {
		t.Errorf("read-only, these failed: %q", failed)
	}

	// Nothing is deleted: what a node has it serves. sha512 is not supported.
	whole := func(byMirror bool) []string {
		up := newUpstream(t)
		var n *node
		if byMirror {
			n = newNode(t, up, own("admin"), func(o *mirror.Options) { o.Default, o.TagTTL = up.host, -1 })
		}
		token := up.bearer(t, "admin")
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if byMirror && (r.Method == http.MethodGet || r.Method == http.MethodHead) && !strings.Contains(r.URL.Path, "/blobs/uploads/") {
				n.mirror.ServeHTTP(w, r)
				return
			}
			r.Header.Set("Authorization", token)
			up.ServeHTTP(w, r)
		}))
		defer srv.Close()
		return suite(t, srv.URL, "OCI_API_BLOBS_DELETE=false", "OCI_API_MANIFESTS_DELETE=false", "OCI_API_TAGS_DELETE=false", "OCI_DATA_SHA512=false")
	}
	registrys := whole(false)
	for _, name := range whole(true) {
		if !slices.Contains(registrys, name) {
			t.Errorf("by way of the mirror, and not at the registry itself, %s fails", name)
		}
	}
}
