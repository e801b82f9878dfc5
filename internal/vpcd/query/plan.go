package query

import (
	"reflect"
	"strings"
	"sync"
	"time"
)

// kind is what a field holds on the wire.
type kind uint8

const (
	kindString kind = iota
	kindInteger
	kindLong
	kindDouble
	kindBoolean
	kindTimestamp
	kindBlob
	kindStruct
)

// field is one field of a generated struct, as its tags tell.
type field struct {
	index    int
	kind     kind
	list     bool
	query    string // wire name in requests, "" if it is in none
	required bool
	xml      string // element name in responses, "" if it is in none
	item     string // element name of a list's entries
	enum     []string
	elem     *plan // of a struct
}

// plan is how a generated struct is decoded and encoded.
type plan struct {
	fields []field
	query  map[string]*field // by wire name in requests
}

var plans sync.Map // reflect.Type of a struct → *plan

// planOf returns the plan of a generated struct. The types come from the model,
// which holds no cycles.
func planOf(t reflect.Type) *plan {
	if p, ok := plans.Load(t); ok {
		return p.(*plan)
	}
	p := &plan{query: map[string]*field{}}
	for i := range t.NumField() {
		sf := t.Field(i)
		f := field{index: i, item: "item"}
		q := strings.Split(sf.Tag.Get("q"), ",")
		f.query = q[0]
		x := strings.Split(sf.Tag.Get("x"), ",")
		f.xml = x[0]
		if len(x) > 1 {
			f.item = x[1]
		}
		// An open enumeration names some of its values: none is refused.
		if e := sf.Tag.Get("enum"); e != "" && !strings.HasSuffix(e, "|...") {
			f.enum = strings.Split(e, "|")
		}
		ft := sf.Type
		if ft.Kind() == reflect.Slice && ft.Elem().Kind() != reflect.Uint8 {
			f.list = true
			ft = ft.Elem()
		} else if ft.Kind() == reflect.Pointer {
			ft = ft.Elem()
		}
		switch {
		case ft == reflect.TypeFor[time.Time]():
			f.kind = kindTimestamp
		case ft.Kind() == reflect.Struct:
			f.kind, f.elem = kindStruct, planOf(ft)
		case ft.Kind() == reflect.Slice:
			f.kind = kindBlob
		case ft.Kind() == reflect.Bool:
			f.kind = kindBoolean
		case ft.Kind() == reflect.Float64:
			f.kind = kindDouble
		case ft.Kind() == reflect.Int64:
			f.kind = kindInteger
		case ft.Kind() == reflect.String:
			f.kind = kindString
		default:
			panic("query: no wire form for " + sf.Type.String())
		}
		for _, o := range q[1:] {
			switch o {
			case "required":
				f.required = true
			case "long":
				f.kind = kindLong
			}
		}
		p.fields = append(p.fields, f)
	}
	for i := range p.fields {
		if n := p.fields[i].query; n != "" {
			p.query[n] = &p.fields[i]
		}
	}
	got, _ := plans.LoadOrStore(t, p)
	return got.(*plan)
}
