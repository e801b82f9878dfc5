package fabric

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// Owner is what flow records say of an interface beside its ID and its subnet.
type Owner struct {
	VPC      vpc.VPCID
	Instance vpc.InstanceID // "": of a managed service
	Zone     string
}

// Logged is an interface as flow records know it.
type Logged struct {
	ENI     vpc.ENIID
	Subnet  vpc.SubnetID
	Primary netip.Addr
	Owner
}

// Refusal says who refused a packet.
type Refusal string

// The refusals; what is accepted has none.
const (
	Accepted      Refusal = ""
	RefusedGroups Refusal = "security-group"
	RefusedACL    Refusal = "network-acl"
)

var refusals = [...]Refusal{
	bpfgen.FabricVerdictVERDICT_ACCEPT: Accepted,
	bpfgen.FabricVerdictVERDICT_GROUPS: RefusedGroups,
	bpfgen.FabricVerdictVERDICT_ACL:    RefusedACL,
}

// Record is what passed an interface, or was refused there, in one interval: all
// packets with the same addresses, ports, protocol, direction, verdict and way.
type Record struct {
	Interface *Logged
	Egress    bool // what its guest sends; otherwise what it receives
	Refused   Refusal
	// Path is AWS's number of the way of what is sent, 0 of what is received or
	// refused.
	Path                int
	Source, Destination netip.Addr // of the packets
	SourcePort          uint16     // 0 unless TCP or UDP
	DestinationPort     uint16
	Protocol            uint8
	Packets             uint64 // as on the wire
	Bytes               uint64 // IP lengths
	First, Last         time.Time
	// TCPFlags are FIN 1, SYN 2, RST 4 and SYN-ACK 18, or-ed, as AWS has them.
	TCPFlags int
}

// Skipped is what of an interface is in no record, for want of room.
type Skipped struct {
	Interface *Logged
	Egress    bool
	Refused   bool
	Packets   uint64
	Bytes     uint64
}

// Interval is what was recorded between two moments.
type Interval struct {
	Number  uint64
	Start   time.Time
	End     time.Time // zero: it still runs
	Records []Record
	Skipped []Skipped
	// Attached are the interfaces that were attached when this was read.
	Attached []*Logged
}

// record6 reads a record of IPv6.
func record6(k bpfgen.FabricRecordKey6, v bpfgen.FabricRecord, known map[uint32]*Logged, wall func(uint64) time.Time) Record {
	r := record(bpfgen.FabricRecordKey{
		Ifindex: k.Ifindex, Sport: k.Sport, Dport: k.Dport, Protocol: k.Protocol, Direction: k.Direction, Verdict: k.Verdict, Path: k.Path,
	}, v, known, wall)
	r.Source, r.Destination = address6(k.Saddr), address6(k.Daddr)
	return r
}

// record reads a record; known tells the interfaces.
func record(k bpfgen.FabricRecordKey, v bpfgen.FabricRecord, known map[uint32]*Logged, wall func(uint64) time.Time) Record {
	r := Record{
		Interface: known[k.Ifindex], Egress: k.Direction == uint8(bpfgen.FabricDirectionEGRESS), Path: int(k.Path),
		Source: address4(k.Saddr), Destination: address4(k.Daddr), SourcePort: k.Sport, DestinationPort: k.Dport, Protocol: k.Protocol,
		Packets: v.Packets, Bytes: v.Bytes, First: wall(v.First), Last: wall(v.Last),
	}
	if int(k.Verdict) < len(refusals) {
		r.Refused = refusals[k.Verdict]
	}
	for _, f := range []struct {
		seen uint8
		flag int
	}{{v.Fin, 1}, {v.Syn, 2}, {v.Rst, 4}, {v.SynAck, 18}} {
		if f.seen != 0 {
			r.TCPFlags |= f.flag
		}
	}
	return r
}

// logged is the port as flow records know it.
func (p *port) logged() bpfgen.FabricLogged {
	l := bpfgen.FabricLogged{Primary: be32(p.Primary)}
	chars(&l.Eni, string(p.ID))
	chars(&l.Subnet, string(p.Subnet))
	chars(&l.Vpc, string(p.Owner.VPC))
	chars(&l.Instance, string(p.Owner.Instance))
	chars(&l.Zone, p.Owner.Zone)
	return l
}

// chars writes a string into an array of C's, cut to what it holds.
func chars(to *[32]int8, s string) {
	for i := range min(len(s), len(to)-1) {
		to[i] = int8(s[i])
	}
}

func text32(b *[32]int8) string {
	var out []byte
	for _, c := range b {
		if c == 0 {
			break
		}
		out = append(out, byte(c))
	}
	return string(out)
}

// known reads which interfaces records can be of, by ifindex, and which of them
// are attached.
func (f *Fabric) known() (all map[uint32]*Logged, attached []*Logged, err error) {
	var raw map[uint32]bpfgen.FabricLogged
	if err := readMap(f.objs.LoggedEnis, &raw); err != nil {
		return nil, nil, err
	}
	all = make(map[uint32]*Logged, len(raw))
	for i, r := range raw {
		l := &Logged{
			ENI: vpc.ENIID(text32(&r.Eni)), Subnet: vpc.SubnetID(text32(&r.Subnet)), Primary: address4(r.Primary),
			Owner: Owner{VPC: vpc.VPCID(text32(&r.Vpc)), Instance: vpc.InstanceID(text32(&r.Instance)), Zone: text32(&r.Zone)},
		}
		all[i] = l
		there, err := f.attached(i)
		if err != nil {
			return nil, nil, err
		}
		if there {
			attached = append(attached, l)
		}
	}
	return all, attached, nil
}

// attached tells whether a fabric end has a record in map enis.
func (f *Fabric) attached(index uint32) (bool, error) {
	var e bpfgen.FabricEni
	err := f.objs.Enis.Lookup(index, &e)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for interface %d: %w", index, err)
	}
	return true, nil
}
