package flow

import (
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// The values of Record.Action.
const (
	Accept = "ACCEPT"
	Reject = "REJECT"
)

// The values of Record.Status.
const (
	OK       = "OK"
	NoData   = "NODATA"   // nothing was recorded of the interface
	SkipData = "SKIPDATA" // something was not
)

// Record is what a flow log can say of the packets of one flow at one interface
// in one interval; with Status NoData or SkipData, of the interface alone.
type Record struct {
	Account   string
	Region    string
	ZoneID    string
	Interface vpc.ENIID
	VPC       vpc.VPCID
	Subnet    vpc.SubnetID
	Instance  vpc.InstanceID // "": the interface is of a managed service
	Primary   netip.Addr     // of the interface
	Start     time.Time      // the first packet came; of NoData and SkipData: the interval
	End       time.Time
	Status    string

	Egress              bool       // sent by the interface
	Source, Destination netip.Addr // of the packets
	SourcePort          int
	DestinationPort     int
	Protocol            int
	Packets, Bytes      int64
	Action              string
	TCPFlags            int
	TrafficPath         int // 0: none of AWS's
	// RefusedBy is who refused, of a Reject: more than AWS's records tell.
	RefusedBy string
}

func (r *Record) ipv6() bool { return r.Source.Is6() }

// absent is how a text record shows a field that does not apply.
const absent = "-"

// Value returns a field's value: a string, an int32 or an int64, as the field's
// type says; nil if the field does not apply. Field version is the format's
// business.
func (r *Record) Value(field string) any {
	switch field {
	case "account-id":
		return given(r.Account)
	case "interface-id":
		return given(r.Interface)
	case "vpc-id":
		return given(r.VPC)
	case "subnet-id":
		return given(r.Subnet)
	case "instance-id":
		return given(r.Instance)
	case "region":
		return given(r.Region)
	case "az-id":
		return given(r.ZoneID)
	case "start":
		return r.Start.Unix()
	case "end":
		return r.End.Unix()
	case "log-status":
		return r.Status
	}
	if r.Status != OK {
		return nil
	}
	switch field {
	case "srcaddr":
		// The interface's side shows its primary address, whatever the packet
		// has: a secondary one, or one that is not the interface's. Only an IPv4
		// address is one.
		if r.Egress && !r.ipv6() {
			return r.Primary.String()
		}
		return r.Source.String()
	case "dstaddr":
		if !r.Egress && !r.ipv6() {
			return r.Primary.String()
		}
		return r.Destination.String()
	case "pkt-srcaddr":
		return r.Source.String()
	case "pkt-dstaddr":
		return r.Destination.String()
	case "srcport":
		return int32(r.SourcePort)
	case "dstport":
		return int32(r.DestinationPort)
	case "protocol":
		return int32(r.Protocol)
	case "packets":
		return r.Packets
	case "bytes":
		return r.Bytes
	case "action":
		return r.Action
	case "tcp-flags":
		return int32(r.TCPFlags)
	case "type":
		if r.ipv6() {
			return "IPv6"
		}
		return "IPv4"
	case "flow-direction":
		if r.Egress {
			return "egress"
		}
		return "ingress"
	case "traffic-path":
		if r.Egress && r.TrafficPath != 0 {
			return int32(r.TrafficPath)
		}
	}
	// Zones here are plain ones, no range of AWS's is known, there is no ECS, and
	// none of the reasons for a REJECT that AWS names exists.
	return nil
}

// given is s, or nil for "".
func given[S ~string](s S) any {
	if s == "" {
		return nil
	}
	return string(s)
}

// Line is the record as a text flow log has it, without the end of the line.
func (f Format) Line(r *Record) string {
	var b strings.Builder
	version := f.Version()
	for i, field := range f {
		if i > 0 {
			b.WriteByte(' ')
		}
		if field.Name == "version" {
			b.WriteString(strconv.Itoa(version))
			continue
		}
		switch v := r.Value(field.Name).(type) {
		case string:
			b.WriteString(v)
		case int32:
			b.WriteString(strconv.FormatInt(int64(v), 10))
		case int64:
			b.WriteString(strconv.FormatInt(v, 10))
		default:
			b.WriteString(absent)
		}
	}
	return b.String()
}

// Header is the first line of a text flow log: the fields' names.
func (f Format) Header() string {
	names := make([]string, len(f))
	for i, field := range f {
		names[i] = field.Name
	}
	return strings.Join(names, " ")
}
