package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseWire(t *testing.T) {
	got, err := parseWire(`## RunThings
request: Thing.N.Part.N.Id*:string; Thing.N.Kind:string{a|b}; Size:string{s|m|...}; Id.N:string*; DryRun:boolean
filters: size, tag:&lt;key&gt;, tag, size
MaxResults: min=None max=100
response <RunThingsResponse xmlns="x"><requestId/>
  <thingSet> list of <member>:
    <kind>string {a|b}
    <madeAt>timestamp
  <idSet> list of <item>string
  <state>
    <code>integer

## DropThing
request: Id*:string
response <DropThingResponse><requestId/><return>true</return> (no output shape in model)
`)
	if err != nil {
		t.Fatal(err)
	}
	want := &Model{Version: "2016-11-15", Actions: []Action{{
		Name: "RunThings", Filters: []string{"size", "tag"}, MaxResults: 100,
		Request: []Field{
			{Name: "Thing", Type: "struct", List: true, Fields: []Field{
				{Name: "Part", Type: "struct", List: true, Fields: []Field{{Name: "Id", Type: "string", Required: true}}},
				{Name: "Kind", Type: "string", Enum: []string{"a", "b"}},
			}},
			{Name: "Size", Type: "string", Enum: []string{"s", "m"}, Open: true},
			{Name: "Id", Type: "string", List: true, Required: true},
			{Name: "DryRun", Type: "boolean"},
		},
		Response: []Field{
			{Name: "thingSet", Type: "struct", List: true, Item: "member", Fields: []Field{
				{Name: "kind", Type: "string", Enum: []string{"a", "b"}},
				{Name: "madeAt", Type: "timestamp"},
			}},
			{Name: "idSet", Type: "string", List: true},
			{Name: "state", Type: "struct", Fields: []Field{{Name: "code", Type: "integer"}}},
		},
	}, {
		Name: "DropThing", NoOutput: true, Request: []Field{{Name: "Id", Type: "string", Required: true}},
	}}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestParseWireRefuses(t *testing.T) {
	for in, want := range map[string]string{
		"## A\nrequest: No type\n":                        "line 2: parameter",
		"## A\nnonsense\n":                                "line 2: unknown line",
		"## A\nMaxResults: some\n":                        "line 2: bounds",
		"## A\nresponse x\n  <a>\n      <b>string\n":      "indented too far",
		"## A\nresponse x\n  <a\n":                        "element",
		"## A\nresponse x\n  <a>string\n## B\nsurprise\n": "line 5: unknown line",
	} {
		if _, err := parseWire(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", in, err, want)
		}
	}
}

// What is committed is what the model generates, and the model is as it would
// be written.
func TestGeneratedIsUpToDate(t *testing.T) {
	m, err := readModel("../model.json")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("../model.json")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, m.format()) {
		t.Error("model.json is not in its canonical form")
	}
	dir := t.TempDir()
	if err := generate(m, dir); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("../zz_*.go")
	if err != nil || len(files) != 4 {
		t.Fatalf("generated files: %v, %v", files, err)
	}
	for _, f := range files {
		want, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(filepath.Join(dir, filepath.Base(f)))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(want, got) {
			t.Errorf("%s is stale: run go generate in internal/vpcd/query", filepath.Base(f))
		}
	}
}
