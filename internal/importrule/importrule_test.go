// Package importrule holds the table of docs/design.md that says which of our
// packages may import which.
package importrule

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// may lists what each package may import of ours, directly. A package that is
// not here is a mistake in this table.
var may = map[string][]string{
	"accel":                     {},
	"accel/internal/keylock":    {},
	"accel/internal/debimage":   {},
	"accel/internal/importrule": {},
	"accel/internal/killtest":   {},
	"accel/webhook":             {"accel"},
	"accel/readiness":           {"accel"},
	"accel/readiness/boltstore": {"accel", "accel/readiness", "accel/internal/durable"},
	"accel/readiness/storetest": {"accel", "accel/readiness"},
	"accel/internal/boltfile":   {"accel/internal/durable"},
	"accel/internal/deflate":    {},
	"accel/internal/durable":    {},
	"accel/internal/unixsocket": {"accel"},
	"accel/convert":             {"accel", "accel/internal/deflate"},
	"accel/registry":            {"accel", "accel/internal/keylock"},
	"accel/trust":               {"accel", "accel/internal/durable"},
	"accel/cache":               {"accel", "accel/internal/durable"},
	"accel/snapshot":            {"accel", "accel/internal/unixsocket"},
	"accel/prefetch":            {"accel", "accel/internal/deflate"},
	"accel/lazyfs":              {"accel", "accel/internal/keylock"},
	"accel/profile":             {"accel"},
	"accel/bundle":              {"accel"},
	"accel/profile/artifact":    {"accel", "accel/bundle", "accel/profile", "accel/registry"},
	"accel/profile/ledger":      {"accel", "accel/profile", "accel/internal/keylock", "accel/internal/boltfile"},
	"accel/mirror":              {"accel", "accel/cache", "accel/registry", "accel/internal/keylock"},
	"accel/fleet":               {"accel", "accel/internal/boltfile"},
	"accel/worker":              {"accel", "accel/bundle", "accel/readiness", "accel/convert", "accel/registry", "accel/trust", "accel/profile", "accel/profile/artifact", "accel/profile/ledger", "accel/internal/keylock"},
	"accel/api":                 {"accel", "accel/fleet", "accel/meter", "accel/webhook", "accel/readiness", "accel/trust", "accel/profile", "accel/profile/ledger"},
	"accel/install":             {"accel", "accel/internal/durable"},
	"accel/meter":               {"accel", "accel/internal/boltfile"},
	"accel/lazy":                {"accel", "accel/api", "accel/bundle", "accel/cache", "accel/internal/deflate", "accel/internal/keylock", "accel/lazyfs", "accel/prefetch", "accel/profile", "accel/profile/artifact", "accel/registry", "accel/snapshot", "accel/trust", "accel/internal/durable"},
	"accel/node":                {"accel", "accel/cache", "accel/mirror", "accel/meter", "accel/registry", "accel/api", "accel/lazy", "accel/snapshot", "accel/internal/durable", "accel/internal/unixsocket"},
	"accel/doctor":              {"accel", "accel/api", "accel/install", "accel/node", "accel/registry"},
	"accel/cmd/accel":           {"accel", "accel/fleet", "accel/meter", "accel/webhook", "accel/readiness", "accel/readiness/boltstore", "accel/convert", "accel/registry", "accel/trust", "accel/worker", "accel/profile", "accel/profile/ledger", "accel/api", "accel/cache", "accel/lazyfs", "accel/lazy", "accel/node", "accel/install", "accel/doctor"},
	"accel/internal/e2e":        {},
	"accel/internal/testbed":    {},
	"accel/bench/report":        {},
	"accel/bench/convert":       {"accel/convert", "accel/bench/report", "accel/internal/debimage"},
	"accel/bench/node":          {"accel", "accel/cache", "accel/bench/report", "accel/internal/testbed"},
	"accel/bench/start":         {"accel", "accel/bundle", "accel/convert", "accel/profile", "accel/profile/artifact", "accel/registry", "accel/trust", "accel/bench/report", "accel/internal/debimage", "accel/internal/testbed", "accel/node"},
	"accel/bench/serve":         {"accel", "accel/readiness", "accel/readiness/boltstore", "accel/convert", "accel/api", "accel/bench/report", "accel/internal/debimage"},
}

func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", `{{.ImportPath}}:{{join .Imports " "}}`, "accel/...").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		pkg, imports, _ := strings.Cut(strings.TrimSpace(line), ":")
		allowed, known := may[pkg]
		if !known {
			t.Errorf("%s is not in the table: say what it may import, here and in docs/design.md", pkg)
			continue
		}
		for _, i := range strings.Fields(imports) {
			if (i == "accel" || strings.HasPrefix(i, "accel/")) && !slices.Contains(allowed, i) {
				t.Errorf("%s imports %s, which docs/design.md does not allow", pkg, i)
			}
		}
	}
}
