package query

import (
	"encoding/base64"
	"fmt"
	"maps"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// maxParameters bounds one request; the longest that a client library makes
// (1,000 identifiers, 200 filter values) is far below.
const maxParameters = 10_000

// protocol parameters belong to the request, not to its action.
func isProtocol(name string) bool {
	switch name {
	case "Action", "Version", "AWSAccessKeyId", "Signature", "SignatureMethod", "SignatureVersion",
		"Timestamp", "Expires", "SecurityToken":
		return true
	}
	return len(name) > 6 && strings.EqualFold(name[:6], "X-Amz-")
}

// node is one name of the parameters' dotted paths.
type node struct {
	value    *string
	children map[string]*node
}

func (n *node) names() []string { return slices.Sorted(maps.Keys(n.children)) }

// first returns the path of the first parameter at or below n.
func (n *node) first(path string) string {
	for n.value == nil {
		name := n.names()[0] // a node without a value has children
		path, n = join(path, name), n.children[name]
	}
	return path
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// DecodeRequest decodes the parameters of an action into its Request struct.
// Errors are *Error.
func (a *Action) DecodeRequest(form url.Values) (any, error) {
	root := &node{}
	total := 0
	for _, key := range slices.Sorted(maps.Keys(form)) {
		if isProtocol(key) {
			continue
		}
		values := form[key]
		if total += len(values); total > maxParameters {
			return nil, Errorf("InvalidParameterCombination", "The request has more than %d parameters.", maxParameters)
		}
		if len(values) != 1 {
			return nil, Errorf("InvalidParameterValue", "The parameter %s is given %d times.", printable(key), len(values))
		}
		if !isText(values[0]) {
			return nil, Errorf("InvalidParameterValue", "The value of parameter %s holds characters that XML cannot carry.", printable(key))
		}
		n := root
		for name := range strings.SplitSeq(key, ".") {
			next := n.children[name]
			if next == nil {
				next = &node{}
				if n.children == nil {
					n.children = map[string]*node{}
				}
				n.children[name] = next
			}
			n = next
		}
		n.value = &values[0]
	}
	req := a.newRequest()
	v := reflect.ValueOf(req).Elem()
	if err := decodeStruct(planOf(v.Type()), v, root, ""); err != nil {
		return nil, err
	}
	if err := a.checkMaxResults(v); err != nil {
		return nil, err
	}
	return req, nil
}

func (a *Action) checkMaxResults(v reflect.Value) error {
	f := v.FieldByName("MaxResults")
	if !f.IsValid() || f.IsNil() {
		return nil
	}
	n, low := f.Elem().Int(), max(a.MinResults, 1)
	if n < low {
		return Errorf("InvalidParameterValue", "Value ( %d ) for parameter maxResults is invalid. Expecting a value greater than or equal to %d.", n, low)
	}
	if a.MaxResults > 0 && n > a.MaxResults {
		return Errorf("InvalidParameterValue", "Value ( %d ) for parameter maxResults is invalid. Expecting a value less than or equal to %d.", n, a.MaxResults)
	}
	return nil
}

func decodeStruct(p *plan, v reflect.Value, n *node, path string) error {
	if n.value != nil {
		return unknown(path)
	}
	for _, name := range n.names() {
		child := n.children[name]
		f := p.query[name]
		if f == nil {
			return unknown(child.first(join(path, name)))
		}
		var err error
		if f.list {
			err = decodeList(f, v.Field(f.index), child, join(path, name))
		} else {
			err = decodeField(f, v.Field(f.index), child, join(path, name))
		}
		if err != nil {
			return err
		}
	}
	for i := range p.fields {
		f := &p.fields[i]
		if !f.required {
			continue
		}
		got := v.Field(f.index)
		empty := got.IsZero()
		if !empty && got.Kind() == reflect.Pointer && f.kind == kindString {
			empty = got.Elem().Len() == 0
		}
		if empty {
			return Errorf("MissingParameter", "The request must contain the parameter %s", printable(join(path, f.query)))
		}
	}
	return nil
}

// decodeList takes NAME.1, NAME.2, … in the order of their indices, which may
// leave gaps. What an index is does not matter to the memory used.
func decodeList(f *field, v reflect.Value, n *node, path string) error {
	if n.value != nil {
		if *n.value != "" || n.children != nil {
			return unknown(path)
		}
		return nil // NAME= is how some clients write an empty list
	}
	indices := make([]int, 0, len(n.children))
	for name, child := range n.children {
		i, err := strconv.Atoi(name)
		if err != nil || i < 1 || strconv.Itoa(i) != name {
			return unknown(child.first(join(path, name)))
		}
		indices = append(indices, i)
	}
	slices.Sort(indices)
	out := reflect.MakeSlice(v.Type(), len(indices), len(indices))
	for k, i := range indices {
		name := strconv.Itoa(i)
		if err := decodeField(f, out.Index(k), n.children[name], join(path, name)); err != nil {
			return err
		}
	}
	v.Set(out)
	return nil
}

// decodeField decodes one value into v, which is a pointer that is nil yet, or
// an entry of a list.
func decodeField(f *field, v reflect.Value, n *node, path string) error {
	if v.Kind() == reflect.Pointer {
		v.Set(reflect.New(v.Type().Elem()))
		v = v.Elem()
	}
	if f.kind == kindStruct {
		return decodeStruct(f.elem, v, n, path)
	}
	if n.children != nil {
		below := n.names()[0]
		return unknown(n.children[below].first(join(path, below)))
	}
	s := *n.value
	bad := func(expecting string) error {
		return Errorf("InvalidParameterValue", "Value (%s) for parameter %s is invalid. Expecting %s.", printable(s), printable(path), expecting)
	}
	switch f.kind {
	case kindString:
		if f.enum != nil && !slices.Contains(f.enum, s) {
			return bad("one of: " + strings.Join(f.enum, ", "))
		}
		v.SetString(s)
	case kindInteger, kindLong:
		bits := 32
		if f.kind == kindLong {
			bits = 64
		}
		i, err := strconv.ParseInt(s, 10, bits)
		if err != nil {
			return bad("an integer")
		}
		v.SetInt(i)
	case kindDouble:
		d, err := strconv.ParseFloat(s, 64)
		if err != nil {
			return bad("a number")
		}
		v.SetFloat(d)
	case kindBoolean:
		switch strings.ToLower(s) {
		case "true":
			v.SetBool(true)
		case "false":
			v.SetBool(false)
		default:
			return bad("true or false")
		}
	case kindTimestamp:
		t, err := time.Parse(time.RFC3339, s)
		if err != nil {
			return bad("a time such as 2026-01-02T03:04:05Z")
		}
		v.Set(reflect.ValueOf(t.UTC()))
	case kindBlob:
		b, err := base64.StdEncoding.DecodeString(s)
		if err != nil {
			return bad("base64")
		}
		v.SetBytes(b)
	}
	return nil
}

func unknown(path string) error {
	return Errorf("UnknownParameter", "The parameter %s is not recognized", printable(path))
}

// isText reports whether XML 1.0 can carry s.
func isText(s string) bool {
	if !utf8.ValidString(s) {
		return false
	}
	for _, r := range s {
		if r < 0x20 && r != '\t' && r != '\n' && r != '\r' || r == 0xFFFE || r == 0xFFFF {
			return false
		}
	}
	return true
}

// printable shortens and escapes what a client sent, for an error message.
func printable(s string) string {
	const limit = 200
	if len(s) > limit {
		s = s[:limit] + "…"
	}
	if isText(s) {
		return s
	}
	return fmt.Sprintf("%q", s)
}
