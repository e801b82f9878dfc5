package upstream

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
)

// Ledger says what is done with each spec.
type Ledger struct {
	Specs []Spec
	// Floor is, by mode of kube-proxy, how many specs must be executed.
	Floor map[string]int
}

// Spec is one spec of upstream's.
type Spec struct {
	Name   string
	Skip   string // why it is not run; "" when it is
	Only   string // the one mode of kube-proxy in which it is run; "" for any
	Reason string // why Only
}

// Runs reports whether the spec is run with kube-proxy in a mode, and if not,
// why.
func (s Spec) Runs(mode string) (bool, string) {
	switch {
	case s.Skip != "":
		return false, s.Skip
	case s.Only != "" && s.Only != mode:
		return false, "with " + s.Only + " only: " + s.Reason
	}
	return true, ""
}

// ReadLedger reads a ledger from its file.
func ReadLedger(path string) (*Ledger, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read the ledger of specs: %w", err)
	}
	defer f.Close()
	l, err := ParseLedger(f)
	if err != nil {
		return nil, fmt.Errorf("read the ledger of specs %s: %w", path, err)
	}
	return l, nil
}

// ParseLedger parses lines of these forms; what is indented is a spec's full
// name and stands under the last heading:
//
//	# a comment
//	floor MODE NUMBER
//	run
//	run with MODE: why in this mode alone
//	skip: why
//	  [sig-network] DNS should provide DNS for the cluster [Conformance]
func ParseLedger(r io.Reader) (*Ledger, error) {
	l := &Ledger{Floor: map[string]int{}}
	var heading *Spec
	line := map[string]int{} // of each name
	s := bufio.NewScanner(r)
	for n := 1; s.Scan(); n++ {
		text := strings.TrimSpace(s.Text())
		if text == "" || strings.HasPrefix(text, "#") {
			continue
		}
		if strings.HasPrefix(s.Text(), " ") || strings.HasPrefix(s.Text(), "\t") {
			if heading == nil {
				return nil, fmt.Errorf("line %d: a spec before the first heading", n)
			}
			if first, ok := line[text]; ok {
				return nil, fmt.Errorf("line %d: %s stands in line %d already", n, text, first)
			}
			line[text] = n
			spec := *heading
			spec.Name = text
			l.Specs = append(l.Specs, spec)
			continue
		}
		h, err := l.heading(text)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		if h != nil {
			heading = h
		}
	}
	if err := s.Err(); err != nil {
		return nil, err
	}
	if len(l.Specs) == 0 {
		return nil, errors.New("it lists no spec")
	}
	return l, nil
}

// heading parses a line that is not indented: a heading, as a Spec without
// name, or a floor, which it keeps.
func (l *Ledger) heading(text string) (*Spec, error) {
	head, reason, _ := strings.Cut(text, ":")
	reason = strings.TrimSpace(reason)
	switch words := strings.Fields(head); {
	case text == "run":
		return &Spec{}, nil
	case head == "skip" && reason != "":
		return &Spec{Skip: reason}, nil
	case len(words) == 3 && words[0] == "run" && words[1] == "with" && reason != "":
		return &Spec{Only: words[2], Reason: reason}, nil
	case len(words) == 3 && words[0] == "floor" && text == head:
		n, err := strconv.Atoi(words[2])
		if err != nil || n < 1 {
			return nil, fmt.Errorf("floor %s: give a number of specs, 1 or more", words[2])
		}
		l.Floor[words[1]] = n
		return nil, nil
	}
	return nil, fmt.Errorf("%q is no heading: write run, run with MODE: WHY, skip: WHY or floor MODE NUMBER", text)
}

// Check compares the ledger with the specs that a test binary has. The error
// names each that is on one side alone, and what to do.
func (l *Ledger) Check(linked []string) error {
	listed := map[string]bool{}
	for _, s := range l.Specs {
		listed[s.Name] = true
	}
	there := map[string]bool{}
	for _, name := range linked {
		there[name] = true
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(there)) {
		if !listed[name] {
			errs = append(errs, fmt.Errorf("neither run nor skipped: %s; upstream added or renamed it: list it, and run it unless there is a reason", name))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(listed)) {
		if !there[name] {
			errs = append(errs, fmt.Errorf("listed and not there: %s; upstream dropped or renamed it: take it out of the ledger", name))
		}
	}
	return errors.Join(errs...)
}

// ToRun returns the names of what is run with kube-proxy in a mode, in the
// ledger's order.
func (l *Ledger) ToRun(mode string) []string {
	var names []string
	for _, s := range l.Specs {
		if ok, _ := s.Runs(mode); ok {
			names = append(names, s.Name)
		}
	}
	return names
}
