package dns

import (
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// Two VPCs, 10.0.0.0/16 and 10.1.0.0/16, peered; the second lets the first see
// its private addresses.
const (
	clientENI vpc.ENIID = "eni-00000000000000001"
	peerENI   vpc.ENIID = "eni-00000000000000002"
)

type world struct {
	*store.Store
	t testing.TB
}

func newWorld(t testing.TB) *world {
	s, err := store.Open(filepath.Join(t.TempDir(), "state.db"), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	w := &world{s, t}
	w.change(func(tx *store.Tx) {
		for i, v := range []struct {
			id        vpc.VPCID
			subnet    vpc.SubnetID
			eni       vpc.ENIID
			net, addr string
		}{
			{"vpc-a", "subnet-a", clientENI, "10.0.0.0/16", "10.0.0.5"},
			{"vpc-b", "subnet-b", peerENI, "10.1.0.0/16", "10.1.0.5"},
		} {
			p := netip.MustParsePrefix(v.net)
			tx.PutVPC(&store.VPC{ID: v.id, VNI: uint32(i + 1), CIDRs: []store.CIDRAssociation{{CIDR: p}}, DNSSupport: true, DNSHostnames: true})
			tx.PutSubnet(&store.Subnet{ID: v.subnet, VPC: v.id, CIDR: netip.PrefixFrom(p.Addr(), 24), Zone: "us-east-1a"})
			a := netip.MustParseAddr(v.addr)
			tx.PutENI(&store.ENI{
				ID: v.eni, VPC: v.id, Subnet: v.subnet, Zone: "us-east-1a", MAC: "02:00:00:00:00:0" + string(rune('1'+i)), Primary: a,
				Secondary:  []netip.Addr{a.Next()},
				Attachment: &store.Attachment{ID: vpc.AttachmentID("eni-attach-" + string(rune('1'+i))), Instance: "i-0000000000000000" + vpc.InstanceID(rune('a'+i)), Status: store.Attached},
			})
			tx.PutInstance(&store.Instance{ID: "i-0000000000000000" + vpc.InstanceID(rune('a'+i)), Type: "m5.large", VPC: v.id, Subnet: v.subnet, State: store.Running})
		}
		tx.PutAddress(&store.Address{ID: "eipalloc-a", Public: netip.MustParseAddr("198.51.100.1"), Association: "eipassoc-a", ENI: clientENI, Private: netip.MustParseAddr("10.0.0.6")})
		tx.PutAddress(&store.Address{ID: "eipalloc-b", Public: netip.MustParseAddr("198.51.100.2"), Association: "eipassoc-b", ENI: peerENI, Private: netip.MustParseAddr("10.1.0.5")})
		tx.PutAddress(&store.Address{ID: "eipalloc-c", Public: netip.MustParseAddr("198.51.100.3")})
		tx.PutPeering(&store.Peering{ID: "pcx-1", Status: store.PeeringActive, Requester: store.PeeringSide{VPC: "vpc-a"}, Accepter: store.PeeringSide{VPC: "vpc-b", DNS: true}})
	})
	return w
}

func (w *world) change(fn func(tx *store.Tx)) {
	w.t.Helper()
	if err := w.Update(func(tx *store.Tx) error { fn(tx); return nil }); err != nil {
		w.t.Fatal(err)
	}
}

// look asks and returns the answer in words: the record's data, or what there
// was instead.
func (w *world) look(client vpc.ENIID, region, name string, kind uint16) string {
	query := new(dns.Msg).SetQuestion(dns.Fqdn(name), kind)
	m := Region{Name: region, Internet: netip.MustParseAddr("203.0.113.10")}.Answer(w.View(), client, query)
	if m == nil {
		return "silence"
	}
	if _, err := m.Pack(); err != nil {
		w.t.Errorf("%s: %v", name, err)
	}
	if !m.RecursionAvailable || m.Authoritative || m.Id != query.Id {
		w.t.Errorf("%s: flags %v", name, m.MsgHdr)
	}
	if len(m.Answer) == 1 {
		if h := m.Answer[0].Header(); h.Name != dns.Fqdn(name) || h.Ttl != 60 {
			w.t.Errorf("%s: answer is %v", name, h)
		}
		return strings.TrimPrefix(m.Answer[0].String(), m.Answer[0].Header().String())
	}
	if m.Rcode != dns.RcodeSuccess {
		return dns.RcodeToString[m.Rcode]
	}
	if len(m.Ns) != 1 || m.Ns[0].Header().Rrtype != dns.TypeSOA {
		w.t.Errorf("%s: nothing, and no SOA: %v", name, m)
	}
	return "nothing"
}

func TestAnswers(t *testing.T) {
	w := newWorld(t)
	a, ptr := dns.TypeA, dns.TypePTR
	tests := []struct {
		client       vpc.ENIID
		region, name string
		kind         uint16
		want         string
	}{
		{clientENI, "us-east-1", "ip-10-0-0-5.ec2.internal", a, "10.0.0.5"},
		{clientENI, "us-east-1", "IP-10-0-0-6.EC2.internal", a, "10.0.0.6"}, // secondary
		{clientENI, "us-east-1", "ip-10-0-0-5.ec2.internal", dns.TypeAAAA, "nothing"},
		{clientENI, "us-east-1", "ec2.internal", a, "nothing"},
		{clientENI, "us-east-1", "ip-10-0-0-9.ec2.internal", a, "NXDOMAIN"},  // nobody's
		{clientENI, "us-east-1", "ip-10-1-0-5.ec2.internal", a, "NXDOMAIN"},  // another VPC's
		{clientENI, "us-east-1", "ip-010-0-0-5.ec2.internal", a, "NXDOMAIN"}, // another way to write it is another name
		{clientENI, "us-east-1", "x.ip-10-0-0-5.ec2.internal", a, "NXDOMAIN"},
		{clientENI, "us-east-1", "ip-10-0-0-5.eu-west-1.compute.internal", a, "NXDOMAIN"},
		{clientENI, "eu-west-1", "ip-10-0-0-5.eu-west-1.compute.internal", a, "10.0.0.5"},
		{clientENI, "eu-west-1", "ip-10-0-0-5.ec2.internal", a, "NXDOMAIN"},
		{peerENI, "us-east-1", "ip-10-1-0-5.ec2.internal", a, "10.1.0.5"},
		{clientENI, "us-east-1", "5.0.0.10.in-addr.arpa", ptr, "ip-10-0-0-5.ec2.internal."},
		{clientENI, "eu-west-1", "6.0.0.10.in-addr.arpa", ptr, "ip-10-0-0-6.eu-west-1.compute.internal."},
		{clientENI, "us-east-1", "5.0.0.10.in-addr.arpa", a, "nothing"},
		{clientENI, "us-east-1", "9.0.0.10.in-addr.arpa", ptr, "NXDOMAIN"},
		{clientENI, "us-east-1", "1.1.168.192.in-addr.arpa", ptr, "NXDOMAIN"},
		{clientENI, "us-east-1", "0.10.in-addr.arpa", ptr, "NXDOMAIN"},
		{clientENI, "us-east-1", "1.100.51.198.in-addr.arpa", ptr, "ec2-198-51-100-1.compute-1.amazonaws.com."},
		{clientENI, "us-east-1", "3.100.51.198.in-addr.arpa", ptr, "SERVFAIL"}, // nobody has it
		{clientENI, "us-east-1", "8.8.8.8.in-addr.arpa", ptr, "SERVFAIL"},
		{clientENI, "us-east-1", "ec2-198-51-100-1.compute-1.amazonaws.com", a, "10.0.0.6"},         // within its VPC
		{peerENI, "us-east-1", "ec2-198-51-100-1.compute-1.amazonaws.com", a, "198.51.100.1"},       // its side of the peering does not let
		{clientENI, "us-east-1", "ec2-198-51-100-2.compute-1.amazonaws.com", a, "10.1.0.5"},         // this side does
		{clientENI, "eu-west-1", "ec2-198-51-100-1.eu-west-1.compute.amazonaws.com", a, "10.0.0.6"}, //
		{clientENI, "us-east-1", "ec2-198-51-100-3.compute-1.amazonaws.com", a, "NXDOMAIN"},         // not associated
		{clientENI, "us-east-1", "ec2-198-51-100-200.compute-1.amazonaws.com", a, "NXDOMAIN"},       // not allocated
		{clientENI, "us-east-1", "i-0000000000000000a.ec2.internal", a, "NXDOMAIN"},                 // not switched on
		{clientENI, "us-east-1", "internet.test", a, "203.0.113.10"},
		{clientENI, "us-east-1", "other.test", a, "NXDOMAIN"},
		{clientENI, "us-east-1", "example.com", a, "SERVFAIL"}, // nobody is asked
		{clientENI, "us-east-1", ".", dns.TypeNS, "SERVFAIL"},
		{"eni-00000000000000009", "us-east-1", "ip-10-0-0-5.ec2.internal", a, "silence"},
	}
	for _, tt := range tests {
		if got := w.look(tt.client, tt.region, tt.name, tt.kind); got != tt.want {
			t.Errorf("%s asks for %s %s: %s, want %s", tt.client, dns.TypeToString[tt.kind], tt.name, got, tt.want)
		}
	}
}

func TestAttributesOfTheVPC(t *testing.T) {
	w := newWorld(t)
	set := func(fn func(v *store.VPC)) {
		w.change(func(tx *store.Tx) { v := *tx.VPC("vpc-a"); fn(&v); tx.PutVPC(&v) })
	}
	want := func(name string, kind uint16, want string) {
		t.Helper()
		if got := w.look(clientENI, "us-east-1", name, kind); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
	set(func(v *store.VPC) { v.DNSHostnames = false })
	want("ip-10-0-0-5.ec2.internal", dns.TypeA, "NXDOMAIN")
	want("5.0.0.10.in-addr.arpa", dns.TypePTR, "NXDOMAIN")
	want("ec2-198-51-100-1.compute-1.amazonaws.com", dns.TypeA, "NXDOMAIN")
	want("internet.test", dns.TypeA, "203.0.113.10")
	set(func(v *store.VPC) { v.DNSHostnames, v.DNSSupport = true, false })
	want("ip-10-0-0-5.ec2.internal", dns.TypeA, "silence")
	set(func(v *store.VPC) { v.DNSSupport = true })

	instance := func(fn func(i *store.Instance)) {
		w.change(func(tx *store.Tx) { i := *tx.Instance("i-0000000000000000a"); fn(&i); tx.PutInstance(&i) })
	}
	instance(func(i *store.Instance) { i.HostType, i.ResourceNameA = "resource-name", true })
	want("i-0000000000000000a.ec2.internal", dns.TypeA, "10.0.0.5")
	want("i-0000000000000000b.ec2.internal", dns.TypeA, "NXDOMAIN")
	want("5.0.0.10.in-addr.arpa", dns.TypePTR, "i-0000000000000000a.ec2.internal.")
	want("6.0.0.10.in-addr.arpa", dns.TypePTR, "ip-10-0-0-6.ec2.internal.")
	want("ip-10-0-0-5.ec2.internal", dns.TypeA, "10.0.0.5")
}

// What is no plain question is refused in the words of the protocol.
func TestRefusals(t *testing.T) {
	w := newWorld(t)
	for name, change := range map[string]func(m *dns.Msg){
		"NOTIMP":  func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate },
		"FORMERR": func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) },
		"REFUSED": func(m *dns.Msg) { m.RecursionDesired = false },
	} {
		query := new(dns.Msg).SetQuestion("ip-10-0-0-5.ec2.internal.", dns.TypeA)
		change(query)
		if got := dns.RcodeToString[(Region{Name: "us-east-1"}).Answer(w.View(), clientENI, query).Rcode]; got != name {
			t.Errorf("%s, want %s", got, name)
		}
	}
}

// Whatever comes in a datagram, the answer fits what the sender takes, or there
// is none.
func FuzzAnswer(f *testing.F) {
	for _, q := range []*dns.Msg{
		new(dns.Msg).SetQuestion("ip-10-0-0-5.ec2.internal.", dns.TypeA),
		new(dns.Msg).SetQuestion("5.0.0.10.in-addr.arpa.", dns.TypePTR).SetEdns0(1232, true),
		new(dns.Msg).SetQuestion(".", dns.TypeANY),
	} {
		b, err := q.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	s := &Server{Region: Region{Name: "us-east-1"}, View: newWorld(f).View}
	f.Fuzz(func(t *testing.T, b []byte) {
		answer := s.answer(clientENI, b)
		if answer == nil {
			return
		}
		m := new(dns.Msg)
		if err := m.Unpack(answer); err != nil || !m.Response || len(answer) > maxUDP {
			t.Errorf("%d bytes, %v: %v", len(answer), err, m)
		}
	})
}

// A connection carries several queries; one that says nothing more ends.
func TestTCP(t *testing.T) {
	w := newWorld(t)
	l := listen(t)
	s := &Server{Region: Region{Name: "us-east-1"}, View: w.View}
	done := make(chan error, 1)
	go func() { done <- s.ServeTCP(clientENI, l) }()
	c, err := dns.DialTimeout("tcp", l.Addr().String(), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range 3 {
		if err := c.WriteMsg(new(dns.Msg).SetQuestion("ip-10-0-0-5.ec2.internal.", dns.TypeA)); err != nil {
			t.Fatal(err)
		}
		m, err := c.ReadMsg()
		if err != nil || len(m.Answer) != 1 {
			t.Fatalf("%v %v", m, err)
		}
	}
	l.Close()
	if err := <-done; err == nil {
		t.Error("a closed listener is served on")
	}
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}
