package main

import (
	"fmt"
	"html"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// The wire table is a text for people: per action a heading, the flattened
// request parameters, the filters, the bounds of MaxResults, and the response
// as an indented tree of elements.
//
//	## DescribeVpcs
//	request: Filter.N.Name:string; VpcId.N:string; MaxResults:integer
//	filters: cidr, vpc-id
//	MaxResults: min=5 max=1000
//	response <DescribeVpcsResponse …><requestId/>
//	  <vpcSet> list of <item>:
//	    <vpcId>string
//	    <state>string {pending|available}
var (
	paramForm   = regexp.MustCompile(`^([A-Za-z0-9.*]+):([a-z]+)(?:\{([^}]*)\})?(\*?)$`)
	elementForm = regexp.MustCompile(`^( +)<([A-Za-z0-9]+)>(?:list of <([a-z]+)>)?:?([a-z]*)(?: ?\{([^}]*)\})?$`)
	boundsForm  = regexp.MustCompile(`^MaxResults: min=(\d+|None) max=(\d+|None)$`)
)

// parseWire reads a wire table.
func parseWire(text string) (*Model, error) {
	m := &Model{Version: "2016-11-15"}
	var act *Action
	var tree []string
	flush := func() error {
		if act == nil {
			return nil
		}
		fields, rest, err := parseTree(tree, 2)
		if err != nil {
			return fmt.Errorf("response of %s: %w", act.Name, err)
		}
		if len(rest) > 0 {
			return fmt.Errorf("response of %s: element outside the tree: %q", act.Name, rest[0])
		}
		act.Response = fields
		m.Actions = append(m.Actions, *act)
		act, tree = nil, nil
		return nil
	}
	for n, line := range strings.Split(text, "\n") {
		line = strings.TrimRight(line, " ")
		var err error
		name, heading := strings.CutPrefix(line, "## ")
		switch {
		case heading:
			if err = flush(); err == nil {
				act = &Action{Name: name}
			}
		case line == "" || act == nil:
		case strings.HasPrefix(line, "request:"):
			act.Request, err = parseRequest(strings.TrimPrefix(line, "request:"))
		case strings.HasPrefix(line, "filters:"):
			act.Filters = parseFilters(strings.TrimPrefix(line, "filters:"))
		case strings.HasPrefix(line, "MaxResults:"):
			b := boundsForm.FindStringSubmatch(line)
			if b == nil {
				err = fmt.Errorf("bounds %q", line)
				break
			}
			// "None" leaves 0: no bound is published.
			act.MinResults, _ = strconv.ParseInt(b[1], 10, 64)
			act.MaxResults, _ = strconv.ParseInt(b[2], 10, 64)
		case strings.HasPrefix(line, "response"):
			act.NoOutput = strings.Contains(line, "<return>true</return>")
		case strings.HasPrefix(line, "  "):
			tree = append(tree, line)
		default:
			err = fmt.Errorf("unknown line %q", line)
		}
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n+1, err)
		}
	}
	if err := flush(); err != nil {
		return nil, err
	}
	fillCutOff(m)
	return m, nil
}

func parseFilters(s string) []string {
	var out []string
	for f := range strings.SplitSeq(html.UnescapeString(s), ",") {
		f = strings.TrimSuffix(strings.TrimSpace(f), ":<key>")
		if f != "" && !slices.Contains(out, f) {
			out = append(out, f)
		}
	}
	return out
}

func parseEnum(s string) (values []string, open bool) {
	if s == "" {
		return nil, false
	}
	values = strings.Split(s, "|")
	if i := slices.Index(values, "..."); i >= 0 {
		return values[:i], true
	}
	return values, false
}

// parseRequest reads the flattened parameters. A star after a name marks that
// name required; a star after the type marks the outermost list required.
func parseRequest(s string) ([]Field, error) {
	var root []Field
	for p := range strings.SplitSeq(s, ";") {
		p = strings.TrimSpace(p)
		if p == "" {
			continue
		}
		g := paramForm.FindStringSubmatch(p)
		if g == nil {
			return nil, fmt.Errorf("parameter %q", p)
		}
		at, parts := &root, strings.Split(g[1], ".")
		for i := 0; i < len(parts); i++ {
			name, required := strings.CutSuffix(parts[i], "*")
			list := i+1 < len(parts) && parts[i+1] == "N"
			if list {
				if i == 0 && g[4] == "*" {
					required = true
				}
			}
			k := slices.IndexFunc(*at, func(f Field) bool { return f.Name == name })
			if k < 0 {
				*at = append(*at, Field{Name: name, Type: "struct", List: list})
				k = len(*at) - 1
			}
			f := &(*at)[k]
			f.Required = f.Required || required
			if list {
				i++
			}
			if i == len(parts)-1 {
				f.Type = g[2]
				f.Enum, f.Open = parseEnum(g[3])
			}
			at = &f.Fields
		}
	}
	return root, nil
}

// parseTree reads the elements that are indented by depth spaces, and what is
// below them.
func parseTree(lines []string, depth int) (fields []Field, rest []string, err error) {
	for len(lines) > 0 {
		g := elementForm.FindStringSubmatch(strings.Replace(lines[0], "> list", ">list", 1))
		if g == nil {
			return nil, nil, fmt.Errorf("element %q", lines[0])
		}
		if len(g[1]) < depth {
			break
		}
		if len(g[1]) > depth {
			return nil, nil, fmt.Errorf("element %q is indented too far", lines[0])
		}
		f := Field{Name: g[2], List: g[3] != "", Type: g[4]}
		if f.List && g[3] != "item" {
			f.Item = g[3]
		}
		if f.Type == "" {
			f.Type = "struct"
		}
		f.Enum, f.Open = parseEnum(g[5])
		lines = lines[1:]
		if f.Type == "struct" {
			if f.Fields, lines, err = parseTree(lines, depth+2); err != nil {
				return nil, nil, err
			}
		}
		fields = append(fields, f)
	}
	return fields, lines, nil
}

// fillCutOff gives structures that the table cuts off for their depth the
// members that the same element has elsewhere.
func fillCutOff(m *Model) {
	known := map[string][]Field{}
	var learn func(fs []Field)
	learn = func(fs []Field) {
		for _, f := range fs {
			if len(f.Fields) > 0 && known[f.Name] == nil {
				known[f.Name] = f.Fields
			}
			learn(f.Fields)
		}
	}
	var fill func(fs []Field)
	fill = func(fs []Field) {
		for i := range fs {
			if fs[i].Type == "struct" && len(fs[i].Fields) == 0 {
				fs[i].Fields = known[fs[i].Name]
			}
			fill(fs[i].Fields)
		}
	}
	for _, a := range m.Actions {
		learn(a.Response)
	}
	for _, a := range m.Actions {
		fill(a.Response)
	}
}
