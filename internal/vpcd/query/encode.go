package query

import (
	"encoding/base64"
	"reflect"
	"strconv"
	"strings"
	"time"
)

// namespace of the elements of an answer.
const namespace = "http://ec2.amazonaws.com/doc/" + Version + "/"

// timestampForm is how EC2 writes a time: UTC, with milliseconds.
const timestampForm = "2006-01-02T15:04:05.000Z"

// EncodeResponse is the XML that answers the action. resp is a pointer to the
// action's Response struct.
//
// A nil pointer is left out. An empty list is an empty element; a nil list is
// one too at the top level (`<vpcSet/>`: nothing found), and is left out below
// it, and from the answers of Describe…Attribute, which hold one attribute.
func (a *Action) EncodeResponse(resp any, requestID string) []byte {
	var b strings.Builder
	b.WriteString(`<?xml version="1.0" encoding="UTF-8"?>` + "\n<")
	b.WriteString(a.Name)
	b.WriteString(`Response xmlns="` + namespace + `"><requestId>`)
	escape(&b, requestID)
	b.WriteString(`</requestId>`)
	if a.NoOutput {
		b.WriteString(`<return>true</return>`)
	} else {
		v := reflect.ValueOf(resp).Elem()
		encodeStruct(&b, planOf(v.Type()), v, !strings.HasSuffix(a.Name, "Attribute"))
	}
	b.WriteString("</" + a.Name + "Response>")
	return []byte(b.String())
}

func encodeStruct(b *strings.Builder, p *plan, v reflect.Value, nilLists bool) {
	for i := range p.fields {
		f := &p.fields[i]
		if f.xml == "" {
			continue
		}
		fv := v.Field(f.index)
		switch {
		case f.list:
			if fv.IsNil() && !nilLists {
				continue
			}
			if fv.Len() == 0 {
				b.WriteString("<" + f.xml + "/>")
				continue
			}
			open(b, f.xml)
			for k := range fv.Len() {
				encodeValue(b, f, f.item, fv.Index(k))
			}
			shut(b, f.xml)
		case fv.IsNil():
		case f.kind == kindBlob:
			encodeValue(b, f, f.xml, fv)
		default:
			encodeValue(b, f, f.xml, fv.Elem())
		}
	}
}

func encodeValue(b *strings.Builder, f *field, name string, v reflect.Value) {
	open(b, name)
	switch f.kind {
	case kindStruct:
		encodeStruct(b, f.elem, v, false)
	case kindString:
		escape(b, v.String())
	case kindInteger, kindLong:
		b.WriteString(strconv.FormatInt(v.Int(), 10))
	case kindDouble:
		b.WriteString(strconv.FormatFloat(v.Float(), 'f', -1, 64))
	case kindBoolean:
		b.WriteString(strconv.FormatBool(v.Bool()))
	case kindTimestamp:
		b.WriteString(v.Interface().(time.Time).UTC().Format(timestampForm))
	case kindBlob:
		b.WriteString(base64.StdEncoding.EncodeToString(v.Bytes()))
	}
	shut(b, name)
}

func open(b *strings.Builder, name string) { b.WriteString("<" + name + ">") }
func shut(b *strings.Builder, name string) { b.WriteString("</" + name + ">") }
