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

// key is one leaf of a configuration: a dotted path with its place in the struct.
type key struct {
	path   string // "policy.max_uncompressed_size"
	doc    string
	prefix string // of the environment variable
	kind   reflect.Type
	at     []int
}

func (k key) flag() string { return strings.NewReplacer(".", "-", "_", "-").Replace(k.path) }
func (k key) env() string {
	return k.prefix + strings.ToUpper(strings.ReplaceAll(k.path, ".", "_"))
}

// field is the key's place in a configuration, which conf points to.
func (k key) field(conf any) reflect.Value { return reflect.ValueOf(conf).Elem().FieldByIndex(k.at) }

// keysOf lists the leaves of a configuration in order. A list of structs is one leaf.
func keysOf(conf reflect.Type, prefix string) []key {
	var all []key
	var walk func(t reflect.Type, under string, at []int)
	walk = func(t reflect.Type, under string, at []int) {
		for f := range t.Fields() {
			k := key{path: under + f.Tag.Get("yaml"), doc: f.Tag.Get("doc"), prefix: prefix, kind: f.Type, at: append(append([]int(nil), at...), f.Index...)}
			if f.Type.Kind() == reflect.Struct {
				walk(f.Type, k.path+".", k.at)
				continue
			}
			all = append(all, k)
		}
	}
	walk(conf, "", nil)
	return all
}

// keys lists the leaves of the service's configuration.
func keys() []key { return keysOf(reflect.TypeFor[config](), "ACCEL_") }

// set gives a key the value that text says: strings, durations and sizes as they
// are, everything else as YAML.
func (k key) set(conf any, text string) error {
	v := k.field(conf)
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

// configFlags collects what the command line says of a configuration C until load
// applies it.
type configFlags[C any] struct {
	keys     []key
	defaults func() C
	file     string
	set      map[string]string
}

// bindConfig adds a flag for every key of the service's configuration.
func bindConfig(fs *pflag.FlagSet) *configFlags[config] {
	return bind(fs, keys(), defaultConfig, os.Getenv("ACCEL_CONFIG"), "ACCEL_CONFIG")
}

// bind adds a flag for every key, and --config, which an environment variable stands for too.
func bind[C any](fs *pflag.FlagSet, keys []key, defaults func() C, file, fileEnv string) *configFlags[C] {
	c := &configFlags[C]{keys: keys, defaults: defaults, set: map[string]string{}}
	def := defaults()
	for _, k := range keys {
		fs.Var(&flagValue{k, c.set, k.text(&def)}, k.flag(), k.doc+" ("+k.env()+")")
		if k.kind.Kind() == reflect.Bool {
			fs.Lookup(k.flag()).NoOptDefVal = "true"
		}
	}
	fs.StringVar(&c.file, "config", file, "YAML file with the configuration ("+fileEnv+")")
	return c
}

// text is a key's value as set reads it.
func (k key) text(conf any) string {
	v := k.field(conf)
	if v.Kind() == reflect.Slice || v.Kind() == reflect.Map {
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
	given   map[string]string // the texts of all flags
	initial string
}

func (f *flagValue) String() string {
	if f == nil {
		return ""
	}
	if v, ok := f.given[f.path]; ok {
		return v
	}
	return f.initial
}

func (f *flagValue) Type() string {
	switch reflect.Zero(f.kind).Interface().(type) {
	case string:
		return "text"
	case time.Duration:
		return "duration"
	case size:
		return "size"
	case int:
		return "int"
	case bool:
		return "bool"
	default:
		return "yaml"
	}
}

// Set keeps the text: a flag counts more than the file, which is read later.
func (f *flagValue) Set(text string) error {
	alone := f.key // a value of its own to try the text on
	alone.at = []int{0}
	scratch := reflect.New(reflect.StructOf([]reflect.StructField{{Name: "V", Type: f.kind}}))
	if err := alone.set(scratch.Interface(), text); err != nil {
		return err
	}
	f.given[f.path] = text
	return nil
}

// load makes the configuration: defaults, then the file, then the environment,
// then flags.
func (c *configFlags[C]) load() (C, error) {
	conf := c.defaults()
	if c.file != "" {
		if err := loadFile(c.file, &conf); err != nil {
			return conf, err
		}
	}
	for _, k := range c.keys {
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

func loadFile(path string, conf any) error {
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

`)
	b.WriteString(configTable(keys(), defaultConfig()))
	return b.String()
}

// configTable has a row for each key, as the documents show them.
func configTable[C any](keys []key, def C) string {
	var b strings.Builder
	b.WriteString("| key | flag | environment | default | meaning |\n|---|---|---|---|---|\n")
	for _, k := range keys {
		value := k.text(&def)
		if value != "" {
			value = "`" + value + "`"
		}
		fmt.Fprintf(&b, "| `%s` | `--%s` | `%s` | %s | %s |\n", k.path, k.flag(), k.env(), value, k.doc)
	}
	return b.String()
}
