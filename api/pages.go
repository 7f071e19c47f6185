package api

import (
	_ "embed"
	"html/template"
	"net/http"
	"sort"
	"strings"

	"accel"
	"accel/readiness"

	"github.com/danielgtaylor/huma/v2"
)

//go:embed pages.html
var pagesHTML string

var pages = template.Must(template.New("pages").Funcs(template.FuncMap{"lower": strings.ToLower}).Parse(pagesHTML))

// contentPolicy lets a page load nothing from anywhere.
const contentPolicy = "default-src 'none'; style-src 'unsafe-inline'"

func (s *server) page(w http.ResponseWriter, name string, data any) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", contentPolicy)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if err := pages.ExecuteTemplate(w, name, data); err != nil {
		s.Log.Debug("cannot write a page", "page", name, "error", err)
	}
}

type operationView struct {
	Method, Path, Summary, Description, Scope string
	Params                                    []*huma.Param
	Statuses                                  []string
}

type groupView struct {
	Name       string
	Operations []operationView
}

// docsPage shows the OpenAPI document to people.
func (s *server) docsPage(w http.ResponseWriter, _ *http.Request) {
	byTag := map[string][]operationView{}
	var names []string
	for path, item := range s.spec.Paths {
		for method, op := range map[string]*huma.Operation{"GET": item.Get, "POST": item.Post, "DELETE": item.Delete} {
			if op == nil {
				continue
			}
			v := operationView{Method: method, Path: path, Summary: op.Summary, Description: op.Description, Params: op.Parameters}
			if len(op.Security) > 0 {
				v.Scope = op.Security[0]["bearer"][0]
			}
			for status := range op.Responses {
				v.Statuses = append(v.Statuses, status)
			}
			sort.Strings(v.Statuses)
			tag := "Other"
			if len(op.Tags) > 0 {
				tag = op.Tags[0]
			}
			if byTag[tag] == nil {
				names = append(names, tag)
			}
			byTag[tag] = append(byTag[tag], v)
		}
	}
	sort.Strings(names)
	groups := make([]groupView, 0, len(names))
	for _, n := range names {
		ops := byTag[n]
		sort.Slice(ops, func(i, j int) bool { return ops[i].Path+ops[i].Method < ops[j].Path+ops[j].Method })
		groups = append(groups, groupView{n, ops})
	}
	s.page(w, "docs", groups)
}

type countView struct {
	State accel.State
	Count int
}

// homePage shows what is in work. Where tokens are asked for, it tells nothing:
// a browser has none.
func (s *server) homePage(w http.ResponseWriter, r *http.Request) {
	view := struct {
		Open   bool
		Counts []countView
		Images []Image
	}{Open: s.Open}
	if s.Open {
		counts, err := s.Tracker.Counts(r.Context())
		var list readiness.Page
		if err == nil {
			list, err = s.Tracker.List(r.Context(), readiness.Filter{Limit: 50})
		}
		if err != nil {
			s.Log.Error("cannot show the images", "error", err)
			http.Error(w, "internal error", http.StatusInternalServerError)
			return
		}
		for _, st := range accel.States {
			view.Counts = append(view.Counts, countView{st, counts[st].Count})
		}
		for _, rec := range list.Records {
			view.Images = append(view.Images, imageOf(rec))
		}
	}
	s.page(w, "home", view)
}
