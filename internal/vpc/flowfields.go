package vpc

import (
	"maps"
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
