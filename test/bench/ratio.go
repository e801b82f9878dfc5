package bench

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"testing"
	"text/tabwriter"
)

// Row is one measured ratio. Names are stable, so that runs can be compared.
type Row struct {
	Name   string  `json:"name"`
	Ratio  float64 `json:"ratio"`  // median of the rounds' ratios
	Low95  float64 `json:"low95"`  // bounds of the median's 95 % interval
	High95 float64 `json:"high95"` //
	N      int     `json:"n"`      // rounds
	Base   string  `json:"base"`   // what the ratio is to, and which way is better
}

// rounds is odd, so that the median is one of the rounds. For 11 rounds the
// second smallest and the second largest bound the median with 98.8 %
// (order statistics of the sign test); the interval claims less than it holds.
const rounds = 11

// Compare measures subject and base in turns (A B A B …, one pair to warm up)
// and returns the row of subject/base. Each function returns its figure for one
// round, larger than 0.
func Compare(b *testing.B, name, base string, subject, floor func() float64) Row {
	b.Helper()
	subject()
	floor()
	ratios := make([]float64, rounds)
	for i := range ratios {
		s, f := subject(), floor()
		if s <= 0 || f <= 0 {
			b.Fatalf("%s: a round measured %g against %g", name, s, f)
		}
		ratios[i] = s / f
	}
	slices.Sort(ratios)
	r := Row{Name: name, Ratio: ratios[rounds/2], Low95: ratios[1], High95: ratios[rounds-2], N: rounds, Base: base}
	b.ReportMetric(r.Ratio, "ratio")
	return r
}

// Write prints the rows and keeps them in file.
func Write(file string, rows []Row) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\nNAME\tRATIO\t95 %\tN\tBASE")
	for _, r := range rows {
		fmt.Fprintf(w, "%s\t%.2f\t%.2f … %.2f\t%d\t%s\n", r.Name, r.Ratio, r.Low95, r.High95, r.N, r.Base)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	out, err := json.MarshalIndent(rows, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(out, '\n'), 0o644)
}
