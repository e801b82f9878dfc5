package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strings"
)

// Model is the machine-readable form of the EC2 Query API that vpcd knows:
// model.json, from which the Go types are generated.
type Model struct {
	Version string   `json:"version"` // the API version, "2016-11-15"
	Actions []Action `json:"actions"`
}

// Action is one API action.
type Action struct {
	Name       string   `json:"name"`
	Filters    []string `json:"filters,omitempty"`    // names Filter.N.Name may have; "tag" stands for tag:KEY
	MinResults int64    `json:"minResults,omitempty"` // bounds of MaxResults, 0: not published
	MaxResults int64    `json:"maxResults,omitempty"`
	NoOutput   bool     `json:"noOutput,omitempty"` // answers <return>true</return>
	Request    []Field  `json:"request,omitempty"`
	Response   []Field  `json:"response,omitempty"`
}

// Field is a parameter of a request or an element of a response.
type Field struct {
	Name     string   `json:"name"` // as on the wire
	Type     string   `json:"type"` // string integer long double boolean timestamp blob struct
	List     bool     `json:"list,omitempty"`
	Item     string   `json:"item,omitempty"`     // element name of a response list's entries, if not "item"
	Required bool     `json:"required,omitempty"` // of a nested field: where its parent is present
	Enum     []string `json:"enum,omitempty"`
	Open     bool     `json:"open,omitempty"` // Enum lists only the first of the values
	Fields   []Field  `json:"fields,omitempty"`
}

// readModel reads model.json.
func readModel(path string) (*Model, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read model: %w", err)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	var m Model
	if err := dec.Decode(&m); err != nil {
		return nil, fmt.Errorf("decode %s: %w", path, err)
	}
	return &m, nil
}

// format writes the model as JSON with one field to a line, so that a change
// of the API reads as a change of lines.
func (m *Model) format() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "{\"version\": %q, \"actions\": [", m.Version)
	for i, a := range m.Actions {
		req, resp := a.Request, a.Response
		a.Request, a.Response = nil, nil
		head := strings.TrimSuffix(compact(a), "}")
		if i > 0 {
			b.WriteString(",")
		}
		fmt.Fprintf(&b, "\n%s", head)
		if len(req) > 0 {
			b.WriteString(",\"request\":[")
			formatFields(&b, req, 1)
			b.WriteString("]")
		}
		if len(resp) > 0 {
			b.WriteString(",\"response\":[")
			formatFields(&b, resp, 1)
			b.WriteString("]")
		}
		b.WriteString("}")
	}
	b.WriteString("\n]}\n")
	return b.Bytes()
}

func formatFields(b *bytes.Buffer, fields []Field, depth int) {
	for i, f := range fields {
		if i > 0 {
			b.WriteString(",")
		}
		sub := f.Fields
		f.Fields = nil
		fmt.Fprintf(b, "\n%s%s", strings.Repeat(" ", depth), strings.TrimSuffix(compact(f), "}"))
		if len(sub) > 0 {
			b.WriteString(",\"fields\":[")
			formatFields(b, sub, depth+1)
			b.WriteString("]")
		}
		b.WriteString("}")
	}
}

func compact(v any) string {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		panic(err) // strings, numbers and booleans always encode
	}
	return strings.TrimSuffix(b.String(), "\n")
}
