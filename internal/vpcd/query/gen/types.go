package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode"
)

// shape is one Go structure: all request and response structures with equal
// fields share it.
type shape struct {
	name   string
	fields []goField
	paths  []path
}

type goField struct {
	Field        // of the first occurrence
	name  string // Go name
	query string // wire name in requests, "" where it occurs in responses only
	xml   string // wire name in responses, "" where it occurs in requests only
	shape *shape
}

type path struct {
	action string
	names  []string
	list   bool // the last of names is a list
}

type shapes struct {
	responses map[string]*shape // by ordered signature
	requests  map[string]*shape // by unordered signature: the first such response's, else its own
	all       []*shape
}

// goName is the wire name, exported.
func goName(wire string) string {
	return strings.ToUpper(wire[:1]) + wire[1:]
}

// signature is equal for structures that share a Go type: the same Go names,
// types, value sets and required marks; in the same order, if ordered.
func signature(fs []Field, ordered bool) string {
	var parts []string
	for _, f := range fs {
		s := fmt.Sprintf("%s:%s:%v:%s:%v:%v:%v", goName(f.Name), f.Type, f.List, f.Item, f.Enum, f.Open, f.Required)
		if f.Type == "struct" {
			s += "{" + signature(f.Fields, ordered) + "}"
		}
		parts = append(parts, s)
	}
	if !ordered {
		slices.Sort(parts)
	}
	return strings.Join(parts, ";")
}

// add records a structure at a path and returns its shape. All responses must
// be added before the first request: the order of elements is theirs to say.
func (s *shapes) add(fs []Field, at path, response bool) *shape {
	index, sig := s.requests, signature(fs, false)
	if response {
		index, sig = s.responses, signature(fs, true)
	}
	sh := index[sig]
	if sh == nil {
		sh = &shape{}
		index[sig] = sh
		s.all = append(s.all, sh)
	}
	if loose := signature(fs, false); response && s.requests[loose] == nil {
		s.requests[loose] = sh
	}
	sh.paths = append(sh.paths, at)
	fields := s.convert(fs, at, response)
	if sh.fields == nil {
		sh.fields = fields
		return sh
	}
	for _, f := range fields {
		for k := range sh.fields {
			if g := &sh.fields[k]; g.name == f.name {
				g.query = cmp.Or(g.query, f.query)
				g.xml = cmp.Or(g.xml, f.xml)
			}
		}
	}
	return sh
}

func (s *shapes) convert(fs []Field, at path, response bool) []goField {
	var out []goField
	for _, f := range fs {
		g := goField{Field: f, name: goName(f.Name)}
		if response {
			g.xml = f.Name
		} else {
			g.query = f.Name
		}
		if f.Type == "struct" {
			below := path{at.action, append(slices.Clone(at.names), f.Name), f.List}
			g.shape = s.add(f.Fields, below, response)
		}
		out = append(out, g)
	}
	return out
}

// base is the noun of a path: its last name without "Set", singular if a list.
func (p path) base() string {
	n := goName(p.names[len(p.names)-1])
	n = strings.TrimSuffix(n, "Set")
	if !p.list {
		return n
	}
	switch {
	case strings.HasSuffix(n, "ddresses"), strings.HasSuffix(n, "Analyses"):
		n = strings.TrimSuffix(n, "es")
	case strings.HasSuffix(n, "ies"):
		n = strings.TrimSuffix(n, "ies") + "y"
	case strings.HasSuffix(n, "ss"), strings.HasSuffix(n, "Details"), strings.HasSuffix(n, "Status"):
	default:
		n = strings.TrimSuffix(n, "s")
	}
	return n
}

// nameAll gives each shape its name: the overriding table, else the commonest
// noun of its paths; where shapes compete for a noun the one in most actions
// has it, and the others are qualified by their parent or their action.
func (s *shapes) nameAll(taken map[string]bool) []*shape {
	all := s.all
	for _, sh := range all {
		slices.SortFunc(sh.paths, func(a, b path) int {
			return cmp.Or(cmp.Compare(a.action, b.action), slices.Compare(a.names, b.names))
		})
	}
	count := func(sh *shape) int {
		acts := map[string]bool{}
		for _, p := range sh.paths {
			acts[p.action] = true
		}
		return len(acts)
	}
	slices.SortFunc(all, func(a, b *shape) int {
		return cmp.Or(cmp.Compare(count(b), count(a)), cmp.Compare(len(a.paths[0].names), len(b.paths[0].names)),
			cmp.Compare(a.paths[0].action, b.paths[0].action), slices.Compare(a.paths[0].names, b.paths[0].names))
	})
	used := maps.Clone(taken)
	unseen := maps.Clone(names)
	for _, sh := range all {
		for _, p := range sh.paths {
			key := p.action + "/" + strings.Join(p.names, ".")
			n := names[key]
			delete(unseen, key)
			switch {
			case n == "" || sh.name == n:
			case sh.name != "":
				panic(fmt.Sprintf("%s is to be named both %s and %s", key, sh.name, n))
			case used[n]:
				panic("two structures are to be named " + n)
			default:
				sh.name, used[n] = n, true
			}
		}
	}
	if len(unseen) > 0 {
		panic(fmt.Sprintf("names that no structure has: %v", unseen))
	}
	for _, sh := range all {
		if sh.name != "" {
			continue
		}
		for _, n := range candidates(sh) {
			if !used[n] {
				sh.name, used[n] = n, true
				break
			}
		}
		if sh.name == "" {
			panic(fmt.Sprintf("no name left for %v", sh.paths[0]))
		}
	}
	slices.SortFunc(all, func(a, b *shape) int { return cmp.Compare(a.name, b.name) })
	return all
}

func candidates(sh *shape) []string {
	votes := map[string]int{}
	for _, p := range sh.paths {
		votes[p.base()]++
	}
	bases := slices.SortedFunc(maps.Keys(votes), func(a, b string) int {
		return cmp.Or(cmp.Compare(votes[b], votes[a]), cmp.Compare(len(a), len(b)), cmp.Compare(a, b))
	})
	p := sh.paths[0]
	out := bases[:1]
	if len(p.names) > 1 {
		parent := path{p.action, p.names[:len(p.names)-1], true}
		out = append(out, parent.base()+p.base())
	}
	return append(out, p.action+p.base(), p.action+joinNames(p.names))
}

func joinNames(ns []string) string {
	var b strings.Builder
	for _, n := range ns {
		b.WriteString(goName(n))
	}
	return b.String()
}

// goType is the Go type of a field.
func (f *goField) goType() string {
	elem := map[string]string{
		"string": "string", "integer": "int64", "long": "int64", "double": "float64",
		"boolean": "bool", "timestamp": "time.Time", "blob": "[]byte",
	}[f.Type]
	switch {
	case f.shape != nil && f.List:
		return "[]" + f.shape.name
	case f.shape != nil:
		return "*" + f.shape.name
	case elem == "":
		panic("no Go type for " + f.Type)
	case f.List:
		return "[]" + elem
	case f.Type == "blob":
		return elem
	}
	return "*" + elem
}

// tag is what the codec needs to know of a field, as a struct tag:
//
//	q:"NAME[,required][,long]"  its name in requests
//	x:"NAME[,member]"           its name in responses
//	enum:"A|B[|...]"            its values; "..." says that there are more
func (f *goField) tag() string {
	var parts []string
	if f.query != "" {
		q := f.query
		if f.Required {
			q += ",required"
		}
		if f.Type == "long" {
			q += ",long"
		}
		parts = append(parts, fmt.Sprintf("q:%q", q))
	}
	if f.xml != "" {
		x := f.xml
		if f.Item != "" {
			x += "," + f.Item
		}
		parts = append(parts, fmt.Sprintf("x:%q", x))
	}
	if len(f.Enum) > 0 {
		e := strings.Join(f.Enum, "|")
		if f.Open {
			e += "|..."
		}
		parts = append(parts, fmt.Sprintf("enum:%q", e))
	}
	return strings.Join(parts, " ")
}

// words breaks a Go name for a comment: "DescribeVpcs" → "describe vpcs".
func words(s string) string {
	var b strings.Builder
	for i, r := range s {
		if i > 0 && unicode.IsUpper(r) && !unicode.IsUpper(rune(s[i-1])) {
			b.WriteByte(' ')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}
