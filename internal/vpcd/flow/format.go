package flow

import (
	"fmt"
	"strings"

	"github.com/underlay-cni/underlay/internal/vpc"
)

var fields = vpc.FlowFields()

// Default is the format of a flow log that asks for none.
const Default = "${version} ${account-id} ${interface-id} ${srcaddr} ${dstaddr} ${srcport} ${dstport} ${protocol}" +
	" ${packets} ${bytes} ${start} ${end} ${action} ${log-status}"

// Format is a record's fields in their order.
type Format []vpc.FlowField

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
