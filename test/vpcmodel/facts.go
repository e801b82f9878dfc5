package vpcmodel

import (
	_ "embed"
	"fmt"
	"slices"
	"strings"
)

//go:embed facts.txt
var factsText string

// Fact is one sentence of the facts on a VPC's dataplane, in words of our own,
// with what holds it: a script with the verdicts that follow from it, tests that
// stand elsewhere, or the reason why there is none.
type Fact struct {
	Section  string // "3.1"
	Name     string // of the subtest that runs Script
	Sentence string
	Base     Script   // what Script begins with
	Script   Script   // after Base; nil if nothing can be sent
	Tests    []string // "package.TestName" elsewhere in the module
	Unheld   string   // why no packet can show it
	NotYet   string   // what lacks

	ipv6 bool
}

// Facts reads facts.txt. Its first part is the base: the statements that each
// script begins with. What stands after "--- ipv6" is that of facts on IPv6.
//
//	=== 3.1 name
//	> the sentence
//	! ipv6
//	! test internal/vpcd/api.TestName
//	! unheld the reason
//	! not yet what lacks
//	a statement
func Facts() (base Script, facts []Fact, err error) {
	parts := strings.Split(factsText, "\n=== ")
	first, second, _ := strings.Cut(parts[0], "\n--- ipv6\n")
	if base, err = Parse(first); err != nil {
		return nil, nil, fmt.Errorf("base of facts.txt: %w", err)
	}
	base6, err := Parse(second)
	if err != nil {
		return nil, nil, fmt.Errorf("base of facts.txt for IPv6: %w", err)
	}
	for _, part := range parts[1:] {
		f, err := parseFact(part)
		if err != nil {
			return nil, nil, err
		}
		if f.Base = base; f.ipv6 {
			f.Base = base6
		}
		if slices.ContainsFunc(facts, func(g Fact) bool { return g.Name == f.Name }) {
			return nil, nil, fmt.Errorf("fact %s is there twice", f.Name)
		}
		facts = append(facts, f)
	}
	return base, facts, nil
}

func parseFact(part string) (f Fact, err error) {
	head, rest, _ := strings.Cut(part, "\n")
	if _, err := fmt.Sscanf(head, "%s %s", &f.Section, &f.Name); err != nil {
		return f, fmt.Errorf("head of a fact, %q: %w", head, err)
	}
	var script, sentence []string
	for _, line := range strings.Split(rest, "\n") {
		switch {
		case strings.HasPrefix(line, "> "):
			sentence = append(sentence, line[2:])
		case strings.HasPrefix(line, "! test "):
			f.Tests = append(f.Tests, line[len("! test "):])
		case strings.HasPrefix(line, "! unheld "):
			f.Unheld = line[len("! unheld "):]
		case strings.HasPrefix(line, "! not yet "):
			f.NotYet = line[len("! not yet "):]
		case line == "! ipv6":
			f.ipv6 = true
		default:
			script = append(script, line)
		}
	}
	f.Sentence = strings.Join(sentence, " ")
	if f.Script, err = Parse(strings.Join(script, "\n")); err != nil {
		return f, fmt.Errorf("fact %s: %w", f.Name, err)
	}
	if f.Sentence == "" || f.Script == nil && f.Tests == nil && f.Unheld == "" && f.NotYet == "" {
		return f, fmt.Errorf("fact %s says nothing, or nothing about what holds it", f.Name)
	}
	return f, nil
}

// Fits reports whether a verdict is the one that a Send wants: the same words, as
// far as it names them.
func (v Verdict) Fits(want string) bool {
	return want != "" && strings.HasPrefix(v.String()+" ", want+" ")
}
