package flowlog

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// nodeFields are those that VPC flow logs do not have: who it was on the node,
// and who decided.
var nodeFields = []string{"pod", "namespace", "node", "direction", "verdict", "rule"}

// Default is the format of version 5 that shows a pod's own address, and the
// node's fields.
const Default = "${version} ${account-id} ${interface-id} ${srcaddr} ${dstaddr} ${srcport} ${dstport} ${protocol} ${packets} ${bytes}" +
	" ${start} ${end} ${action} ${log-status} ${tcp-flags} ${pkt-srcaddr} ${pkt-dstaddr} ${flow-direction} ${namespace} ${pod} ${verdict} ${rule}"

// Format is a record's fields in their order.
type Format struct {
	names   []string
	version int
}

// ParseFormat reads a format as CreateFlowLogs takes one: fields as ${name},
// separated by single blanks. Beside the fields of VPC flow logs there are pod,
// namespace, node, direction, verdict and rule.
func ParseFormat(s string) (Format, error) {
	fields, err := vpc.ParseFlowFormat(s, nodeFields...)
	if errors.Is(err, vpc.ErrNoFlowField) {
		err = fmt.Errorf("%w; there are %s", err, strings.Join(append(slices.Sorted(maps.Keys(vpc.FlowFields())), nodeFields...), " "))
	}
	if err != nil {
		return Format{}, err
	}
	f := Format{version: 2}
	for _, field := range fields {
		f.names = append(f.names, field.Name)
		f.version = max(f.version, field.Version)
	}
	return f, nil
}

// Header is the first line of a file.
func (f Format) Header() string { return strings.Join(f.names, " ") }

// Node is what all records of a node have in common; what is not known is "".
type Node struct {
	Name, Account, VPC, Instance, Region, ZoneID string
}

// Line is a record as a flow log's line, without a newline. The ENI's side shows
// the ENI's primary address in srcaddr or dstaddr, as in VPC flow logs; the
// pod's own is in pkt-srcaddr or pkt-dstaddr.
func (f Format) Line(n Node, r Record) string {
	words := make([]string, len(f.names))
	for i, name := range f.names {
		words[i] = f.word(name, n, &r)
		if words[i] == "" {
			words[i] = "-"
		}
		words[i] = strings.ReplaceAll(words[i], " ", "_") // a rule's name has blanks
	}
	return strings.Join(words, " ")
}

// word is one field; "" when it does not apply.
func (f Format) word(name string, n Node, r *Record) string {
	// What a remark on an interval has as well.
	switch name {
	case "version":
		return strconv.Itoa(f.version)
	case "account-id":
		return n.Account
	case "interface-id":
		return r.ENI
	case "start":
		return seconds(r.Start)
	case "end":
		return seconds(r.End)
	case "log-status":
		return r.Status.String()
	case "vpc-id":
		return n.VPC
	case "subnet-id":
		return r.Subnet
	case "instance-id":
		return n.Instance
	case "region":
		return n.Region
	case "az-id":
		return n.ZoneID
	case "pod":
		return r.Pod
	case "namespace":
		return r.Namespace
	case "node":
		return n.Name
	}
	if r.Status != OK {
		return ""
	}
	src, dst := r.Tuple.Src, r.Tuple.Dst
	switch name {
	case "srcaddr":
		if r.Direction == Egress {
			return text(r.Primary)
		}
		return text(src)
	case "dstaddr":
		if r.Direction == Ingress {
			return text(r.Primary)
		}
		return text(dst)
	case "pkt-srcaddr":
		return text(src)
	case "pkt-dstaddr":
		return text(dst)
	case "srcport", "dstport":
		if icmp(r.Tuple.Proto) {
			return "0" // VPC flow logs: ICMP has no ports
		}
		if name == "srcport" {
			return strconv.Itoa(int(r.Tuple.SrcPort))
		}
		return strconv.Itoa(int(r.Tuple.DstPort))
	case "protocol":
		return strconv.Itoa(int(r.Tuple.Proto))
	case "packets":
		return strconv.FormatUint(r.Packets, 10)
	case "bytes":
		return strconv.FormatUint(r.Bytes, 10)
	case "action":
		if r.Accepted {
			return "ACCEPT"
		}
		return "REJECT"
	case "tcp-flags":
		return strconv.Itoa(int(r.TCPFlags))
	case "type":
		if src.Is4() {
			return "IPv4"
		}
		return "IPv6"
	case "flow-direction", "direction":
		return r.Direction.String()
	case "verdict":
		return r.Verdict.Text
	case "rule":
		return r.Verdict.Rule
	}
	return ""
}

func seconds(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return strconv.FormatInt(t.Unix(), 10)
}

func text(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

func icmp(protocol uint8) bool { return protocol == packet.ProtoICMP || protocol == packet.ProtoICMPv6 }
