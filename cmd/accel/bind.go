package main

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
)

// maxConfigBytes bounds a configuration file.
const maxConfigBytes = 1 << 20

// key is one leaf of config: a dotted path with its place in the struct.
type key struct {
	path string // "policy.max_uncompressed_size"
	doc  string
	at   []int
}

func (k key) flag() string { return strings.NewReplacer(".", "-", "_", "-").Replace(k.path) }
func (k key) env() string {
	return "ACCEL_" + strings.ToUpper(strings.ReplaceAll(k.path, ".", "_"))
}
func (k key) field(c *config) reflect.Value { return reflect.ValueOf(c).Elem().FieldByIndex(k.at) }

// keys lists the leaves of config in order. A list of structs is one leaf.
func keys() []key {
	var all []key
	var walk func(t reflect.Type, prefix string, at []int)
	walk = func(t reflect.Type, prefix string, at []int) {
		for f := range t.Fields() {
			k := key{path: prefix + f.Tag.Get("yaml"), doc: f.Tag.Get("doc"), at: append(append([]int(nil), at...), f.Index...)}
			if f.Type.Kind() == reflect.Struct {
				walk(f.Type, k.path+".", k.at)
				continue
			}
			all = append(all, k)
		}
	}
	walk(reflect.TypeFor[config](), "", nil)
	return all
}

// set gives a key the value that text says: strings, durations and sizes as they
// are, everything else as YAML.
func (k key) set(c *config, text string) error {
	v := k.field(c)
	switch p := v.Addr().Interface().(type) {
	case *string:
		*p = text
		return nil
	case *time.Duration:
		d, err := time.ParseDuration(text)
		if err != nil {
			return fmt.Errorf("%q: want a duration such as 30s", text)
		}
		*p = d
		return nil
	case encoding.TextUnmarshaler:
		return p.UnmarshalText([]byte(text))
	default:
		v.SetZero()
		return strictYAML([]byte(text), p)
	}
}

// strictYAML refuses keys that the destination does not have; its errors name
// key and line.
func strictYAML(text []byte, into any) error {
	d := yaml.NewDecoder(bytes.NewReader(text))
	d.KnownFields(true)
	if err := d.Decode(into); err != nil && !errors.Is(err, io.EOF) {
		return cleanYAMLError(err)
	}
	if err := d.Decode(new(any)); !errors.Is(err, io.EOF) {
		return errors.New("want one YAML document")
	}
	return nil
}

// cleanYAMLError says "unknown key" where the library speaks of Go types.
func cleanYAMLError(err error) error {
	var te *yaml.TypeError
	if !errors.As(err, &te) {
		return err
	}
	var words []string
	for _, e := range te.Errors {
		if before, _, ok := strings.Cut(e, " not found in type "); ok {
			e = strings.Replace(before, "field ", "unknown key ", 1)
		}
		words = append(words, e)
	}
	return errors.New(strings.Join(words, "; "))
}

// configFlags collects what the command line says until load applies it.
type configFlags struct {
	file string
	set  map[string]string
}

// bindConfig adds a flag for every key.
func bindConfig(fs *pflag.FlagSet) *configFlags {
	c := &configFlags{set: map[string]string{}}
	def := defaultConfig()
	for _, k := range keys() {
		fs.Var(&flagValue{k, c, k.text(&def)}, k.flag(), k.doc+" ("+k.env()+")")
	}
	fs.StringVar(&c.file, "config", os.Getenv("ACCEL_CONFIG"), "YAML file with the configuration (ACCEL_CONFIG)")
	return c
}

// text is a key's value as set reads it.
func (k key) text(c *config) string {
	v := k.field(c)
	if v.Kind() == reflect.Slice {
		if v.Len() == 0 {
			return ""
		}
		raw, err := yaml.Marshal(v.Interface())
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(raw))
	}
	return fmt.Sprint(v.Interface())
}

type flagValue struct {
	key
	flags   *configFlags
	initial string
}

func (f *flagValue) String() string {
	if f == nil || f.flags == nil {
		return ""
	}
	if v, ok := f.flags.set[f.path]; ok {
		return v
	}
	return f.initial
}

func (f *flagValue) Type() string {
	var c config
	switch f.field(&c).Interface().(type) {
	case string:
		return "text"
	case time.Duration:
		return "duration"
	case size:
		return "size"
	case int:
		return "int"
	default:
		return "yaml"
	}
}

// Set keeps the text: a flag counts more than the file, which is read later.
func (f *flagValue) Set(text string) error {
	var scratch config
	if err := f.set(&scratch, text); err != nil {
		return err
	}
	f.flags.set[f.path] = text
	return nil
}

// load makes the configuration: defaults, then the file, then the environment,
// then flags.
func (c *configFlags) load() (config, error) {
	conf := defaultConfig()
	if c.file != "" {
		if err := loadFile(c.file, &conf); err != nil {
			return conf, err
		}
	}
	for _, k := range keys() {
		if text, ok := os.LookupEnv(k.env()); ok {
			if err := k.set(&conf, text); err != nil {
				return conf, fmt.Errorf("environment variable %s: %w", k.env(), err)
			}
		}
		if text, ok := c.set[k.path]; ok {
			if err := k.set(&conf, text); err != nil {
				return conf, fmt.Errorf("flag --%s: %w", k.flag(), err)
			}
		}
	}
	return conf, nil
}

func loadFile(path string, conf *config) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxConfigBytes+1))
	if err != nil {
		return fmt.Errorf("configuration %s: %w", path, err)
	}
	if len(text) > maxConfigBytes {
		return fmt.Errorf("configuration %s: larger than %d bytes", path, maxConfigBytes)
	}
	if err := strictYAML(text, conf); err != nil {
		return fmt.Errorf("configuration %s: %w", path, err)
	}
	return nil
}

// configDocs is docs/configuration.md; a test keeps the file equal to it.
func configDocs() string {
	var b strings.Builder
	b.WriteString(`# Configuration

` + "`accel serve --config FILE`" + ` reads one YAML file; an unknown key is an error that names it and its line. Every key is
also a flag and an environment variable. A flag counts more than the environment, that more than the file, that more
than the default. Lists are given to flags and variables as YAML, for instance
` + "`--policy-platforms '[linux/amd64]'`" + `. ` + "`accel serve --check-config`" + ` says what is wrong without starting. Sizes: 10GB, 512MiB.
Durations: 30s, 5m, 1h.

This file is made from the program itself (` + "`accel serve --print-config-docs`" + `).

| key | flag | environment | default | meaning |
|---|---|---|---|---|
`)
	def := defaultConfig()
	for _, k := range keys() {
		value := k.text(&def)
		if value != "" {
			value = "`" + value + "`"
		}
		fmt.Fprintf(&b, "| `%s` | `--%s` | `%s` | %s | %s |\n", k.path, k.flag(), k.env(), value, k.doc)
	}
	return b.String()
}
