package flow

import "github.com/underlay-cni/underlay/internal/vpc"

// Default is the format of a flow log that asks for none.
const Default = "${version} ${account-id} ${interface-id} ${srcaddr} ${dstaddr} ${srcport} ${dstport} ${protocol}" +
	" ${packets} ${bytes} ${start} ${end} ${action} ${log-status}"

// Format is a record's fields in their order.
type Format []vpc.FlowField

// ParseFormat reads a format: fields as ${name}, separated by single blanks, at
// least one, none twice.
func ParseFormat(s string) (Format, error) {
	return vpc.ParseFlowFormat(s)
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
