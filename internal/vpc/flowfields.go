package vpc

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// FlowFieldType is the type of a flow record's field in a Parquet file.
type FlowFieldType int

// The types of fields (VPC User Guide, "Flow log records", 2026).
const (
	FlowString FlowFieldType = iota
	FlowInt32
	FlowInt64
)

// FlowField is one field of a flow log's record.
type FlowField struct {
	Name    string // pkt-srcaddr
	Version int    // of the format that brought it
	Type    FlowFieldType
}

// Column is the name of the field's column in a Parquet file.
func (f FlowField) Column() string { return strings.ReplaceAll(f.Name, "-", "_") }

// FlowFields returns the fields that records of interfaces can have, by name:
// those of versions 2 to 8, but for version 6, whose fields are of transit
// gateways alone (same source). The map is the caller's.
func FlowFields() map[string]FlowField { return maps.Clone(flowFields) }

// ErrNoFlowField is wrapped by ParseFlowFormat's error for a name that no field has.
var ErrNoFlowField = errors.New("there is no field")

// ParseFlowFormat reads a format of flow logs as CreateFlowLogs takes one: fields as
// ${name}, separated by single blanks, at least one, none twice. more are names of
// fields beside those of FlowFields, which come with version 0.
func ParseFlowFormat(s string, more ...string) ([]FlowField, error) {
	var out []FlowField
	seen := map[string]bool{}
	for word := range strings.SplitSeq(s, " ") {
		name, ok := strings.CutPrefix(word, "${")
		if ok {
			name, ok = strings.CutSuffix(name, "}")
		}
		f, known := flowFields[name]
		if !known && slices.Contains(more, name) {
			f, known = FlowField{Name: name}, true
		}
		switch {
		case !ok:
			return nil, fmt.Errorf("%q is no field: write ${version} ${srcaddr} …, separated by single blanks", word)
		case !known:
			return nil, fmt.Errorf("%w %q of versions 2 to 8 for interfaces", ErrNoFlowField, name)
		case seen[name]:
			return nil, fmt.Errorf("the field %q is there twice", name)
		}
		seen[name] = true
		out = append(out, f)
	}
	return out, nil
}

var flowFields = func() map[string]FlowField {
	out := map[string]FlowField{}
	for version, names := range map[int]string{
		2: "version account-id interface-id srcaddr dstaddr srcport dstport protocol packets bytes start end action log-status",
		3: "vpc-id subnet-id instance-id tcp-flags type pkt-srcaddr pkt-dstaddr",
		4: "region az-id sublocation-type sublocation-id",
		5: "pkt-src-aws-service pkt-dst-aws-service flow-direction traffic-path",
		7: "ecs-cluster-arn ecs-cluster-name ecs-container-instance-arn ecs-container-instance-id ecs-container-id ecs-second-container-id" +
			" ecs-service-name ecs-task-definition-arn ecs-task-arn ecs-task-id",
		8: "reject-reason",
	} {
		for n := range strings.FieldsSeq(names) {
			out[n] = FlowField{Name: n, Version: version}
		}
	}
	for t, names := range map[FlowFieldType]string{
		FlowInt32: "version srcport dstport protocol tcp-flags traffic-path",
		FlowInt64: "packets bytes start end",
	} {
		for n := range strings.FieldsSeq(names) {
			f := out[n]
			f.Type = t
			out[n] = f
		}
	}
	return out
}()
