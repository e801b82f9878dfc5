package upstream

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
)

// Summary is what came of a run, held against the ledger.
type Summary struct {
	Mode     string   // of kube-proxy
	Executed []Result // passed or failed
	Failed   []Result // of these
	Idle     []Result // skipped themselves, though the ledger runs them
	Missing  []string // were to run and never finished
	Skipped  map[string][]string
	// floor is how many had to be executed; 0 when only a part was asked for.
	floor int
}

// Summarize compares results with what was to run in a mode. A part (names are
// not all that the ledger runs) is not held to the floor.
func (l *Ledger) Summarize(mode string, names []string, results []Result) *Summary {
	s := &Summary{Mode: mode, Skipped: map[string][]string{}}
	finished := map[string]bool{}
	for _, r := range results {
		finished[r.Name] = true
		switch {
		case r.State == "skipped":
			s.Idle = append(s.Idle, r)
			continue
		case !r.Passed():
			s.Failed = append(s.Failed, r)
		}
		s.Executed = append(s.Executed, r)
	}
	for _, name := range names {
		if !finished[name] {
			s.Missing = append(s.Missing, name)
		}
	}
	whole := 0
	for _, spec := range l.Specs {
		ok, why := spec.Runs(mode)
		if ok {
			whole++
		} else {
			s.Skipped[why] = append(s.Skipped[why], spec.Name)
		}
	}
	if len(names) == whole {
		s.floor = l.Floor[mode]
	}
	return s
}

// Err returns what is wrong with the run, or nil.
func (s *Summary) Err() error {
	var errs []error
	for _, r := range s.Failed {
		errs = append(errs, fmt.Errorf("%s: %s: %s", r.State, r.Name, firstLines(r.Message, 12)))
	}
	for _, r := range s.Idle {
		errs = append(errs, fmt.Errorf("skipped itself: %s: %s; give the cluster what it needs, or list it under skip with the reason", r.Name, firstLines(r.Message, 2)))
	}
	for _, name := range s.Missing {
		errs = append(errs, fmt.Errorf("never finished: %s", name))
	}
	if n := len(s.Executed); n < s.floor {
		errs = append(errs, fmt.Errorf("%d specs were executed, the ledger's floor is %d: it may not fall", n, s.floor))
	}
	return errors.Join(errs...)
}

// label is a bracketed word of a spec's name that says what kind it is, not what
// it shows.
var label = regexp.MustCompile(` ?\[[^]]*\]`)

// area returns the part of the network that a spec is about: the first words of
// its name, up to what it says of them.
func area(name string) string {
	if strings.Contains(name, "[Feature:IPv6DualStack]") {
		return "IPv6DualStack"
	}
	words := strings.Fields(label.ReplaceAllString(name, ""))
	for i, w := range words {
		if w == "should" || w == "Should" || w == "validates" || w == "A" || w == "version" || strings.HasSuffix(w, ":") {
			words = words[:max(i, 1)]
			break
		}
	}
	return strings.Join(words[:min(len(words), 2)], " ")
}

// Write prints the table: areas with their counts, what failed, and what was
// skipped with the reasons.
func (s *Summary) Write(w io.Writer) {
	type row struct{ passed, failed, skipped, conformance int }
	rows := map[string]*row{}
	at := func(name string) *row {
		a := area(name)
		if rows[a] == nil {
			rows[a] = &row{}
		}
		return rows[a]
	}
	var all row
	for _, r := range s.Executed {
		n := 0
		if strings.Contains(r.Name, "[Conformance]") {
			n = 1
		}
		if r.Passed() {
			at(r.Name).passed++
			at(r.Name).conformance += n
			all.passed++
			all.conformance += n
		} else {
			at(r.Name).failed++
			all.failed++
		}
	}
	for _, names := range s.Skipped {
		for _, name := range names {
			at(name).skipped++
			all.skipped++
		}
	}
	for _, r := range s.Idle {
		at(r.Name).skipped++
		all.skipped++
	}
	areas := make([]string, 0, len(rows))
	for a := range rows {
		areas = append(areas, a)
	}
	slices.Sort(areas)
	fmt.Fprintf(w, "upstream's network specs, kube-proxy in %s mode\n\n", s.Mode)
	line := func(name string, r row) {
		fmt.Fprintf(w, "  %-28s %6d %6d %7d %11d\n", name, r.passed, r.failed, r.skipped, r.conformance)
	}
	fmt.Fprintf(w, "  %-28s %6s %6s %7s %11s\n", "", "PASSED", "FAILED", "SKIPPED", "CONFORMANCE")
	for _, a := range areas {
		line(a, *rows[a])
	}
	line("all", all)

	if bad := slices.Concat(s.Failed, s.Idle); len(bad) > 0 || len(s.Missing) > 0 {
		fmt.Fprintf(w, "\nnot passed:\n")
		for _, r := range bad {
			fmt.Fprintf(w, "  %-8s %s\n", r.State, r.Name)
		}
		for _, name := range s.Missing {
			fmt.Fprintf(w, "  %-8s %s\n", "missing", name)
		}
	}
	fmt.Fprintf(w, "\nskipped, and why:\n")
	reasons := make([]string, 0, len(s.Skipped))
	for why := range s.Skipped {
		reasons = append(reasons, why)
	}
	slices.SortFunc(reasons, func(a, b string) int {
		return cmp.Or(-cmp.Compare(len(s.Skipped[a]), len(s.Skipped[b])), cmp.Compare(a, b))
	})
	for _, why := range reasons {
		fmt.Fprintf(w, "  %3d  %s\n", len(s.Skipped[why]), why)
	}
}

func firstLines(s string, n int) string {
	lines := strings.SplitN(strings.TrimSpace(s), "\n", n+1)
	if len(lines) > n {
		lines[n] = "…"
	}
	return strings.Join(lines, "\n")
}
