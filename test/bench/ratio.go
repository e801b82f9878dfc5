package bench

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math"
	"os"
	"slices"
	"strings"
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

	// Medians of what was measured; 0 where only the ratio means anything.
	Subject float64 `json:"subject,omitempty"`
	Floor   float64 `json:"floor,omitempty"`
	Unit    string  `json:"unit,omitempty"`
}

// turns is how often each pair is measured. It is odd by default, so that the
// median is one of the rounds.
var turns = flag.Int("turns", 11, "`times` that each pair is measured, at least 7 for a figure that is kept; 1 to see whether it works")

var only = flag.String("rows", "", "only rows of BenchmarkNode whose name begins with one of these, by commas (pod-node/tcp1,samenode); a trial")

// chosen tells whether a row is wanted.
func chosen(name string) bool {
	return *only == "" || slices.ContainsFunc(strings.Split(*only, ","), func(want string) bool {
		return strings.HasPrefix(name, want) || strings.HasPrefix(want, name)
	})
}

// Compare measures subject and base in turns (A B A B …, one pair to warm up)
// and returns the row of subject/base. Each function returns its figure for one
// round, larger than 0.
func Compare(b *testing.B, name, base string, subject, floor func() float64) Row {
	b.Helper()
	samples := Interleave(b, 1, []Subject{{"subject of " + name, subject}, {"base of " + name, floor}})
	r := RowOf(name, base, samples[0], samples[1])
	b.ReportMetric(r.Ratio, "ratio")
	return r
}

// Subject is one thing that is measured beside others.
type Subject struct {
	Name    string
	Measure func() float64 // of one round, or a part of it, larger than 0
}

// Interleave measures all subjects in turns, after one round to warm up, and
// returns the figures of each. The figure of a round is the mean of so many parts,
// which are taken in turns as well.
func Interleave(b testing.TB, parts int, subjects []Subject) [][]float64 {
	b.Helper()
	out := make([][]float64, len(subjects))
	for round := -1; round < *turns; round++ {
		measured := make([][]float64, len(subjects))
		for range parts {
			for i, s := range subjects {
				v := s.Measure()
				if v <= 0 || math.IsNaN(v) || math.IsInf(v, 0) {
					b.Fatalf("%s: a round measured %g", s.Name, v)
				}
				measured[i] = append(measured[i], v)
			}
		}
		for i, v := range measured {
			if round >= 0 {
				out[i] = append(out[i], mean(v))
			}
		}
	}
	return out
}

// mean of at least one value.
func mean(v []float64) float64 {
	sum := 0.0
	for _, x := range v {
		sum += x
	}
	return sum / float64(len(v))
}

// RowOf is the row of subject to floor, whose rounds were measured in turns.
func RowOf(name, base string, subject, floor []float64) Row {
	ratios := make([]float64, len(subject))
	for i := range ratios {
		ratios[i] = subject[i] / floor[i]
	}
	slices.Sort(ratios)
	k := medianBound(len(ratios))
	return Row{Name: name, Ratio: Median(ratios), Low95: ratios[k], High95: ratios[len(ratios)-1-k], N: len(ratios), Base: base}
}

// Median of at least one value.
func Median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// medianBound returns the index k of sorted values for which the k-th smallest
// and the k-th largest bound the median with at least 95 % (order statistics of
// the sign test); for less than six values not even the extremes do, and it is
// 0. Of 11 the second ones do, with 98.8 %: the interval claims less than it
// holds.
func medianBound(n int) int {
	tail, choose := 0.0, 1.0 // of 2^n outcomes of the sign test
	for k := 0; ; k++ {
		tail += choose
		if 2*tail > 0.05*math.Pow(2, float64(n)) {
			return max(k-1, 0)
		}
		choose = choose * float64(n-k) / float64(k+1)
	}
}

// Write prints the rows and makes them the file's.
func Write(file string, rows []Row) error {
	if err := Print(rows); err != nil {
		return err
	}
	out, err := json.MarshalIndent(rows, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(out, '\n'), 0o644)
}

// Merge prints the rows and puts them into the file, in the place of those with
// the same names; other rows stay.
func Merge(file string, rows []Row) error {
	var all []Row
	switch raw, err := os.ReadFile(file); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	default:
		if err := json.Unmarshal(raw, &all); err != nil {
			return fmt.Errorf("read the rows in %s: %w; remove it to begin anew", file, err)
		}
	}
	if err := Print(rows); err != nil {
		return err
	}
	for _, r := range rows {
		if i := slices.IndexFunc(all, func(o Row) bool { return o.Name == r.Name }); i >= 0 {
			all[i] = r
		} else {
			all = append(all, r)
		}
	}
	out, err := json.MarshalIndent(all, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(out, '\n'), 0o644)
}

// Print writes rows as a table to standard output.
func Print(rows []Row) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\nNAME\tRATIO\t95 %\tN\tBASE")
	for _, r := range rows {
		fmt.Fprintf(w, "%s\t%.2f\t%.2f … %.2f\t%d\t%s\n", r.Name, r.Ratio, r.Low95, r.High95, r.N, r.Base)
	}
	return w.Flush()
}
