package vpcmodel

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// Names of objects; in a script any word does.
type (
	GatewayID string // an internet gateway
	ElasticID string // an Elastic IP
	NATID     string // a NAT gateway
)

// Internet is where packets from outside all VPCs come from, and go to.
const Internet vpc.ENIID = "internet"

// MTUs of gateways: "MTU 1500" of an internet gateway, "MTU 8500" of a NAT gateway.
const (
	GatewayMTU = 1500
	NATMTU     = 8500
)

// Gateway is an internet gateway. One that is detached, or deleted, stays in routes
// as their target.
type Gateway struct {
	ID    GatewayID
	VPC   vpc.VPCID // "" when detached
	Table TableID   // that "edge association" gave it, "" is none
}

// Elastic is an Elastic IP. The public address is the script's own: a cloud
// gives another.
type Elastic struct {
	ID      ElasticID
	Public  netip.Addr
	ENI     vpc.ENIID // "" when it is not associated with an interface
	NAT     NATID     // "" when it is no NAT gateway's
	Private netip.Addr
}

// NAT is a NAT gateway. A deleted one stays in routes as their target.
type NAT struct {
	ID      NATID
	Subnet  vpc.SubnetID
	Private netip.Addr // of its own interface
	Public  ElasticID  // "" is a private NAT gateway
	Deleted bool

	flows []*natFlow
	port  uint16 // that was given last
}

// natFlow is a translation. port stands for whichever of "1024-65535" it is given.
type natFlow struct {
	inside packet1
	port   uint16
	last   time.Duration
}

// packet1 is what a NAT gateway knows a flow by.
type packet1 struct {
	src, dst         netip.Addr
	proto            uint8
	srcPort, dstPort uint16 // an ICMP query has its identifier as the source port
}

func (n *NAT) cloned() []*natFlow {
	out := make([]*natFlow, len(n.flows))
	for i, f := range n.flows {
		c := *f
		out[i] = &c
	}
	return out
}

// natIdle: "idle 350 s then RST to the inside on next packet".
const natIdle = 350 * time.Second

// The statements on gateways, by what they do.
type (
	// MakeGateway makes an internet gateway and attaches it.
	MakeGateway struct {
		ID  GatewayID
		VPC vpc.VPCID
	}
	DetachGateway struct{ ID GatewayID }
	AttachGateway struct {
		ID  GatewayID
		VPC vpc.VPCID
	}
	// SetEdge gives a gateway a route table; "" takes it away.
	SetEdge struct {
		Gateway GatewayID
		Table   TableID
	}
	MakeElastic struct {
		ID     ElasticID
		Public netip.Addr
	}
	Associate struct {
		ID      ElasticID
		ENI     vpc.ENIID
		Private netip.Addr
	}
	Disassociate struct{ ID ElasticID }
	MakeNAT      struct {
		ID      NATID
		Subnet  vpc.SubnetID
		Private netip.Addr
		Public  ElasticID
	}
	DeleteNAT struct{ ID NATID }
	// Attach attaches a detached interface to the instance of another.
	Attach struct {
		ENI vpc.ENIID
		To  vpc.InstanceID
	}
)

func (s MakeGateway) Apply(w *World) error {
	if err := first(need("VPC", w.VPCs, s.VPC), fresh("gateway", w.Gateways, s.ID)); err != nil {
		return err
	}
	if w.gatewayOf(s.VPC) != nil {
		return fmt.Errorf("%s has an internet gateway", s.VPC)
	}
	w.Gateways[s.ID] = &Gateway{ID: s.ID, VPC: s.VPC}
	return nil
}

func (s DetachGateway) Apply(w *World) error {
	if err := need("gateway", w.Gateways, s.ID); err != nil {
		return err
	}
	g := w.Gateways[s.ID]
	if g.VPC == "" {
		return fmt.Errorf("%s is not attached", s.ID)
	}
	// EC2 refuses while the VPC has mapped public addresses.
	for _, e := range w.Elastics {
		if eni := w.ENIs[e.ENI]; eni != nil && w.vpcOf(eni) == g.VPC || e.NAT != "" && w.Subnets[w.NATs[e.NAT].Subnet].VPC == g.VPC {
			return fmt.Errorf("%s is associated in %s", e.ID, g.VPC)
		}
	}
	g.VPC, g.Table = "", ""
	return nil
}

func (s AttachGateway) Apply(w *World) error {
	if err := first(need("gateway", w.Gateways, s.ID), need("VPC", w.VPCs, s.VPC)); err != nil {
		return err
	}
	if w.Gateways[s.ID].VPC != "" || w.gatewayOf(s.VPC) != nil {
		return fmt.Errorf("%s is attached, or %s has another", s.ID, s.VPC)
	}
	w.Gateways[s.ID].VPC = s.VPC
	return nil
}

func (s SetEdge) Apply(w *World) error {
	if err := need("gateway", w.Gateways, s.Gateway); err != nil {
		return err
	}
	g := w.Gateways[s.Gateway]
	if s.Table != "" {
		t := w.Tables[s.Table]
		if t == nil || t.VPC != g.VPC {
			return fmt.Errorf("no table %s of %s's VPC", s.Table, s.Gateway)
		}
		// "targets local/ENI/GWLBe only; destinations whole VPC CIDR or whole
		// subnet CIDR".
		for _, r := range t.Routes {
			if r.ENI == "" || !w.whole(t.VPC, r.CIDR) {
				return fmt.Errorf("%s has the route %s, which a gateway's table cannot have", s.Table, r.dest())
			}
		}
	}
	g.Table = s.Table
	return nil
}

// whole reports whether c is a CIDR block of a VPC or of one of its subnets.
func (w *World) whole(v vpc.VPCID, c netip.Prefix) bool {
	for _, s := range w.Subnets {
		if s.VPC == v && (s.CIDR == c || s.CIDR6 == c) {
			return true
		}
	}
	return slices.Contains(w.VPCs[v].CIDRs, c)
}

func (s MakeElastic) Apply(w *World) error {
	if err := fresh("Elastic IP", w.Elastics, s.ID); err != nil {
		return err
	}
	w.Elastics[s.ID] = &Elastic{ID: s.ID, Public: s.Public}
	return nil
}

func (s Associate) Apply(w *World) error {
	if err := first(need("Elastic IP", w.Elastics, s.ID), need("interface", w.ENIs, s.ENI)); err != nil {
		return err
	}
	e := w.Elastics[s.ID]
	switch {
	case e.ENI != "" || e.NAT != "":
		return fmt.Errorf("%s is associated", s.ID)
	case !w.ENIs[s.ENI].holds(s.Private, true):
		return fmt.Errorf("%s does not have %s", s.ENI, s.Private)
	case w.gatewayOf(w.vpcOf(w.ENIs[s.ENI])) == nil:
		return fmt.Errorf("the VPC of %s has no internet gateway", s.ENI)
	}
	for _, o := range w.Elastics {
		if o.ENI == s.ENI && o.Private == s.Private {
			return fmt.Errorf("%s has %s", s.Private, o.ID)
		}
	}
	e.ENI, e.Private = s.ENI, s.Private
	return nil
}

func (s Disassociate) Apply(w *World) error {
	if err := need("Elastic IP", w.Elastics, s.ID); err != nil {
		return err
	}
	e := w.Elastics[s.ID]
	if e.ENI == "" {
		return fmt.Errorf("%s is not associated with an interface", s.ID)
	}
	e.ENI, e.Private = "", netip.Addr{}
	return nil
}

func (s MakeNAT) Apply(w *World) error {
	if err := first(need("subnet", w.Subnets, s.Subnet), fresh("NAT gateway", w.NATs, s.ID)); err != nil {
		return err
	}
	if err := w.free(s.Subnet, single(s.Private)); err != nil {
		return err
	}
	if s.Public != "" {
		if err := need("Elastic IP", w.Elastics, s.Public); err != nil {
			return err
		}
		e := w.Elastics[s.Public]
		if e.ENI != "" || e.NAT != "" {
			return fmt.Errorf("%s is associated", s.Public)
		}
		if w.gatewayOf(w.Subnets[s.Subnet].VPC) == nil {
			return fmt.Errorf("the VPC of %s has no internet gateway", s.Subnet)
		}
		e.NAT, e.Private = s.ID, s.Private
	}
	w.NATs[s.ID] = &NAT{ID: s.ID, Subnet: s.Subnet, Private: s.Private, Public: s.Public, port: 1023}
	return nil
}

func (s DeleteNAT) Apply(w *World) error {
	if err := need("NAT gateway", w.NATs, s.ID); err != nil {
		return err
	}
	n := w.NATs[s.ID]
	if n.Deleted {
		return fmt.Errorf("%s is deleted already", s.ID)
	}
	n.Deleted, n.flows = true, nil
	if e := w.Elastics[n.Public]; e != nil {
		e.NAT, e.Private = "", netip.Addr{}
	}
	return nil
}

func (s Attach) Apply(w *World) error {
	if err := need("interface", w.ENIs, s.ENI); err != nil {
		return err
	}
	e := w.ENIs[s.ENI]
	if e.Attached {
		return fmt.Errorf("%s is attached", s.ENI)
	}
	for _, o := range w.ENIs {
		if o.Instance == s.To && o.Attached {
			e.Attached, e.Instance = true, s.To
			return nil
		}
	}
	return fmt.Errorf("there is no instance %s", s.To)
}

func (s MakeGateway) String() string   { return fields("igw", s.ID, s.VPC) }
func (s DetachGateway) String() string { return fields("igwoff", s.ID) }
func (s AttachGateway) String() string { return fields("igwon", s.ID, s.VPC) }
func (s SetEdge) String() string       { return fields("edge", s.Gateway, s.Table) }
func (s MakeElastic) String() string   { return fields("elastic", s.ID, s.Public) }
func (s Associate) String() string     { return fields("associate", s.ID, s.ENI, s.Private) }
func (s Disassociate) String() string  { return fields("disassociate", s.ID) }
func (s MakeNAT) String() string       { return fields("nat", s.ID, s.Subnet, s.Private, s.Public) }
func (s DeleteNAT) String() string     { return fields("unnat", s.ID) }
func (s Attach) String() string        { return fields("attach", s.ENI, s.To) }

// optional is the next word, "" if there is none.
func (p *parser) optional() string {
	if len(p.words) == 0 {
		return ""
	}
	return p.word()
}

// gatewayStatement parses the statements on gateways; nil is none of them.
func (p *parser) gatewayStatement(verb string) Statement {
	switch verb {
	case "igw":
		return MakeGateway{GatewayID(p.word()), vpc.VPCID(p.word())}
	case "igwoff":
		return DetachGateway{GatewayID(p.word())}
	case "igwon":
		return AttachGateway{GatewayID(p.word()), vpc.VPCID(p.word())}
	case "edge":
		return SetEdge{GatewayID(p.word()), TableID(p.optional())}
	case "elastic":
		return MakeElastic{ElasticID(p.word()), p.addr()}
	case "associate":
		return Associate{ElasticID(p.word()), vpc.ENIID(p.word()), p.addr()}
	case "disassociate":
		return Disassociate{ElasticID(p.word())}
	case "nat":
		return MakeNAT{NATID(p.word()), vpc.SubnetID(p.word()), p.addr(), ElasticID(p.optional())}
	case "unnat":
		return DeleteNAT{NATID(p.word())}
	case "attach":
		return Attach{vpc.ENIID(p.word()), vpc.InstanceID(p.word())}
	}
	return nil
}

// gatewayOf returns the internet gateway of a VPC, or nil.
func (w *World) gatewayOf(v vpc.VPCID) *Gateway {
	for _, g := range w.Gateways {
		if g.VPC == v {
			return g
		}
	}
	return nil
}

// natAt returns the NAT gateway of a VPC that has an address, or nil.
func (w *World) natAt(v vpc.VPCID, a netip.Addr) *NAT {
	for _, n := range w.NATs {
		if !n.Deleted && w.Subnets[n.Subnet].VPC == v && n.Private == a {
			return n
		}
	}
	return nil
}

// elasticOf returns the Elastic IP of a private address of a VPC, or nil.
func (w *World) elasticOf(v vpc.VPCID, private netip.Addr) *Elastic {
	for _, e := range w.Elastics {
		if e.Private != private {
			continue
		}
		if eni := w.ENIs[e.ENI]; eni != nil && w.vpcOf(eni) == v {
			return e
		}
		if n := w.NATs[e.NAT]; n != nil && w.Subnets[n.Subnet].VPC == v {
			return e
		}
	}
	return nil
}

// elasticAt returns the Elastic IP with a public address, or nil.
func (w *World) elasticAt(public netip.Addr) *Elastic {
	for _, e := range w.Elastics {
		if e.Public == public {
			return e
		}
	}
	return nil
}

// private are the blocks that an internet gateway neither takes from outside nor
// sends there: "rejects RFC1918/6598 destinations".
var private = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("172.16.0.0/12"), netip.MustParsePrefix("192.168.0.0/16"), netip.MustParsePrefix("100.64.0.0/10"),
}

func isPrivate(a netip.Addr) bool {
	return slices.ContainsFunc(private, func(c netip.Prefix) bool { return c.Contains(a) })
}

// leave sends a packet of a subnet out by an internet gateway. to is where it came
// from within the VPC, for its record: an interface, or nil for a NAT gateway.
func (w *World) leave(e *ENI, s *Subnet, p *Packet, g *Gateway) Verdict {
	rules := []string{"route igw"}
	if rule, why := w.acl(s, Out, p); why != "" {
		w.note(e, Out, p, false, 0)
		return Verdict{Where: AtACLOut, Rule: "out " + rule, Rules: rules, Why: why}
	} else {
		rules = append(rules, "out "+rule)
	}
	w.note(e, Out, p, true, w.Settings.IGWPath)
	if p.Length > GatewayMTU && !p.MayFragment {
		return Verdict{Where: AtMTU, Rule: "mtu igw", Rules: rules, Told: GatewayMTU, Why: "longer than the internet gateway's MTU"}
	}
	public := w.elasticOf(s.VPC, p.Src)
	switch {
	case public == nil:
		// "rejects sources without public IP", and "drops traffic from a private NAT GW".
		return Verdict{Where: AtGateway, Rule: "igw source", Rules: rules, Why: "the source has no public address"}
	case isPrivate(p.Dst):
		return Verdict{Where: AtGateway, Rule: "igw destination", Rules: rules, Why: "the destination is private"}
	}
	seen := *p
	seen.Src = public.Public
	if p.About != nil && p.About.Dst == p.Src {
		about := *p.About
		about.Dst, seen.About = public.Public, &about
	}
	return Verdict{To: Internet, Rule: "igw out", Rules: append(rules, "igw out"), Seen: &seen}
}

// arrive takes a packet from the internet to a public address.
func (w *World) arrive(p *Packet) Verdict {
	public := w.elasticAt(p.Dst)
	if public == nil || public.ENI == "" && public.NAT == "" {
		return Verdict{Where: AtGateway, Rule: "igw nobody", Why: "nobody has the public address"}
	}
	var v vpc.VPCID
	if public.ENI != "" {
		v = w.vpcOf(w.ENIs[public.ENI])
	} else {
		v = w.Subnets[w.NATs[public.NAT].Subnet].VPC
	}
	g := w.gatewayOf(v)
	switch {
	case g == nil:
		return Verdict{Where: AtGateway, Rule: "igw detached", Why: "the VPC has no internet gateway"}
	case isPrivate(p.Src):
		return Verdict{Where: AtGateway, Rule: "igw private source", Why: "the source is private"}
	}
	seen := *p
	seen.Dst = public.Private
	if p.About != nil && p.About.Src == p.Dst {
		about := *p.About
		about.Src, seen.About = public.Private, &about
	}
	// "Edge association (gateway route table): targets local/ENI".
	kind := "edge local"
	to := w.holder(v, seen.Dst)
	led := false
	if t := w.Tables[g.Table]; t != nil {
		if r, _ := w.longest(w.VPCs[v], t, seen.Dst); r != nil {
			kind, to, led = "edge eni", w.ENIs[r.ENI], true
			if to == nil || !to.Attached {
				return Verdict{Where: AtRoute, Rule: "route " + kind, Why: "blackhole: the interface is not attached"}
			}
		}
	}
	if public.NAT != "" && !led {
		return w.answered(w.NATs[public.NAT], nil, nil, &seen)
	}
	if to == nil {
		return Verdict{Where: AtRoute, Rule: "route " + kind, Why: "no interface has the address"}
	}
	out := w.enter(nil, to, &seen, nil)
	out.Rules = append([]string{"igw in", "route " + kind}, out.Rules...)
	if out.Seen == nil {
		out.Seen = &seen
	}
	return out
}

// translate takes a packet of a subnet through a NAT gateway.
func (w *World) translate(e *ENI, s *Subnet, p *Packet, n *NAT) Verdict {
	rules := []string{"route nat"}
	home := w.Subnets[n.Subnet]
	why := ""
	if rules, why = w.cross(e, s, home, p, rules, pathTo(s, home)); why != "" {
		return Verdict{Where: why1(rules), Rule: last(rules), Rules: rules[:len(rules)-1], Why: why}
	}
	query := p.Proto == packet.ProtoICMP && answers[p.Proto][p.Type] != 0
	switch {
	case p.Length > NATMTU && !p.MayFragment:
		return Verdict{Where: AtMTU, Rule: "mtu nat", Rules: rules, Told: NATMTU, Why: "longer than the NAT gateway's MTU"}
	case !p.ports() && (p.Proto != packet.ProtoICMP || p.Type != 8 && !query):
		return Verdict{Where: AtNAT, Rule: "nat protocol", Rules: rules, Why: "TCP, UDP and ICMP alone"}
	case p.Fragments > 0 && p.Proto != packet.ProtoUDP:
		return Verdict{Where: AtNAT, Rule: "nat fragment", Rules: rules, Why: "no fragments but UDP's"}
	case !w.VPCs[home.VPC].Contains(p.Src):
		return Verdict{Where: AtNAT, Rule: "nat source", Rules: rules, Why: "the source is of another VPC"}
	}
	f, reset := n.flow(w, p)
	if reset {
		return Verdict{Where: AtNAT, Rule: "nat idle", Rules: rules, Why: "no such flow, or idle for 350 s: a reset answers"}
	}
	seen := *p
	seen.Src = n.Private
	if p.Proto == packet.ProtoICMP {
		seen.Ident = f.port
	} else {
		seen.SrcPort = f.port
	}
	h := w.route(home, &seen)
	var v Verdict
	switch {
	case h.why != "":
		v = Verdict{Where: AtRoute, Rule: "route " + h.rule, Why: h.why}
	case h.gateway != nil:
		v = w.leave(nil, home, &seen, h.gateway)
	case h.nat != nil:
		v = Verdict{Where: AtRoute, Rule: "route nat again", Why: "a NAT gateway behind a NAT gateway"}
	default:
		v = w.byNAT(home, h.eni, &seen)
		v.Rules = append([]string{"route " + h.rule}, v.Rules...)
	}
	if v.Seen == nil && v.Delivered() {
		v.Seen = &seen
	}
	v.Rules = append(append(rules, "nat out"), v.Rules...)
	v.NAT = n.ID
	return v
}

// flow finds the translation of a packet from inside, or makes one. reset is true
// when the flow was there and idle for too long.
func (n *NAT) flow(w *World, p *Packet) (f *natFlow, reset bool) {
	k := packet1{p.Src, p.Dst, p.Proto, p.SrcPort, p.DstPort}
	if p.Proto == packet.ProtoICMP {
		k.srcPort, k.dstPort = p.Ident, 0
	}
	for i, f := range n.flows {
		if f.inside != k {
			continue
		}
		if w.Now-f.last >= natIdle {
			n.flows = slices.Delete(n.flows, i, i+1)
			break
		}
		f.last = w.Now
		return f, false
	}
	if p.Proto == packet.ProtoTCP && p.Flags&(SYN|ACK) != SYN {
		return nil, true // what goes on with a flow that it does not know
	}
	n.port++
	f = &natFlow{k, n.port, w.Now}
	n.flows = append(n.flows, f)
	return f, false
}

// answered takes a packet that is for a NAT gateway's address, from a subnet or
// (nil) the internet, to the inside.
func (w *World) answered(n *NAT, e *ENI, from *Subnet, p *Packet) Verdict {
	home := w.Subnets[n.Subnet]
	var rules []string
	if from == nil {
		rules = append(rules, "igw in")
	}
	why := ""
	if rules, why = w.cross(e, from, home, p, rules, pathTo(from, home)); why != "" {
		return Verdict{Where: why1(rules), Rule: last(rules), Rules: rules[:len(rules)-1], Why: why}
	}
	port, ours := p.DstPort, p.SrcPort
	if p.Proto == packet.ProtoICMP {
		port, ours = p.Ident, 0
	}
	i := slices.IndexFunc(n.flows, func(f *natFlow) bool {
		return f.port == port && f.inside.proto == p.Proto && f.inside.dst == p.Src && f.inside.dstPort == ours && w.Now-f.last < natIdle
	})
	if i < 0 || p.About != nil {
		return Verdict{Where: AtNAT, Rule: "nat unasked", Rules: rules, Why: "nothing from inside asked for it"}
	}
	f := n.flows[i]
	f.last = w.Now
	seen := *p
	seen.Dst = f.inside.src
	if p.Proto == packet.ProtoICMP {
		seen.Ident = f.inside.srcPort
	} else {
		seen.DstPort = f.inside.srcPort
	}
	h := w.route(home, &seen)
	if h.eni == nil {
		return Verdict{Where: AtRoute, Rule: "route " + h.rule, Rules: rules, Why: "no way back inside: " + h.why}
	}
	v := w.byNAT(home, h.eni, &seen)
	v.Rules = append(append(rules, "nat in"), v.Rules...)
	if v.Seen == nil {
		v.Seen = &seen
	}
	v.NAT = n.ID
	return v
}

// cross judges a packet between two subnets by their ACLs; from nil is outside. Of
// a drop the last of rules is the kind of rule.
func (w *World) cross(e *ENI, from, to *Subnet, p *Packet, rules []string, path int) ([]string, string) {
	if from != nil && from.ID == to.ID {
		w.note(e, Out, p, true, path)
		return rules, ""
	}
	if from != nil {
		rule, why := w.acl(from, Out, p)
		w.note(e, Out, p, why == "", path)
		rules = append(rules, "out "+rule)
		if why != "" {
			return rules, why
		}
	}
	rule, why := w.acl(to, In, p)
	return append(rules, "in "+rule), why
}

// pathTo is the traffic-path to a NAT gateway's subnet: 1 "same VPC resource", 4
// "intra-region peering".
func pathTo(from, home *Subnet) int {
	if from != nil && from.VPC != home.VPC {
		return 4
	}
	return 1
}

func last(rules []string) string { return rules[len(rules)-1] }

// why1 is the place of a drop by an ACL.
func why1(rules []string) Where {
	if last(rules)[:2] == "in" {
		return AtACLIn
	}
	return AtACLOut
}

// byNAT is enter for what a NAT gateway sends: "Always tracked".
func (w *World) byNAT(home *Subnet, to *ENI, p *Packet) Verdict {
	w.tracksAll = true
	defer func() { w.tracksAll = false }()
	return w.enter(home, to, p, nil)
}
