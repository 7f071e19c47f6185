package main

import (
	"fmt"
	"io"
	"reflect"
	"strings"
)

//go:generate sh -c "go run . serve --print-config-docs > ../../docs/configuration.md"

const docsHead = `# Configuration

<!-- Made from the tags of Config in cmd/accel by "go generate ./cmd/accel". Change them, not this file. -->

` + "`accel serve`" + ` and ` + "`accel up`" + ` read one YAML file (` + "`--config FILE`" + ` or ` + "`ACCEL_CONFIG`" + `), the environment and flags.
A flag counts before the environment, that before the file, that before the default. An unknown key, a
value of the wrong type or a contradiction is an error that names the key and its line:

    accel serve --config accel.yaml --check-config

- Durations are written as ` + "`30s`, `5m`, `1h30m`" + `; sizes as ` + "`10GB` (decimal), `512MiB` (binary) or plain bytes" + `.
- Every key is also a flag (` + "`policy.max_uncompressed_size` is `--policy-max-uncompressed-size`" + `) and an environment
  variable (` + "`ACCEL_POLICY_MAX_UNCOMPRESSED_SIZE`" + `). Lists are given there as YAML text, lists of words also with
  commas: ` + "`--policy-platforms linux/amd64,linux/arm64`, `ACCEL_REGISTRIES='[{host: registry.example}]'`" + `.
- Secrets are best kept in files (` + "`…_file`" + `); the end of the line in such a file does not count.

` + "```yaml" + `
listen: 0.0.0.0:8080
data: /var/lib/accel
tokens:
  - name: platform
    scope: write
    sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
registries:
  - host: registry.example:5000
    username: accel
    password_file: /etc/accel/registry-password
webhooks:
  - kind: harbor
    secret_file: /etc/accel/harbor-secret
policy:
  platforms: [linux/amd64]
  deny: [registry.example:5000/scratch/**]
reconcile:
  repositories: [registry.example:5000/team/*]
` + "```" + `

## Keys

`

const docsTail = `
## Only flags

| flag | environment | meaning |
|---|---|---|
| ` + "`--config`" + ` | ` + "`ACCEL_CONFIG`" + ` | the configuration file |
| ` + "`--check-config`" + ` | | (serve) say what is wrong with the configuration and end: exit code 0 or 2 |
| ` + "`--registry-listen`" + ` | ` + "`ACCEL_REGISTRY_LISTEN`" + ` | (up) address of the embedded registry, default 127.0.0.1:5000 |
| ` + "`--registry-open`" + ` | | (up) let the embedded registry, which asks nobody for a password, listen on another address than loopback |

The verbs that ask a server take ` + "`--server` (`ACCEL_SERVER`), `--token` (`ACCEL_TOKEN`) and `--token-file` (`ACCEL_TOKEN_FILE`)" + `.
Without credentials in ` + "`registries`" + ` they are looked up, again at each 401 and 403, in docker's config.json with its
credential helpers, in podman's auth.json, and in what the environment offers for ghcr.io, Google, Amazon ECR and Azure.
`

// printConfigDocs writes docs/configuration.md.
func printConfigDocs(w io.Writer) error {
	var b strings.Builder
	b.WriteString(docsHead)
	b.WriteString("| key | default | meaning |\n|---|---|---|\n")
	var lists []leaf
	c := defaultConfig()
	top := reflect.TypeOf(*c)
	last := ""
	for _, l := range leaves(c) {
		if section, _, nested := strings.Cut(l.key, "."); nested && section != last {
			last = section
			f, _ := fieldByKey(top, section)
			fmt.Fprintf(&b, "| **%s** | | %s |\n", section, cell(f.Tag.Get("doc")))
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", l.key, quoted(defaultText(l.v)), cell(l.doc)+typeNote(l.v.Type()))
		if l.v.Kind() == reflect.Slice && l.v.Type().Elem().Kind() == reflect.Struct {
			lists = append(lists, l)
		}
	}
	for _, l := range lists {
		fmt.Fprintf(&b, "\n### Each of `%s`\n\n| key | meaning |\n|---|---|\n", l.key)
		itemDocs(&b, l.v.Type().Elem(), "")
	}
	b.WriteString(docsTail)
	_, err := io.WriteString(w, b.String())
	return err
}

func itemDocs(b *strings.Builder, t reflect.Type, prefix string) {
	for i := range t.NumField() {
		f := t.Field(i)
		key := joinKey(prefix, f.Tag.Get("yaml"))
		if f.Type.Kind() == reflect.Struct {
			itemDocs(b, f.Type, key)
			continue
		}
		fmt.Fprintf(b, "| `%s` | %s |\n", key, cell(f.Tag.Get("doc"))+typeNote(f.Type))
	}
}

func fieldByKey(t reflect.Type, key string) (reflect.StructField, bool) {
	for i := range t.NumField() {
		if t.Field(i).Tag.Get("yaml") == key {
			return t.Field(i), true
		}
	}
	return reflect.StructField{}, false
}

// typeNote marks lists, the one type that a default does not show.
func typeNote(t reflect.Type) string {
	if t.Kind() == reflect.Slice {
		return " (list)"
	}
	return ""
}

func quoted(s string) string {
	if s == "" {
		return ""
	}
	return "`" + s + "`"
}

func cell(s string) string { return strings.ReplaceAll(s, "|", `\|`) }
