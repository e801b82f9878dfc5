package flow

import (
	"fmt"
	"strings"
)

// Type is the type of a field in a Parquet file.
type Type int

// The types of fields (VPC User Guide, "Flow log records", 2026).
const (
	String Type = iota
	Int32
	Int64
)

// Field is one field of a record.
type Field struct {
	Name    string // pkt-srcaddr
	Version int    // of the format that brought it
	Type    Type
}

// Column is the name of the field's column in a Parquet file.
func (f Field) Column() string { return strings.ReplaceAll(f.Name, "-", "_") }

// fields are those of versions 2 to 8, but for version 6, whose fields are of
// transit gateways alone (same source).
var fields = func() map[string]Field {
	out := map[string]Field{}
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
			out[n] = Field{Name: n, Version: version}
		}
	}
	for t, names := range map[Type]string{Int32: "version srcport dstport protocol tcp-flags traffic-path", Int64: "packets bytes start end"} {
		for n := range strings.FieldsSeq(names) {
			f := out[n]
			f.Type = t
			out[n] = f
		}
	}
	return out
}()

// Default is the format of a flow log that asks for none.
const Default = "${version} ${account-id} ${interface-id} ${srcaddr} ${dstaddr} ${srcport} ${dstport} ${protocol}" +
	" ${packets} ${bytes} ${start} ${end} ${action} ${log-status}"

// Format is a record's fields in their order.
type Format []Field

// ParseFormat reads a format: fields as ${name}, separated by single blanks, at
// least one, none twice.
func ParseFormat(s string) (Format, error) {
	var out Format
	seen := map[string]bool{}
	for word := range strings.SplitSeq(s, " ") {
		name, ok := strings.CutPrefix(word, "${")
		if ok {
			name, ok = strings.CutSuffix(name, "}")
		}
		f, known := fields[name]
		switch {
		case !ok:
			return nil, fmt.Errorf("%q is no field: write ${version} ${srcaddr} …, separated by single blanks", word)
		case !known:
			return nil, fmt.Errorf("there is no field %q of versions 2 to 8 for interfaces", name)
		case seen[name]:
			return nil, fmt.Errorf("the field %q is there twice", name)
		}
		seen[name] = true
		out = append(out, f)
	}
	return out, nil
}

// Version returns the highest version among the fields: what the field version
// of each record says.
func (f Format) Version() int {
	v := 0
	for _, x := range f {
		v = max(v, x.Version)
	}
	return v
}
