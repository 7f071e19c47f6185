// Package importrule holds the table of docs/design.md that says which of our
// packages may import which.
package importrule

import (
	"os"
	"os/exec"
	"path"
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
	"accel/internal/collectors": {},
	"accel/internal/boltfile":   {"accel/internal/durable"},
	"accel/internal/deflate":    {},
	"accel/internal/durable":    {},
	"accel/internal/unixsocket": {"accel"},
	"accel/convert":             {"accel", "accel/internal/deflate"},
	"accel/registry":            {"accel", "accel/internal/keylock"},
	"accel/trust":               {"accel", "accel/internal/durable"},
	"accel/cache":               {"accel", "accel/internal/collectors", "accel/internal/durable"},
	"accel/snapshot":            {"accel", "accel/internal/collectors", "accel/internal/keylock", "accel/internal/unixsocket"},
	"accel/prefetch":            {"accel", "accel/internal/collectors", "accel/internal/deflate"},
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
	"accel/doctor":              {"accel", "accel/api", "accel/install", "accel/node", "accel/registry", "accel/trust"},
	"accel/cmd/accel":           {"accel", "accel/fleet", "accel/meter", "accel/webhook", "accel/readiness", "accel/readiness/boltstore", "accel/convert", "accel/registry", "accel/trust", "accel/worker", "accel/profile", "accel/profile/ledger", "accel/api", "accel/cache", "accel/lazyfs", "accel/lazy", "accel/node", "accel/install", "accel/doctor"},
	"accel/internal/e2e":        {},
	"accel/internal/testbed":    {},
	"accel/bench/report":        {},
	"accel/bench/convert":       {"accel/convert", "accel/bench/report", "accel/internal/debimage"},
	"accel/bench/node":          {"accel", "accel/cache", "accel/bench/report", "accel/internal/testbed"},
	"accel/bench/start":         {"accel", "accel/bundle", "accel/convert", "accel/profile", "accel/profile/artifact", "accel/registry", "accel/trust", "accel/bench/report", "accel/internal/debimage", "accel/internal/testbed", "accel/node"},
	"accel/bench/serve":         {"accel", "accel/readiness", "accel/readiness/boltstore", "accel/convert", "accel/api", "accel/bench/report", "accel/internal/debimage"},
}

// ofTable is a row of the table in docs/design.md.
type ofTable struct{ job, imports string }

// readTable reads the rows by import paths.
func readTable(t *testing.T) map[string]ofTable {
	t.Helper()
	raw, err := os.ReadFile("../../docs/design.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, found := strings.Cut(string(raw), "| package | its one job | may import |\n|---|---|---|\n")
	if !found {
		t.Fatal("docs/design.md has no table of packages")
	}
	rows := map[string]ofTable{}
	for line := range strings.Lines(table) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		if len(cells) != 3 {
			break
		}
		name := full(strings.TrimSpace(cells[0]))
		if _, twice := rows[name]; twice {
			t.Errorf("docs/design.md has %s twice", name)
		}
		rows[name] = ofTable{strings.TrimSpace(cells[1]), strings.TrimSpace(cells[2])}
	}
	return rows
}

// full is a package's import path, of its name in docs/design.md.
func full(name string) string {
	if name == "accel" || name == "accel (root)" {
		return "accel"
	}
	return "accel/" + name
}

// TestDesign: docs/design.md says the same. Its table leaves out which internal packages the others import.
func TestDesign(t *testing.T) {
	rows := readTable(t)
	for pkg, row := range rows {
		if row.imports == "all" || row.imports == "tests only" {
			continue
		}
		allowed, known := may[pkg]
		if !known {
			t.Errorf("docs/design.md has %s, which is not in this table", pkg)
			continue
		}
		if !strings.HasPrefix(pkg, "accel/internal/") {
			allowed = slices.DeleteFunc(slices.Clone(allowed), func(i string) bool { return strings.HasPrefix(i, "accel/internal/") })
		}
		var said []string
		for _, name := range strings.Split(row.imports, ", ") {
			if name != "nothing of ours" {
				said = append(said, full(name))
			}
		}
		if slices.Sort(said); !slices.Equal(said, slices.Sorted(slices.Values(allowed))) {
			t.Errorf("docs/design.md lets %s import %v, this table %v", pkg, said, allowed)
		}
	}
	for pkg := range may {
		above := path.Dir(pkg)
		if _, told := rows[pkg]; !told && above != "accel/bench" && !strings.Contains(rows[above].job, path.Base(pkg)+"/") {
			t.Errorf("docs/design.md does not tell of %s", pkg)
		}
	}
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
