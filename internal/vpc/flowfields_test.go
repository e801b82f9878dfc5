package vpc

import (
	"errors"
	"strings"
	"testing"
)

func TestFlowFields(t *testing.T) {
	fields := FlowFields()
	if len(fields) != 14+7+4+4+10+1 {
		t.Errorf("%d fields", len(fields))
	}
	for name, want := range map[string]FlowField{
		"srcport":             {"srcport", 2, FlowInt32},
		"bytes":               {"bytes", 2, FlowInt64},
		"tcp-flags":           {"tcp-flags", 3, FlowInt32},
		"az-id":               {"az-id", 4, FlowString},
		"pkt-dst-aws-service": {"pkt-dst-aws-service", 5, FlowString},
		"traffic-path":        {"traffic-path", 5, FlowInt32},
		"reject-reason":       {"reject-reason", 8, FlowString},
	} {
		if fields[name] != want {
			t.Errorf("%s: %+v, want %+v", name, fields[name], want)
		}
	}
	if c := fields["pkt-dst-aws-service"].Column(); c != "pkt_dst_aws_service" {
		t.Errorf("column %s", c)
	}
	delete(fields, "version")
	if _, ok := FlowFields()["version"]; !ok {
		t.Error("the map is shared")
	}
}

func TestParseFlowFormat(t *testing.T) {
	got, err := ParseFlowFormat("${pkt-srcaddr} ${pod} ${version}", "pod")
	if err != nil || len(got) != 3 || got[0] != (FlowField{"pkt-srcaddr", 3, FlowString}) || got[1] != (FlowField{Name: "pod"}) || got[2].Version != 2 {
		t.Errorf("%+v, %v", got, err)
	}
	for bad, want := range map[string]string{
		"":                       `"" is no field: write ${version} ${srcaddr} …, separated by single blanks`,
		"version":                `"version" is no field`,
		"${version}  ${srcaddr}": `"" is no field`,
		"${version} ":            `"" is no field`,
		"${version},${srcaddr}":  `there is no field "version},${srcaddr"`,
		"${":                     `"${" is no field`,
		"${pod}":                 `there is no field "pod" of versions 2 to 8 for interfaces`,
		"${version} ${version}":  `the field "version" is there twice`,
	} {
		f, err := ParseFlowFormat(bad)
		if err == nil || !strings.HasPrefix(err.Error(), want) || errors.Is(err, ErrNoFlowField) != strings.HasPrefix(want, "there is no") {
			t.Errorf("%q: %v, %v; want %s", bad, f, err, want)
		}
	}
}
