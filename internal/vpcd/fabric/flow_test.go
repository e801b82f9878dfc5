package fabric

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// clientServer makes a client whose group lets it send what rule says and a
// server whose group lets that in; nothing goes the other way but answers.
func clientServer(t testing.TB, rule Rule) (l *lab, a, b *host) {
	l = newLab(t)
	a = l.add(subnetA, "10.0.0.4")
	b = l.add(subnetB, "10.0.1.4")
	a.groups(l.group(1, nil, []Rule{rule}))
	b.groups(l.group(2, []Rule{rule}, nil))
	l.set()
	return l, a, b
}

var (
	anyTCP  = Rule{Protocol: 6, From: Any, To: Any, Peers: prefixes("10.0.0.0/16")}
	anyUDP  = Rule{Protocol: 17, From: Any, To: Any, Peers: prefixes("10.0.0.0/16")}
	anyICMP = Rule{Protocol: 1, From: Any, To: Any, Peers: prefixes("10.0.0.0/16")}
)

// wants sends a packet and checks what becomes of it.
func (h *host) wants(o *host, what string, packet []byte, want DropReason) {
	h.l.t.Helper()
	if got := h.gated(o, packet); got != want {
		h.l.t.Errorf("%s: dropped for %q, want %q", what, got, want)
	}
}

func TestAnswersPass(t *testing.T) {
	for name, c := range map[string]struct {
		rule                       Rule
		request, answer, different func(a, b netip.Addr) []byte // the last two from b to a
	}{
		"TCP": {anyTCP,
			func(a, b netip.Addr) []byte { return tcp4(a, b, 1000, 80, syn) },
			func(a, b netip.Addr) []byte { return tcp4(b, a, 80, 1000, syn|ack) },
			func(a, b netip.Addr) []byte { return tcp4(b, a, 80, 1001, syn|ack) }},
		"UDP": {anyUDP,
			func(a, b netip.Addr) []byte { return dgram4(a, b, 1000, 53) },
			func(a, b netip.Addr) []byte { return dgram4(b, a, 53, 1000) },
			func(a, b netip.Addr) []byte { return dgram4(b, a, 54, 1000) }},
		"echo": {anyICMP,
			func(a, b netip.Addr) []byte { return icmp4(a, b, 8, 0, 7) },
			func(a, b netip.Addr) []byte { return icmp4(b, a, 0, 0, 7) },
			func(a, b netip.Addr) []byte { return icmp4(b, a, 0, 0, 8) }},
		"echo the other way": {anyICMP,
			func(a, b netip.Addr) []byte { return icmp4(a, b, 8, 0, 7) },
			func(a, b netip.Addr) []byte { return icmp4(b, a, 0, 0, 7) },
			func(a, b netip.Addr) []byte { return icmp4(b, a, 8, 0, 7) }},
		"timestamp": {anyICMP,
			func(a, b netip.Addr) []byte { return icmp4(a, b, 13, 0, 7) },
			func(a, b netip.Addr) []byte { return icmp4(b, a, 14, 0, 7) },
			func(a, b netip.Addr) []byte { return icmp4(b, a, 0, 0, 7) }},
		"GRE": {Rule{Protocol: 47, Peers: prefixes("10.0.0.0/16")},
			func(a, b netip.Addr) []byte { return packet4(47, a, b, make([]byte, 4)) },
			func(a, b netip.Addr) []byte { return packet4(47, b, a, make([]byte, 40)) },
			func(a, b netip.Addr) []byte { return packet4(50, b, a, make([]byte, 40)) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l, a, b := clientServer(t, c.rule)
			b.wants(a, "answer before the request", c.answer(a.addr, b.addr), SGEgress)
			a.wants(b, "request", c.request(a.addr, b.addr), "")
			if n := l.flowCount(); n != 2 {
				t.Errorf("%d flows, want one at each interface", n)
			}
			b.wants(a, "answer", c.answer(a.addr, b.addr), "")
			b.wants(a, "another answer", c.answer(a.addr, b.addr), "")
			b.wants(a, "what was not asked for", c.different(a.addr, b.addr), SGEgress)
		})
	}
}

// TestAnswerNobodyAskedFor: an unsolicited ICMP answer that rules allow opens
// no way back for a query.
func TestAnswerNobodyAskedFor(t *testing.T) {
	l, a, b := clientServer(t, anyICMP)
	a.wants(b, "unsolicited answer", icmp4(a.addr, b.addr, 0, 0, 7), "")
	b.wants(a, "query", icmp4(b.addr, a.addr, 8, 0, 7), SGEgress)
	if n := l.flowCount(); n != 0 {
		t.Errorf("%d flows", n)
	}
}

// TestRuleChanges is the matrix of {tracked, untracked} × {rule removed, rule
// narrowed, groups of the ENI changed} × {TCP, UDP, ICMP}.
func TestRuleChanges(t *testing.T) {
	changes := map[string]func(l *lab, a, b *host, r Rule){
		"removed": func(l *lab, a, b *host, _ Rule) {
			l.group(2, nil, all)
		},
		"narrowed": func(l *lab, a, b *host, r Rule) {
			r.Peers = prefixes("10.0.0.5/32")
			l.group(2, []Rule{r}, all)
		},
		"groups changed": func(l *lab, a, b *host, _ Rule) {
			b.groups(l.group(3, nil, all))
		},
	}
	for name, c := range map[string]struct {
		protocol int
		packet   func(from, to netip.Addr, answer bool) []byte
	}{
		"TCP": {6, func(from, to netip.Addr, answer bool) []byte {
			if answer {
				return tcp4(from, to, 80, 1000, ack)
			}
			return tcp4(from, to, 1000, 80, ack)
		}},
		"UDP": {17, func(from, to netip.Addr, answer bool) []byte {
			if answer {
				return dgram4(from, to, 80, 1000)
			}
			return dgram4(from, to, 1000, 80)
		}},
		"ICMP": {1, func(from, to netip.Addr, answer bool) []byte {
			if answer {
				return icmp4(from, to, 0, 0, 7)
			}
			return icmp4(from, to, 8, 0, 7)
		}},
	} {
		for _, peers := range []string{"10.0.0.0/16", "0.0.0.0/0"} {
			// For all of IPv4, with everything open the other way, only TCP and
			// UDP go untracked.
			tracked := peers != "0.0.0.0/0" || c.protocol == 1
			for change, make := range changes {
				t.Run(fmt.Sprintf("%s from %s, %s", name, peers, change), func(t *testing.T) {
					t.Parallel()
					l := newLab(t)
					a := l.add(subnetA, "10.0.0.4")
					b := l.add(subnetB, "10.0.1.4")
					r := Rule{Protocol: c.protocol, From: Any, To: Any, Peers: prefixes(peers)}
					a.groups(l.group(1, allTracked, allTracked))
					b.groups(l.group(2, []Rule{r}, all))
					l.set()
					a.wants(b, "request", c.packet(a.addr, b.addr, false), "")
					b.wants(a, "answer", c.packet(b.addr, a.addr, true), "")
					make(l, a, b, r)
					l.set()
					want := SGIngress
					if tracked {
						want = ""
					}
					a.wants(b, "request after the change", c.packet(a.addr, b.addr, false), want)
					b.wants(a, "answer after the change", c.packet(b.addr, a.addr, true), "") // b may send anything
					l.forgetFlows()
					a.wants(b, "new request", c.packet(a.addr, b.addr, false), SGIngress)
					// The rule comes back, and with it an untracked flow.
					b.groups(l.group(2, []Rule{r}, all))
					l.set()
					a.wants(b, "request after the rule is back", c.packet(a.addr, b.addr, false), "")
				})
			}
		}
	}
}

// TestUntracked: only what both directions allow to and from everywhere.
func TestUntracked(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetB, "10.0.1.4")
	a.groups(l.group(1, allTracked, allTracked))
	b.groups(testGroup(2))
	web := Rule{Protocol: 6, From: 80, To: 80, Peers: everywhere}
	for _, c := range []struct {
		name    string
		in, out []Rule
		packet  []byte
		tracked bool
	}{
		{"TCP, egress all", []Rule{web}, all, tcp4(a.addr, b.addr, 1, 80, syn), false},
		{"TCP, all both ways", all, all, tcp4(a.addr, b.addr, 1, 80, syn), false},
		{"TCP, egress all TCP", []Rule{web}, []Rule{{Protocol: 6, From: 0, To: 65535, Peers: everywhere}}, tcp4(a.addr, b.addr, 1, 80, syn), false},
		{"TCP, egress all UDP", []Rule{web}, []Rule{{Protocol: 17, From: 0, To: 65535, Peers: everywhere}}, tcp4(a.addr, b.addr, 1, 80, syn), true},
		{"TCP, egress not all ports", []Rule{web}, []Rule{{Protocol: 6, From: 1, To: 65535, Peers: everywhere}}, tcp4(a.addr, b.addr, 1, 80, syn), true},
		{"TCP, no egress", []Rule{web}, nil, tcp4(a.addr, b.addr, 1, 80, syn), true},
		{"TCP, egress to the VPC", []Rule{web}, []Rule{{Protocol: AllProtocols, Peers: prefixes("10.0.0.0/16")}}, tcp4(a.addr, b.addr, 1, 80, syn), true},
		{"TCP, ingress from the VPC", []Rule{{Protocol: 6, From: 80, To: 80, Peers: prefixes("10.0.0.0/16")}}, all, tcp4(a.addr, b.addr, 1, 80, syn), true},
		{"TCP, a narrow rule beside the wide one", []Rule{{Protocol: 6, From: 80, To: 80, Peers: prefixes("10.0.0.4/32")}, web}, all, tcp4(a.addr, b.addr, 1, 80, syn), false},
		{"UDP", []Rule{{Protocol: 17, From: 53, To: 53, Peers: everywhere}}, all, dgram4(a.addr, b.addr, 1, 53), false},
		{"ICMP", all, all, icmp4(a.addr, b.addr, 8, 0, 1), true},
		{"GRE", all, all, packet4(47, a.addr, b.addr, make([]byte, 4)), true},
	} {
		l.group(2, c.in, c.out)
		l.set()
		l.forgetFlows()
		a.wants(b, c.name, c.packet, "")
		err := eachFlow(l.objs.Flows, func(k bpfgen.FabricFlowKey, v bpfgen.FabricFlow) error {
			if k.Local == be32(b.addr) && (v.Version == 0) != c.tracked {
				t.Errorf("%s: version %x, want tracked %v", c.name, v.Version, c.tracked)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestUntrackedAfterAnotherChange: an untracked flow stays one when some other
// rule changes, whichever of its packets comes first, and an error about it passes.
func TestUntrackedAfterAnotherChange(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetB, "10.0.1.4")
	a.groups(l.group(1, allTracked, allTracked))
	b.groups(testGroup(2))
	for _, c := range []struct {
		name            string
		protocol        int
		request, answer []byte
	}{
		{"UDP", 17, dgram4(a.addr, b.addr, 1000, 80), dgram4(b.addr, a.addr, 80, 1000)},
		{"TCP", 6, tcp4(a.addr, b.addr, 1000, 80, syn), tcp4(b.addr, a.addr, 80, 1000, syn|ack)},
	} {
		web := Rule{Protocol: c.protocol, From: 80, To: 80, Peers: everywhere}
		other := Rule{Protocol: 47, Peers: prefixes("192.0.2.0/24")}
		back := []Rule{{Protocol: c.protocol, From: 0, To: 65535, Peers: everywhere}}
		l.group(2, []Rule{web}, back)
		l.set()
		l.forgetFlows()
		a.wants(b, c.name+" request", c.request, "")
		l.group(2, []Rule{web, other}, back)
		l.set()
		b.wants(a, c.name+" error", icmp4(b.addr, a.addr, 3, 3, 0, c.request...), "")
		b.wants(a, c.name+" answer", c.answer, "")
		l.group(2, []Rule{other}, back)
		l.set()
		a.wants(b, c.name+" request without its rule", c.request, SGIngress)
		b.wants(a, c.name+" error without its rule", icmp4(b.addr, a.addr, 3, 3, 0, c.request...), SGEgress)
	}
}

// TestIdleTimeouts lets flows be idle for a second less than their time, and
// then for a second more.
func TestIdleTimeouts(t *testing.T) {
	type step struct {
		answer bool
		flags  byte
	}
	request, answer := step{}, step{answer: true}
	packet := func(protocol int, a, b *host, s step) (from, to *host, p []byte) {
		from, to = a, b
		client, server := uint16(1000), uint16(80)
		if s.answer {
			from, to = b, a
			client, server = server, client
		}
		switch protocol {
		case 6:
			return from, to, tcp4(from.addr, to.addr, client, server, s.flags)
		case 17:
			return from, to, dgram4(from.addr, to.addr, client, server)
		case 1:
			kind := byte(8)
			if s.answer {
				kind = 0
			}
			return from, to, icmp4(from.addr, to.addr, kind, 0, 7)
		}
		return from, to, packet4(byte(protocol), from.addr, to.addr, make([]byte, 4))
	}
	handshake := []step{{flags: syn}, {answer: true, flags: syn | ack}, {flags: ack}}
	for name, c := range map[string]struct {
		protocol int
		timeouts IdleTimeouts
		before   []step
		idle     time.Duration
	}{
		"SYN alone":                   {6, IdleTimeouts{}, handshake[:1], 60 * time.Second},
		"SYN and its answer":          {6, IdleTimeouts{}, handshake[:2], 60 * time.Second},
		"established":                 {6, IdleTimeouts{}, handshake, 432000 * time.Second},
		"established, set":            {6, IdleTimeouts{TCPEstablished: 350 * time.Second}, handshake, 350 * time.Second},
		"established, seen in mid":    {6, IdleTimeouts{}, []step{{flags: ack}, {answer: true, flags: ack}}, 432000 * time.Second},
		"one FIN":                     {6, IdleTimeouts{}, append(handshake[:3:3], step{flags: fin | ack}), 432000 * time.Second},
		"both FIN":                    {6, IdleTimeouts{}, append(handshake[:3:3], step{flags: fin | ack}, step{answer: true, flags: fin | ack}, step{flags: ack}), 10 * time.Second},
		"RST":                         {6, IdleTimeouts{}, append(handshake[:3:3], step{answer: true, flags: rst}), 10 * time.Second},
		"UDP, one way":                {17, IdleTimeouts{}, []step{request, request, request}, 30 * time.Second},
		"UDP, one answer":             {17, IdleTimeouts{}, []step{request, answer}, 30 * time.Second},
		"UDP, two requests, one more": {17, IdleTimeouts{}, []step{request, request, answer}, 30 * time.Second},
		"UDP, set":                    {17, IdleTimeouts{UDP: 60 * time.Second}, []step{request, answer}, 60 * time.Second},
		"UDP stream":                  {17, IdleTimeouts{}, []step{request, answer, request, answer}, 180 * time.Second},
		"UDP stream, set":             {17, IdleTimeouts{UDPStream: 60 * time.Second}, []step{request, answer, request, answer}, 60 * time.Second},
		"ICMP":                        {1, IdleTimeouts{}, []step{request, answer}, 30 * time.Second},
		"GRE":                         {47, IdleTimeouts{}, []step{request}, 600 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l, a, b := clientServer(t, Rule{Protocol: c.protocol, From: Any, To: Any, Peers: prefixes("10.0.0.0/16")})
			l.iface(a.eni).Timeouts, l.iface(b.eni).Timeouts = c.timeouts, c.timeouts
			l.set()
			begin := func() {
				for _, s := range c.before {
					from, to, p := packet(c.protocol, a, b, s)
					from.wants(to, "at first", p, "")
				}
			}
			_, _, late := packet(c.protocol, a, b, step{answer: true, flags: ack})
			begin()
			l.after(c.idle - time.Second)
			if n, err := l.ExpireFlows(); n != 0 || err != nil {
				t.Errorf("%d flows expired, %v", n, err)
			}
			b.wants(a, "a second before", late, "")
			l.forgetFlows()
			begin()
			l.after(c.idle + time.Second)
			b.wants(a, "a second after", late, SGEgress)
			if n, err := l.ExpireFlows(); n != 2 || err != nil {
				t.Errorf("%d flows expired, %v, want both interfaces'", n, err)
			}
			if n := l.flowCount(); n != 0 {
				t.Errorf("%d flows left", n)
			}
		})
	}
}

// TestActivityKeepsFlows: each packet of either direction begins the idle time
// anew.
func TestActivityKeepsFlows(t *testing.T) {
	l, a, b := clientServer(t, anyUDP)
	a.wants(b, "request", dgram4(a.addr, b.addr, 1, 2), "")
	for range 5 {
		l.after(29 * time.Second)
		b.wants(a, "answer", dgram4(b.addr, a.addr, 2, 1), "")
	}
}

// TestSYNAfterClose: the same ports make another connection, which rules judge.
func TestSYNAfterClose(t *testing.T) {
	l, a, b := clientServer(t, anyTCP)
	for i, end := range [][]byte{nil, {rst}} {
		a.wants(b, "SYN", tcp4(a.addr, b.addr, 1, 2, syn), "")
		b.wants(a, "SYN ACK", tcp4(b.addr, a.addr, 2, 1, syn|ack), "")
		a.wants(b, "ACK", tcp4(a.addr, b.addr, 1, 2, ack), "")
		if end == nil {
			a.wants(b, "FIN", tcp4(a.addr, b.addr, 1, 2, fin|ack), "")
			b.wants(a, "FIN", tcp4(b.addr, a.addr, 2, 1, fin|ack), "")
			a.wants(b, "last ACK", tcp4(a.addr, b.addr, 1, 2, ack), "")
		} else {
			b.wants(a, "RST", tcp4(b.addr, a.addr, 2, 1, rst), "")
		}
		b.wants(a, "SYN from the server", tcp4(b.addr, a.addr, 2, 1, syn), SGEgress)
		if i == 1 {
			l.group(2, nil, nil)
			l.set()
			a.wants(b, "SYN after the rule is gone", tcp4(a.addr, b.addr, 1, 2, syn), SGIngress)
		}
	}
}

// TestErrorsOfFlows: ICMP errors pass as part of the flow that they are about.
func TestErrorsOfFlows(t *testing.T) {
	for _, tracked := range []bool{true, false} {
		l := newLab(t)
		a := l.add(subnetA, "10.0.0.4")
		b := l.add(subnetB, "10.0.1.4")
		web := Rule{Protocol: 17, From: 53, To: 53, Peers: everywhere}
		back := Rule{Protocol: 17, From: 0, To: 65535, Peers: everywhere}
		if tracked {
			web.Peers, back.Peers = prefixes("10.0.0.0/16"), nil
		}
		a.groups(l.group(1, []Rule{back}, []Rule{web}))
		b.groups(l.group(2, []Rule{web}, []Rule{back}))
		l.set()
		request := dgram4(a.addr, b.addr, 1000, 53)
		for _, kind := range []byte{3, 4, 11, 12} {
			unreachable := icmp4(b.addr, a.addr, kind, 0, 0, request...)
			l.forgetFlows()
			b.wants(a, "error about nothing", unreachable, SGEgress)
			a.wants(b, "request", request, "")
			b.wants(a, "error", unreachable, "")
			b.wants(a, "error about another flow", icmp4(b.addr, a.addr, kind, 0, 0, dgram4(a.addr, b.addr, 1001, 53)...), SGEgress)
			b.wants(a, "error about a packet of its own", icmp4(b.addr, a.addr, kind, 0, 0, dgram4(b.addr, a.addr, 53, 1000)...), SGEgress)
			b.wants(a, "error cut short", icmp4(b.addr, a.addr, kind, 0, 0, request[:24]...), SGEgress)
			a.wants(b, "error about an answer", icmp4(a.addr, b.addr, kind, 0, 0, dgram4(b.addr, a.addr, 53, 1000)...), "")
		}
		b.wants(a, "echo with a packet inside", icmp4(b.addr, a.addr, 8, 0, 0, request...), SGEgress)
		if tracked {
			l.group(2, nil, nil)
			l.set()
			b.wants(a, "error after the rule is gone", icmp4(b.addr, a.addr, 3, 3, 0, request...), "")
		} else {
			l.group(2, nil, []Rule{back})
			l.set()
			b.wants(a, "error after the rule is gone", icmp4(b.addr, a.addr, 3, 3, 0, request...), SGEgress)
		}
	}
	// An error about a query.
	_, a, b := clientServer(t, Rule{Protocol: 1, From: 8, To: Any, Peers: prefixes("10.0.0.0/16")})
	query := icmp4(a.addr, b.addr, 8, 0, 7)
	b.wants(a, "error about nothing", icmp4(b.addr, a.addr, 3, 1, 0, query...), SGEgress)
	a.wants(b, "query", query, "")
	b.wants(a, "error about the query", icmp4(b.addr, a.addr, 3, 1, 0, query...), "")
}

// TestFragments: those without ports follow the one that has them.
func TestFragments(t *testing.T) {
	l, a, b := clientServer(t, Rule{Protocol: 17, From: 53, To: 53, Peers: prefixes("10.0.0.0/16")})
	fragment := func(p []byte, id, offset uint16, more bool) []byte {
		return with(p, func(p []byte) {
			binary.BigEndian.PutUint16(p[4:], id)
			if more {
				offset |= 0x2000
			}
			binary.BigEndian.PutUint16(p[6:], offset)
		})
	}
	allowed, refused := dgram4(a.addr, b.addr, 1000, 53), dgram4(a.addr, b.addr, 1000, 54)
	a.wants(b, "later fragment before the first", fragment(allowed, 1, 100, true), Fragment)
	a.wants(b, "first fragment", fragment(allowed, 1, 0, true), "")
	a.wants(b, "second fragment", fragment(allowed, 1, 100, true), "")
	a.wants(b, "last fragment", fragment(allowed, 1, 200, false), "")
	a.wants(b, "fragment of another datagram", fragment(allowed, 2, 100, false), Fragment)
	a.wants(b, "fragment of another protocol", with(fragment(allowed, 1, 100, false), func(p []byte) { p[9] = 6 }), Fragment)
	a.wants(b, "first fragment of what is refused", fragment(refused, 3, 0, true), SGEgress)
	a.wants(b, "its second", fragment(refused, 3, 100, false), Fragment)
	// A payload that looks like ports is none.
	a.wants(b, "later fragment that looks allowed", fragment(allowed, 3, 100, false), Fragment)
	l.after(31 * time.Second)
	a.wants(b, "too late", fragment(allowed, 1, 300, false), Fragment)
	// An answer's fragments.
	a.wants(b, "request", allowed, "")
	b.wants(a, "answer's first fragment", fragment(dgram4(b.addr, a.addr, 53, 1000), 9, 0, true), "")
	b.wants(a, "answer's second", fragment(dgram4(b.addr, a.addr, 53, 1000), 9, 100, false), "")
	// Too short for ports: nobody judges that.
	a.wants(b, "first fragment without ports", fragment(packet4(17, a.addr, b.addr, make([]byte, 4)), 5, 0, true), Malformed)
}

// TestFlowsFull: when there is no room, what must be tracked does not begin,
// and what there is goes on.
func TestFlowsFull(t *testing.T) {
	l, a, b := clientServer(t, anyUDP)
	c := l.add(subnetA, "10.0.0.9")
	l.set()
	a.wants(b, "request", dgram4(a.addr, b.addr, 1, 2), "")
	capacity := int(l.objs.Flows.MaxEntries())
	keys := make([]bpfgen.FabricFlowKey, 0, capacity)
	for n := range capacity - l.flowCount() {
		keys = append(keys, bpfgen.FabricFlowKey{Ifindex: 1 << 30, Local: uint32(n), Protocol: 17})
	}
	if _, err := l.objs.Flows.BatchUpdate(keys, make([]bpfgen.FabricFlow, len(keys)), nil); err != nil {
		t.Fatal(err)
	}
	a.wants(b, "new flow", dgram4(a.addr, b.addr, 3, 2), FlowsFull)
	a.wants(b, "old flow", dgram4(a.addr, b.addr, 1, 2), "")
	b.wants(a, "its answer", dgram4(b.addr, a.addr, 2, 1), "")
	a.wants(b, "what is not allowed", tcp4(a.addr, b.addr, 3, 2, syn), SGEgress)
	// Untracked, it needs no entry.
	a.groups(groupOpen)
	l.set()
	a.wants(c, "untracked flow", dgram4(a.addr, c.addr, 3, 2), "")
	n, err := l.ExpireFlows()
	if n != len(keys) || err != nil {
		t.Errorf("%d expired, want %d: %v", n, len(keys), err)
	}
	a.wants(b, "new flow after room was made", dgram4(a.addr, b.addr, 3, 2), "")
}

// TestFlowsEndWithInterface: who gets the ifindex of an interface that is gone
// does not get its flows.
func TestFlowsEndWithInterface(t *testing.T) {
	for _, restart := range []bool{false, true} {
		l, a, b := clientServer(t, anyUDP)
		a.wants(b, "request", dgram4(a.addr, b.addr, 1, 2), "")
		l.iface(b.eni).MAC = net.HardwareAddr{2, 0xbb, 0, 0, 0, 1}
		b.mac = l.iface(b.eni).MAC
		if restart {
			// As if a process had died after it deleted the device.
			devices, err := l.route.devices(false)
			if err != nil {
				t.Fatal(err)
			}
			name, _ := device(b.eni)
			for _, d := range devices {
				if d.name == name {
					if err := l.route.remove(d.index); err != nil {
						t.Fatal(err)
					}
				}
			}
			l.shut()
			l.open()
		}
		l.set()
		if n := l.flowCount(); n != 1 {
			t.Errorf("%d flows, want the one of the interface that stays", n)
		}
		b.wants(a, "answer of the new interface", dgram4(b.addr, a.addr, 2, 1), SGEgress)
	}
}

// TestFlowsSurviveRestart keeps a TCP connection over a restart of the process,
// and over the removal of the rule that let it begin.
func TestFlowsSurviveRestart(t *testing.T) {
	l, a, b := clientServer(t, Rule{Protocol: 6, From: 7000, To: 7000, Peers: prefixes("10.0.0.0/16")})
	ln := b.listen(netip.AddrPortFrom(b.addr, 7000))
	go func() {
		c, err := ln.Accept()
		if err == nil {
			_, _ = io.Copy(c, c)
		}
	}()
	c := a.dial(netip.AddrPortFrom(a.addr, 0), netip.AddrPortFrom(b.addr, 7000))
	echo := func(when string) {
		t.Helper()
		if _, err := c.Write([]byte(when)); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		buf := make([]byte, len(when))
		if _, err := io.ReadFull(c, buf); err != nil || string(buf) != when {
			t.Fatalf("%s: %q, %v", when, buf, err)
		}
	}
	echo("at first")
	l.shut()
	echo("without a process")
	l.open()
	echo("after Open")
	l.group(1, nil, nil)
	l.group(2, nil, nil)
	l.set()
	echo("without the rules")
	b.counts(SGEgress, func() { // nor does b's own begin
		b.do(func() error {
			d := net.Dialer{Timeout: refusal}
			if c, err := d.Dial("tcp4", netip.AddrPortFrom(a.addr, 1).String()); err == nil {
				c.Close()
				return errors.New("a connection that no rule allows")
			}
			return nil
		})
	})
	a.counts(SGEgress, func() {
		err := nl.Do(NetnsPath(a.ns), func() error {
			d := net.Dialer{Timeout: refusal}
			c, err := d.Dial("tcp4", netip.AddrPortFrom(b.addr, 7000).String())
			if err == nil {
				c.Close()
			}
			return err
		})
		if err == nil {
			t.Error("a second connection without rules")
		}
	})
	echo("at last")
}

// TestBigDatagrams sends datagrams that a kernel cuts into fragments and puts
// together again.
func TestBigDatagrams(t *testing.T) {
	_, a, b := clientServer(t, anyUDP)
	open := func(h *host, port uint16) *net.UDPConn {
		var c *net.UDPConn
		h.do(func() (err error) {
			c, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(h.addr, port)))
			return err
		})
		t.Cleanup(func() { c.Close() })
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		return c
	}
	client, server := open(a, 1000), open(b, 53)
	big := make([]byte, 40000)
	if _, err := client.WriteToUDPAddrPort(big, netip.AddrPortFrom(b.addr, 53)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<16)
	n, from, err := server.ReadFromUDPAddrPort(buf)
	if err != nil || n != len(big) {
		t.Fatalf("%d bytes arrived: %v", n, err)
	}
	if _, err := server.WriteToUDPAddrPort(buf[:n], from); err != nil {
		t.Fatal(err)
	}
	if n, _, err = client.ReadFromUDPAddrPort(buf); err != nil || n != len(big) {
		t.Fatalf("%d bytes came back: %v", n, err)
	}
}

// TestServicesAreExempt: without any rule, the fabric's services answer.
func TestServicesAreExempt(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetA, "10.0.0.5")
	a.groups()
	b.groups()
	l.set()
	for _, at := range []netip.AddrPort{netip.AddrPortFrom(IMDSAddr, 80), netip.AddrPortFrom(EndpointAddr, 7424)} {
		ln, err := l.ListenTCP(a.eni, at)
		if err != nil {
			t.Fatal(err)
		}
		go serve(ln, a.eni, 0)
		c := a.dial(netip.AddrPortFrom(a.addr, 0), at)
		if got, err := io.ReadAll(c); err != nil || len(got) == 0 {
			t.Errorf("%s answered %q, %v", at, got, err)
		}
	}
	a.wants(b, "to a neighbour", dgram4(a.addr, b.addr, 1, 2), SGEgress)
	if n := l.flowCount(); n != 0 {
		t.Errorf("%d flows", n)
	}
}

// TestExpireIsAboutNow: a flow that began anew while its predecessor was being
// expired stays.
func TestExpireIsAboutNow(t *testing.T) {
	l, a, b := clientServer(t, anyUDP)
	a.wants(b, "request", dgram4(a.addr, b.addr, 1, 2), "")
	l.after(31 * time.Second)
	a.wants(b, "request again", dgram4(a.addr, b.addr, 1, 2), "")
	if n, err := l.ExpireFlows(); n != 0 || err != nil {
		t.Errorf("%d expired, %v", n, err)
	}
	b.wants(a, "answer", dgram4(b.addr, a.addr, 2, 1), "")
	l.shut()
	if _, err := (&Fabric{}).ExpireFlows(); err == nil {
		t.Error("a closed fabric expired flows")
	}
	l.open()
	var unused bpfgen.FabricFlow
	if err := l.objs.Flows.Lookup(bpfgen.FabricFlowKey{}, &unused); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Errorf("lookup of no flow: %v", err)
	}
}
