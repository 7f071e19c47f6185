package profile

import (
	"bytes"
	"encoding/json"
	"strings"
)

const maxExportsDepth = 8

// choose is the file that a package.json's "exports" or "imports" gives for a name; empty
// where it gives none.
func (n *nodeStart) choose(raw json.RawMessage, key string, required bool) string {
	if !n.p.r.spend(len(raw) / 2) {
		return ""
	}
	keys, values := object(raw)
	if len(keys) == 0 || (!strings.HasPrefix(keys[0], ".") && !strings.HasPrefix(keys[0], "#")) {
		if key != "." {
			return ""
		}
		return conditional(raw, required, 0)
	}
	best, star := "", ""
	for k, name := range keys {
		if name == key {
			return conditional(values[k], required, 0)
		}
		before, after, ok := strings.Cut(name, "*")
		if !ok || len(key) < len(before)+len(after) || !strings.HasPrefix(key, before) || !strings.HasSuffix(key, after) || len(name) <= len(star) {
			continue
		}
		to, part := conditional(values[k], required, 0), key[len(before):len(key)-len(after)]
		if to != "" && len(to)+strings.Count(to, "*")*len(part) <= MaxPathBytes {
			star, best = name, strings.ReplaceAll(to, "*", part)
		}
	}
	return best
}

// conditional takes the first of an object's values whose condition holds, of a list's the
// first that has one.
func conditional(raw json.RawMessage, required bool, depth int) string {
	raw = bytes.TrimSpace(raw)
	if len(raw) == 0 || depth > maxExportsDepth {
		return ""
	}
	switch raw[0] {
	case '"':
		var s string
		if json.Unmarshal(raw, &s) == nil {
			return s
		}
	case '[':
		var list []json.RawMessage
		if json.Unmarshal(raw, &list) == nil {
			for _, one := range list {
				if s := conditional(one, required, depth+1); s != "" {
					return s
				}
			}
		}
	case '{':
		keys, values := object(raw)
		for k, name := range keys {
			switch {
			case name == "node", name == "default", name == "node-addons", name == "module-sync", name == "require" && required, name == "import" && !required:
				if s := conditional(values[k], required, depth+1); s != "" {
					return s
				}
			}
		}
	}
	return ""
}

// object is a JSON object in its own order, which counts here.
func object(raw json.RawMessage) (keys []string, values []json.RawMessage) {
	d := json.NewDecoder(bytes.NewReader(raw))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, nil
	}
	for d.More() {
		t, err := d.Token()
		name, ok := t.(string)
		var v json.RawMessage
		if err != nil || !ok || d.Decode(&v) != nil {
			return nil, nil
		}
		keys, values = append(keys, name), append(values, v)
	}
	return keys, values
}
