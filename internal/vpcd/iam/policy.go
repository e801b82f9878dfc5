package iam

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// version is the one policy language; the older one, 2008-10-17, differs in
// policy variables alone and is not written any more.
const version = "2012-10-17"

// maxDocument is more than any policy of AWS may have (10,240 characters, IAM
// quotas).
const maxDocument = 64 << 10

// Policy is a policy document.
type Policy struct{ statements []statement }

type statement struct {
	allow              bool
	actions, resources []string // patterns; actions in lower case
}

// Verdict is what a policy says of a call.
type Verdict int

// The verdicts.
const (
	Unmentioned Verdict = iota // nothing allows it
	Allowed
	Denied // explicitly
)

// Judge returns what the policy says of an action ("ec2:CreateTags") on a
// resource (an ARN, or "*" for an action that is on none in particular).
func (p *Policy) Judge(action, resource string) Verdict {
	v := Unmentioned
	for _, s := range p.statements {
		if !slices.ContainsFunc(s.actions, func(a string) bool { return match(a, strings.ToLower(action)) }) ||
			!slices.ContainsFunc(s.resources, func(r string) bool { return match(r, resource) }) {
			continue
		}
		if !s.allow {
			return Denied
		}
		v = Allowed
	}
	return v
}

// Parse reads a document. The error says what of it is wrong or not honoured.
func Parse(b []byte) (*Policy, error) {
	if len(b) > maxDocument {
		return nil, fmt.Errorf("the policy is larger than %d bytes", maxDocument)
	}
	doc, err := object(b, "the policy", "Version", "Id", "Statement")
	if err != nil {
		return nil, err
	}
	var v string
	if err := json.Unmarshal(doc["Version"], &v); err != nil || v != version {
		return nil, fmt.Errorf("the policy's Version must be %q", version)
	}
	raw := doc["Statement"]
	var list []json.RawMessage
	if raw = bytes.TrimSpace(raw); len(raw) > 0 && raw[0] == '{' {
		list = []json.RawMessage{raw} // a single one needs no list
	} else if err := json.Unmarshal(raw, &list); err != nil || len(list) == 0 {
		return nil, errors.New("the policy has no Statement")
	}
	p := &Policy{}
	for i, raw := range list {
		s, err := parseStatement(raw, fmt.Sprintf("statement %d", i+1))
		if err != nil {
			return nil, err
		}
		p.statements = append(p.statements, s)
	}
	return p, nil
}

func parseStatement(raw json.RawMessage, what string) (statement, error) {
	var s statement
	m, err := object(raw, what, "Sid", "Effect", "Action", "Resource")
	if err != nil {
		return s, err
	}
	var effect string
	if err := json.Unmarshal(m["Effect"], &effect); err != nil || effect != "Allow" && effect != "Deny" {
		return s, fmt.Errorf("%s: Effect must be Allow or Deny", what)
	}
	s.allow = effect == "Allow"
	actions, err := words(m["Action"])
	if err != nil {
		return s, fmt.Errorf("%s: Action %w", what, err)
	}
	for _, a := range actions {
		service, name, ok := strings.Cut(a, ":")
		if a != "*" && (!ok || service == "" || name == "" || strings.ContainsAny(service, "*?")) {
			return s, fmt.Errorf("%s: Action %q must be of the form ec2:CreateTags, with * and ? after the colon, or *", what, a)
		}
		s.actions = append(s.actions, strings.ToLower(a))
	}
	if s.resources, err = words(m["Resource"]); err != nil {
		return s, fmt.Errorf("%s: Resource %w", what, err)
	}
	for _, r := range s.resources {
		switch {
		case strings.Contains(r, "${"):
			return s, fmt.Errorf("%s: Resource %q has a policy variable, which vpcd does not honour", what, r)
		case r != "*" && (!strings.HasPrefix(r, "arn:") || strings.Count(r, ":") < 5):
			return s, fmt.Errorf("%s: Resource %q must be an ARN such as arn:aws:ec2:*:*:network-interface/*, or *", what, r)
		}
	}
	return s, nil
}

// object reads a JSON object that has no other names than those known, and none
// twice: of two the last would silently win.
func object(raw []byte, what string, known ...string) (map[string]json.RawMessage, error) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, fmt.Errorf("%s is no JSON object", what)
	}
	m := map[string]json.RawMessage{}
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", what, err)
		}
		name, _ := t.(string) // the decoder lets nothing else stand here
		var v json.RawMessage
		if err := dec.Decode(&v); err != nil {
			return nil, fmt.Errorf("read %s of %s: %w", name, what, err)
		}
		if _, twice := m[name]; twice {
			return nil, fmt.Errorf("%s has %s twice", what, name)
		}
		m[name] = v
	}
	if _, err := dec.Token(); err != nil {
		return nil, fmt.Errorf("read %s: %w", what, err)
	}
	if dec.More() {
		return nil, fmt.Errorf("something follows %s", what)
	}
	for _, name := range slices.Sorted(maps.Keys(m)) {
		if !slices.Contains(known, name) {
			return nil, fmt.Errorf("%s has %s, which vpcd does not honour; there are %s", what, name, strings.Join(known, ", "))
		}
	}
	return m, nil
}

// words reads a string or a list of strings.
func words(raw json.RawMessage) ([]string, error) {
	if raw == nil {
		return nil, errors.New("is missing")
	}
	var one string
	if json.Unmarshal(raw, &one) == nil && one != "" {
		return []string{one}, nil
	}
	var list []string
	if err := json.Unmarshal(raw, &list); err != nil || len(list) == 0 || slices.Contains(list, "") {
		return nil, errors.New("must be a string or a list of strings")
	}
	return list, nil
}

// match reports whether s is of the pattern, in which * stands for any
// characters or none and ? for one. It runs in time len(pattern) × len(s).
func match(pattern, s string) bool {
	p, i, star, mark := 0, 0, -1, 0
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, mark = p, i
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == s[i]):
			p++
			i++
		case star >= 0:
			mark++
			p, i = star+1, mark
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}
