package differential

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
	"github.com/underlay-cni/underlay/test/vpcmodel"
)

// internetMAC is what the fabric's end of the internet has.
const internetMAC = "02:00:5e:00:00:02"

// openInternet opens the internet's end once there is one. All scripts share it.
func (s *stand) openInternet(c *cloud) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.internet != nil || len(c.world.Gateways) == 0 {
		return nil
	}
	var err error
	s.internet, err = openPort(fabric.NetnsPath("ul-"+s.name+"-internet"), internetMAC)
	return err
}

// applyGateway makes internet gateways, Elastic IPs and NAT gateways.
func (c *cloud) applyGateway(st vpcmodel.Statement) error {
	switch s := st.(type) {
	case vpcmodel.MakeGateway:
		if err := c.create(string(s.ID), []string{"internetGateway", "internetGatewayId"}, "CreateInternetGateway"); err != nil {
			return err
		}
		c.attachedTo[s.ID] = string(s.VPC)
		return c.do("AttachInternetGateway", "InternetGatewayId", id(c, s.ID), "VpcId", id(c, s.VPC))
	case vpcmodel.DetachGateway:
		return c.do("DetachInternetGateway", "InternetGatewayId", id(c, s.ID), "VpcId", c.ids[c.attachedTo[s.ID]])
	case vpcmodel.AttachGateway:
		c.attachedTo[s.ID] = string(s.VPC)
		return c.do("AttachInternetGateway", "InternetGatewayId", id(c, s.ID), "VpcId", id(c, s.VPC))
	case vpcmodel.SetEdge:
		return c.setEdge(s)
	case vpcmodel.MakeElastic:
		a, err := c.call("AllocateAddress", "Domain", "vpc")
		if err != nil {
			return err
		}
		c.ids[string(s.ID)] = a.text("allocationId")
		public, err := netip.ParseAddr(a.text("publicIp"))
		c.publics[s.Public] = public
		return err
	case vpcmodel.Associate:
		return c.create("association of "+string(s.ID), []string{"associationId"}, "AssociateAddress",
			"AllocationId", id(c, s.ID), "NetworkInterfaceId", id(c, s.ENI), "PrivateIpAddress", s.Private.String())
	case vpcmodel.Disassociate:
		return c.do("DisassociateAddress", "AssociationId", c.ids["association of "+string(s.ID)])
	case vpcmodel.MakeNAT:
		params := []string{"SubnetId", id(c, s.Subnet), "PrivateIpAddress", s.Private.String()}
		if s.Public == "" {
			params = append(params, "ConnectivityType", "private")
		} else {
			params = append(params, "AllocationId", id(c, s.Public))
		}
		if err := c.create(string(s.ID), []string{"natGateway", "natGatewayId"}, "CreateNatGateway", params...); err != nil {
			return err
		}
		return c.natIs(s.ID, "available")
	case vpcmodel.DeleteNAT:
		if err := c.do("DeleteNatGateway", "NatGatewayId", id(c, s.ID)); err != nil {
			return err
		}
		return c.natIs(s.ID, "deleted")
	}
	return fmt.Errorf("no call makes %q", st)
}

// natIs waits until a NAT gateway is in a state.
func (c *cloud) natIs(n vpcmodel.NATID, state string) error {
	deadline := time.Now().Add(20 * time.Second)
	for {
		a, err := c.call("DescribeNatGateways", "NatGatewayId.1", id(c, n))
		if err != nil {
			return err
		}
		now := a.text("natGatewaySet", "item", "state")
		if now == state {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("after 20 s %s is %s, not %s", n, now, state)
		}
		<-time.After(5 * time.Millisecond)
	}
}

func (c *cloud) setEdge(s vpcmodel.SetEdge) error {
	key := "edge of " + string(s.Gateway)
	switch old := c.ids[key]; {
	case s.Table == "":
		delete(c.ids, key)
		return c.do("DisassociateRouteTable", "AssociationId", old)
	case old != "":
		return c.create(key, []string{"newAssociationId"}, "ReplaceRouteTableAssociation", "AssociationId", old, "RouteTableId", id(c, s.Table))
	default:
		return c.create(key, []string{"associationId"}, "AssociateRouteTable", "GatewayId", id(c, s.Gateway), "RouteTableId", id(c, s.Table))
	}
}

// removeGateways deletes what applyGateway made.
func (c *cloud) removeGateways(try func(string, ...string)) error {
	for name := range c.world.Gateways {
		if edge := c.ids["edge of "+string(name)]; edge != "" {
			try("DisassociateRouteTable", "AssociationId", edge)
		}
	}
	for name, n := range c.world.NATs {
		if !n.Deleted && c.ids[string(name)] != "" {
			try("DeleteNatGateway", "NatGatewayId", id(c, name))
			if err := c.natIs(name, "deleted"); err != nil {
				return err
			}
		}
	}
	for name, e := range c.world.Elastics {
		if e.ENI != "" && c.ids["association of "+string(name)] != "" {
			try("DisassociateAddress", "AssociationId", c.ids["association of "+string(name)])
		}
		try("ReleaseAddress", "AllocationId", id(c, name))
	}
	for name, g := range c.world.Gateways {
		if g.VPC != "" {
			try("DetachInternetGateway", "InternetGatewayId", id(c, name), "VpcId", id(c, g.VPC))
		}
		try("DeleteInternetGateway", "InternetGatewayId", id(c, name))
	}
	return nil
}

// natPort names the port, or the identifier of ICMP queries, that a NAT gateway
// gave a flow, by the model's stand-in for it.
type natPort struct {
	nat   vpcmodel.NATID
	proto uint8
	model uint16
}

// real returns a packet of the model as it is on the wire: with the public
// addresses that the cloud gave, and the ports that NAT gateways chose.
func (r *runner) real(p *vpcmodel.Packet) *vpcmodel.Packet {
	q := *p
	q.Src, q.Dst = r.cloud.real(q.Src), r.cloud.real(q.Dst)
	if p.About != nil {
		about := *p.About
		about.Src, about.Dst = r.cloud.real(about.Src), r.cloud.real(about.Dst)
		q.About = &about
	}
	if p.From != vpcmodel.Internet {
		return &q
	}
	for _, e := range r.cloud.world.Elastics {
		if e.Public != p.Dst || e.NAT == "" {
			continue
		}
		port := &q.DstPort
		if p.Proto == packet.ProtoICMP {
			port = &q.Ident
		}
		if known, ok := r.natPorts[natPort{e.NAT, p.Proto, *port}]; ok {
			*port = known
		}
	}
	return &q
}

// translated is a datagram that arrives otherwise than it was sent.
type translated struct {
	index  int
	number uint32
	seen   vpcmodel.Packet
	nat    vpcmodel.NATID // whose choice of a source port is to be learnt, or ""
	cut    bool           // it may come in fragments
}

// numberOf finds the number that datagrams put at the end of a packet, 0 if there
// is none.
func numberOf(datagram []byte) uint32 {
	i := bytes.LastIndex(datagram, []byte(mark))
	if i < 0 || len(datagram) < i+len(mark)+4 {
		return 0
	}
	return binary.BigEndian.Uint32(datagram[i+len(mark):])
}

// match says how a datagram that was received stands to a translated one: "" if it
// is as it should be.
func (r *runner) match(t *translated, got []byte) string {
	if len(got) < 28 || packet.Checksum(0, got[:20]) != 0 {
		return "with a wrong checksum of its IP header"
	}
	want := t.seen
	if t.nat != "" {
		// The port is the gateway's choice: within its range, the same for the
		// whole flow.
		var port uint16
		own := &want.SrcPort
		switch want.Proto {
		case packet.ProtoICMP:
			port, own = binary.BigEndian.Uint16(got[24:]), &want.Ident
		default:
			port = binary.BigEndian.Uint16(got[20:])
		}
		key := natPort{t.nat, want.Proto, *own}
		known, ok := r.natPorts[key]
		switch {
		case ok && known != port:
			return fmt.Sprintf("from port %d, the flow's before was %d", port, known)
		case want.Proto != packet.ProtoICMP && port < 1024:
			return fmt.Sprintf("from port %d", port)
		}
		r.natPorts[key], *own = port, port
	}
	expect := datagrams(r.real(&want), t.number)[0]
	// A gateway may lower the TTL: no fact says whether.
	same := bytes.Clone(got)
	same[8] = expect[8]
	same[10], same[11] = 0, 0
	binary.BigEndian.PutUint16(same[10:], packet.Checksum(0, same[:20]))
	if t.cut {
		same[4], same[5], expect[4], expect[5] = 0, 0, 0, 0
		same[10], same[11], expect[10], expect[11] = 0, 0, 0, 0
	}
	if !bytes.Equal(same, expect) {
		return fmt.Sprintf("as %s > %s (%x, not %x)", addr(got[12:16]), addr(got[16:20]), same[:min(60, len(same))], expect[:min(60, len(expect))])
	}
	return ""
}

// told reads an ICMP error that says a packet was too long, from the router of the
// sender's subnet: its MTU, and the head of the packet that it is about.
func told(datagram []byte) (mtu int, from netip.Addr, about []byte) {
	if len(datagram) < 56 || datagram[9] != packet.ProtoICMP || datagram[20] != 3 || datagram[21] != 4 || packet.Checksum(0, datagram[20:]) != 0 {
		return 0, netip.Addr{}, nil
	}
	return int(binary.BigEndian.Uint16(datagram[26:])), addr(datagram[12:16]), datagram[28:]
}

// pieces puts fragments together that a gateway made.
type pieces map[string][][]byte

// add takes a fragment and returns the whole datagram once all are there.
func (p pieces) add(d []byte) ([]byte, error) {
	offset := binary.BigEndian.Uint16(d[6:])
	if offset&0x3fff == 0 {
		return d, nil
	}
	if len(d) > vpcmodel.GatewayMTU {
		return nil, errors.New("a fragment is longer than the MTU")
	}
	key := string(d[4:6]) + string(d[9:10]) + string(d[12:20])
	p[key] = append(p[key], bytes.Clone(d))
	total, have := -1, 0
	for _, f := range p[key] {
		at := binary.BigEndian.Uint16(f[6:])
		have += len(f) - 20
		if at&0x2000 == 0 {
			total = int(at&0x1fff)*8 + len(f) - 20
		}
	}
	if total != have {
		return nil, nil
	}
	body := make([]byte, total)
	for _, f := range p[key] {
		copy(body[int(binary.BigEndian.Uint16(f[6:])&0x1fff)*8:], f[20:])
	}
	delete(p, key)
	return ip(addr(d[12:16]), addr(d[16:20]), d[9], binary.BigEndian.Uint16(d[4:]), 0, body), nil
}

// expected is what the model says of a packet in the words of outcome.received.
func expected(v vpcmodel.Verdict) string {
	if isService(v) {
		return toService
	}
	text := string(v.To)
	if v.Told > 0 {
		text += fmt.Sprintf(" told %d", v.Told)
	}
	return strings.TrimSpace(text)
}
