// Package report prints a benchmark's rows as a table and keeps them as JSON
// lines in bench/out/NAME.jsonl.
package report

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"text/tabwriter"
	"time"
)

// Row is one figure.
type Row struct {
	Bench string  `json:"bench"`
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
	Bar   string  `json:"bar,omitempty"`  // what is asked, in words
	Met   *bool   `json:"met,omitempty"`  // nil where there is no bar
	Note  string  `json:"note,omitempty"` // how it was had
	// Missing: there is no figure, and why stands in Note.
	Missing bool      `json:"missing,omitempty"`
	At      time.Time `json:"at"`
}

// Report collects the rows of one benchmark program.
type Report struct {
	bench string
	rows  []Row
}

// New starts a report.
func New(bench string) *Report { return &Report{bench: bench} }

// Add takes in a figure without a bar.
func (r *Report) Add(name string, value float64, unit, note string) {
	r.rows = append(r.rows, Row{Bench: r.bench, Name: name, Value: value, Unit: unit, Note: note, At: time.Now().UTC()})
}

// AtLeast takes in a figure that should reach bar.
func (r *Report) AtLeast(name string, value, bar float64, unit, note string) {
	r.Add(name, value, unit, note)
	r.judge(fmt.Sprintf(">= %g", bar), value >= bar)
}

// AtMost takes in a figure that should not pass bar.
func (r *Report) AtMost(name string, value, bar float64, unit, note string) {
	r.Add(name, value, unit, note)
	r.judge(fmt.Sprintf("<= %g", bar), value <= bar)
}

// Missing takes in a figure that could not be had.
func (r *Report) Missing(name, why string) {
	r.Add(name, 0, "", why)
	r.rows[len(r.rows)-1].Missing = true
}

func (r *Report) judge(bar string, met bool) {
	last := &r.rows[len(r.rows)-1]
	last.Bar, last.Met = bar, &met
}

// Close prints the table and writes the file. It returns an error where a bar
// was missed or a figure is missing, too, so that the command's exit code tells.
func (r *Report) Close() error {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "figure\tvalue\tunit\tbar\tmet\tnote")
	missed, missing := 0, 0
	for _, row := range r.rows {
		if row.Missing {
			missing++
			fmt.Fprintf(w, "%s\tMISSING\t\t\tNO\t%s\n", row.Name, row.Note)
			continue
		}
		met := ""
		if row.Met != nil {
			met = "yes"
			if !*row.Met {
				met = "NO"
				missed++
			}
		}
		fmt.Fprintf(w, "%s\t%.4g\t%s\t%s\t%s\t%s\n", row.Name, row.Value, row.Unit, row.Bar, met, row.Note)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if err := r.write(); err != nil {
		return err
	}
	if missed+missing > 0 {
		return fmt.Errorf("%d of %d figures miss their bar, and %d are MISSING", missed, len(r.rows), missing)
	}
	return nil
}

func (r *Report) write() error {
	path := filepath.Join("bench", "out", r.bench+".jsonl")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	enc := json.NewEncoder(f)
	for _, row := range r.rows {
		if err := enc.Encode(row); err != nil {
			f.Close()
			return err
		}
	}
	return f.Close()
}
