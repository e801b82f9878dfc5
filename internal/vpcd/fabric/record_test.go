package fabric

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// interval ends the running interval, and returns and discards what was in it.
func (l *lab) interval() *Interval {
	l.t.Helper()
	l.discards = true
	if err := l.EndInterval(); err != nil {
		l.t.Fatal(err)
	}
	numbers := l.EndedIntervals()
	if len(numbers) != 1 {
		l.t.Fatalf("intervals %v have ended", numbers)
	}
	i, err := l.ReadInterval(numbers[0])
	if err != nil {
		l.t.Fatal(err)
	}
	if err := l.DiscardInterval(numbers[0]); err != nil {
		l.t.Fatal(err)
	}
	return i
}

// lines are records as people read them, sorted; hosts have names.
func lines(i *Interval, names map[vpc.ENIID]string) []string {
	var out []string
	for _, r := range i.Records {
		way, action := "ingress", "ACCEPT"
		if r.Egress {
			way = fmt.Sprintf("egress path %d", r.Path)
		}
		if r.Refused != Accepted {
			action = "REJECT by " + string(r.Refused)
		}
		line := fmt.Sprintf("%s %s %s: %d %s:%d > %s:%d, %d packets %d bytes", names[r.Interface.ENI], way, action,
			r.Protocol, r.Source, r.SourcePort, r.Destination, r.DestinationPort, r.Packets, r.Bytes)
		if r.TCPFlags != 0 {
			line += fmt.Sprint(", flags ", r.TCPFlags)
		}
		out = append(out, line)
	}
	slices.Sort(out)
	return out
}

func TestRecords(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4", "10.0.0.10/32", "10.0.0.32/28")
	b := l.add(subnetB, "10.0.1.4")
	l.iface(a.eni).Owner = Owner{VPC: "vpc-1", Instance: "i-1", Zone: "us-east-1a"}
	web := []Rule{{Protocol: 6, From: 80, To: 80, Peers: everywhere}, {Protocol: 17, From: 53, To: 53, Peers: everywhere}, {Protocol: 1, From: -1, To: -1, Peers: everywhere}}
	b.groups(l.group(1, web, nil))
	names := map[vpc.ENIID]string{a.eni: "a", b.eni: "b"}
	closed := l.acl(9, nil, nil)
	l.set()
	pod := netip.MustParseAddr("10.0.0.40")
	first := with(dgram4(a.addr, b.addr, 7, 53), func(p []byte) { p[5], p[6] = 9, 0x20 })
	later := packet4(17, a.addr, b.addr, make([]byte, 16))
	later[5], later[7] = 9, 3
	quote := icmp4(b.addr, a.addr, 3, 3, 0, dgram4(a.addr, b.addr, 7, 53)...)

	for _, c := range []struct {
		name string
		do   func()
		want []string
	}{
		{"a connection, from a secondary address", func() {
			for _, f := range []byte{syn, ack, ack, fin | ack} {
				a.gated(b, tcp4(pod, b.addr, 4000, 80, f))
			}
			for _, f := range []byte{syn | ack, ack, fin | ack} {
				b.gated(a, tcp4(b.addr, pod, 80, 4000, f))
			}
		}, []string{
			"a egress path 1 ACCEPT: 6 10.0.0.40:4000 > 10.0.1.4:80, 4 packets 160 bytes, flags 3",
			"a ingress ACCEPT: 6 10.0.1.4:80 > 10.0.0.40:4000, 3 packets 120 bytes, flags 19",
			"b egress path 1 ACCEPT: 6 10.0.1.4:80 > 10.0.0.40:4000, 3 packets 120 bytes, flags 19",
			"b ingress ACCEPT: 6 10.0.0.40:4000 > 10.0.1.4:80, 4 packets 160 bytes, flags 3",
		}},
		{"refused by the receiver's groups", func() { a.gated(b, tcp4(a.addr, b.addr, 4001, 22, syn)) }, []string{
			"a egress path 1 ACCEPT: 6 10.0.0.4:4001 > 10.0.1.4:22, 1 packets 40 bytes, flags 2",
			"b ingress REJECT by security-group: 6 10.0.0.4:4001 > 10.0.1.4:22, 1 packets 40 bytes, flags 2",
		}},
		{"refused by the sender's groups", func() {
			b.gated(a, dgram4(b.addr, a.addr, 1, 2))
			b.gated(a, dgram4(b.addr, a.addr, 1, 2))
		}, []string{"b egress path 0 REJECT by security-group: 17 10.0.1.4:1 > 10.0.0.4:2, 2 packets 64 bytes"}},
		{"ICMP: no ports, the query's answer, the error", func() {
			a.gated(b, icmp4(a.addr, b.addr, 8, 0, 77))
			b.gated(a, icmp4(b.addr, a.addr, 0, 0, 77))
			a.gated(b, dgram4(a.addr, b.addr, 7, 53))
			b.gated(a, quote)
		}, []string{
			"a egress path 1 ACCEPT: 17 10.0.0.4:7 > 10.0.1.4:53, 1 packets 32 bytes",
			"a egress path 1 ACCEPT: 1 10.0.0.4:0 > 10.0.1.4:0, 1 packets 28 bytes",
			"a ingress ACCEPT: 1 10.0.1.4:0 > 10.0.0.4:0, 2 packets 88 bytes",
			"b egress path 1 ACCEPT: 1 10.0.1.4:0 > 10.0.0.4:0, 2 packets 88 bytes",
			"b ingress ACCEPT: 17 10.0.0.4:7 > 10.0.1.4:53, 1 packets 32 bytes",
			"b ingress ACCEPT: 1 10.0.0.4:0 > 10.0.1.4:0, 1 packets 28 bytes",
		}},
		{"fragments have the ports of their first", func() {
			a.gated(b, first)
			a.gated(b, later)
		}, []string{
			"a egress path 1 ACCEPT: 17 10.0.0.4:7 > 10.0.1.4:53, 2 packets 68 bytes",
			"b ingress ACCEPT: 17 10.0.0.4:7 > 10.0.1.4:53, 2 packets 68 bytes",
		}},
		{"no record of what neither group nor ACL refuses", func() {
			a.gated(b, dgram4(netip.MustParseAddr("10.0.0.99"), b.addr, 1, 53))
			a.gated(b, dgram4(a.addr, netip.MustParseAddr("10.0.1.99"), 1, 53))
		}, nil},
		{"a reply that an ACL drops", func() {
			a.gated(b, tcp4(a.addr, b.addr, 4002, 80, syn))
			l.subnet(subnetB).ACL = l.acl(8, []ACLEntry{{Protocol: AllProtocols, CIDR: everywhere[0], Allow: true}}, nil)
			l.set()
			b.gated(a, tcp4(b.addr, a.addr, 80, 4002, syn|ack))
		}, []string{
			"a egress path 1 ACCEPT: 6 10.0.0.4:4002 > 10.0.1.4:80, 1 packets 40 bytes, flags 2",
			"b egress path 0 REJECT by network-acl: 6 10.0.1.4:80 > 10.0.0.4:4002, 1 packets 40 bytes, flags 18",
			"b ingress ACCEPT: 6 10.0.0.4:4002 > 10.0.1.4:80, 1 packets 40 bytes, flags 2",
		}},
		{"a request that the receiver's ACL drops", func() {
			l.subnet(subnetB).ACL = closed
			l.set()
			a.gated(b, tcp4(a.addr, b.addr, 4003, 80, syn))
		}, []string{
			"a egress path 1 ACCEPT: 6 10.0.0.4:4003 > 10.0.1.4:80, 1 packets 40 bytes, flags 2",
			"b ingress REJECT by network-acl: 6 10.0.0.4:4003 > 10.0.1.4:80, 1 packets 40 bytes, flags 2",
		}},
	} {
		c.do()
		i := l.interval()
		slices.Sort(c.want)
		if d := cmp.Diff(c.want, lines(i, names)); d != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, d)
		}
		for _, r := range i.Records {
			if r.First.After(r.Last) || r.First.Before(i.Start.Add(-time.Second)) || r.Last.After(i.End.Add(time.Second)) {
				t.Errorf("%s: first %v, last %v, interval %v to %v", c.name, r.First, r.Last, i.Start, i.End)
			}
		}
		if len(i.Skipped) > 0 || len(i.Attached) != 2 {
			t.Errorf("%s: %d skipped, %d attached", c.name, len(i.Skipped), len(i.Attached))
		}
	}
	i, err := l.RunningInterval()
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range i.Attached {
		want := Logged{ENI: a.eni, Subnet: subnetA, Primary: a.addr, Owner: Owner{VPC: "vpc-1", Instance: "i-1", Zone: "us-east-1a"}}
		if e.ENI == a.eni && *e != want {
			t.Errorf("interface %+v, want %+v", *e, want)
		}
	}
}

// The traffic path is that of the route; behind the internet gateway stand the
// private addresses.
func TestRecordPaths(t *testing.T) {
	const peer = vpc.SubnetID("subnet-0000000000000000d")
	l := newLab(t)
	l.withInternet()
	l.cfg.Subnets = append(l.cfg.Subnets, Subnet{ID: peer, VNI: 2, CIDR: netip.MustParsePrefix("10.9.0.0/24"), Table: tableOther, ACL: aclOpen})
	l.cfg.Tables[0].Routes = append(l.cfg.Tables[0].Routes, Route{CIDR: netip.MustParsePrefix("10.9.0.0/16"), Peer: 2})
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(peer, "10.9.0.4")
	l.elastic(public(1), a.addr)
	l.set()
	a.gated(b, dgram4(a.addr, b.addr, 1, 2))
	a.run(l.objs.FromGuest, ethernet(RouterMAC, a.mac, 0x0800, dgram4(a.addr, internetAddr, 3, 4)), 0)
	want := []string{
		"a egress path 4 ACCEPT: 17 10.0.0.4:1 > 10.9.0.4:2, 1 packets 32 bytes",
		"a egress path 8 ACCEPT: 17 10.0.0.4:3 > " + internetAddr.String() + ":4, 1 packets 32 bytes",
		"b ingress ACCEPT: 17 10.0.0.4:1 > 10.9.0.4:2, 1 packets 32 bytes",
	}
	if d := cmp.Diff(want, lines(l.interval(), map[vpc.ENIID]string{a.eni: "a", b.eni: "b"})); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

// addsUp checks, at the end of each test of this package, that what is logged,
// exempt and skipped is what is counted, whatever was sent and judged meanwhile.
func (l *lab) addsUp() {
	l.t.Helper()
	if l.discards || l.t.Failed() {
		return
	}
	var wrong string
	for deadline := time.Now().Add(patience); ; <-time.After(10 * time.Millisecond) {
		if wrong = l.difference(); wrong == "" {
			return
		}
		if time.Now().After(deadline) { // what was under way has arrived by now
			l.t.Error(wrong)
			return
		}
	}
}

// difference says of which interfaces that are attached records and counters
// differ.
func (l *lab) difference() string {
	l.t.Helper()
	logged := map[uint32]*[4]uint64{}
	add := func(index uint32, direction uint8, packets, bytes uint64) {
		if logged[index] == nil {
			logged[index] = &[4]uint64{}
		}
		at := 2 * direction // EGRESS is 0
		logged[index][at] += packets
		logged[index][at+1] += bytes
	}
	for _, i := range append(slices.Clone(l.intervals.ended), l.intervals.running) {
		var records map[bpfgen.FabricRecordKey]bpfgen.FabricRecord
		if err := readMap(i.m, &records); err != nil {
			l.t.Fatal(err)
		}
		for k, v := range records {
			if k.Ifindex != 0 && k.Verdict == 0 {
				add(k.Ifindex, k.Direction, v.Packets, v.Bytes)
			}
		}
		var six map[bpfgen.FabricRecordKey6]bpfgen.FabricRecord
		if err := readMap(i.six, &six); err != nil {
			l.t.Fatal(err)
		}
		for k, v := range six {
			if k.Ifindex != 0 && k.Verdict == 0 {
				add(k.Ifindex, k.Direction, v.Packets, v.Bytes)
			}
		}
	}
	it := l.objs.Counts.Iterate()
	var (
		index  uint32
		perCPU []bpfgen.FabricCounters
		wrong  []string
	)
	for it.Next(&index, &perCPU) {
		var want [4]uint64
		for _, c := range perCPU {
			want[0] += c.TxPackets - c.ExemptTxPackets - c.SkippedTxPackets
			want[1] += c.TxBytes - c.ExemptTxBytes - c.SkippedTxBytes
			want[2] += c.RxPackets - c.ExemptRxPackets - c.SkippedRxPackets
			want[3] += c.RxBytes - c.ExemptRxBytes - c.SkippedRxBytes
		}
		have := [4]uint64{}
		if logged[index] != nil {
			have = *logged[index]
		}
		if have != want && index != 0 {
			wrong = append(wrong, fmt.Sprintf("device %d: logged %v, counted without exempt and skipped %v (packets and bytes sent, received)", index, have, want))
		}
	}
	if err := it.Err(); err != nil {
		l.t.Fatal(err)
	}
	return strings.Join(wrong, "\n")
}

// sums are packets and bytes of each ENI: what is in records that say ACCEPT and
// what was skipped, sent and received.
type sums map[vpc.ENIID]*[4]uint64 // tx packets, tx bytes, rx packets, rx bytes

func (s sums) add(e *Logged, egress bool, packets, bytes uint64) {
	if s[e.ENI] == nil {
		s[e.ENI] = &[4]uint64{}
	}
	at := 2
	if egress {
		at = 0
	}
	s[e.ENI][at] += packets
	s[e.ENI][at+1] += bytes
}

func (s sums) of(i *Interval) (skipped uint64) {
	for _, r := range i.Records {
		if r.Refused == Accepted {
			s.add(r.Interface, r.Egress, r.Packets, r.Bytes)
		}
	}
	for _, k := range i.Skipped {
		if !k.Refused {
			s.add(k.Interface, k.Egress, k.Packets, k.Bytes)
			skipped += k.Packets
		}
	}
	return skipped
}

// reconcile compares the sums and what is exempt with the counters.
func (l *lab) reconcile(s sums) {
	l.t.Helper()
	all, err := l.Counters()
	if err != nil {
		l.t.Fatal(err)
	}
	for eni, c := range all {
		if eni == "" {
			continue
		}
		have := s[eni]
		if have == nil {
			have = &[4]uint64{}
		}
		want := [4]uint64{c.TxPackets - c.ExemptTxPackets, c.TxBytes - c.ExemptTxBytes, c.RxPackets - c.ExemptRxPackets, c.RxBytes - c.ExemptRxBytes}
		if *have != want {
			l.t.Errorf("%s: logged and skipped %v, counted without exempt %v (packets and bytes sent, received)", eni, *have, want)
		}
	}
}

// Whatever is sent, and however little room there is: what is logged, exempt
// and skipped is what is counted.
func TestRecordsReconcile(t *testing.T) {
	l := newLab(t)
	l.shut()
	o := labOptions(l.name)
	o.Records = 40
	f, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	l.Fabric = f
	hosts := []*host{l.add(subnetA, "10.0.0.4", "10.0.0.32/28"), l.add(subnetA, "10.0.0.5"), l.add(subnetB, "10.0.1.4")}
	hosts[1].groups(l.group(1, []Rule{{Protocol: 6, From: 1, To: 90, Peers: everywhere}}, allTracked))
	l.set()
	l.interval() // the running one is as large as it was made
	random := rand.New(rand.NewPCG(1, 2))
	s := sums{}
	var skipped, records uint64
	for range 8 {
		for range 60 {
			from, to := hosts[random.IntN(3)], hosts[random.IntN(3)]
			p := udp4(from.addr, to.addr, 12+random.IntN(1200))
			gso := 0
			binary.BigEndian.PutUint16(p[22:], uint16(random.IntN(8)*20))
			if random.IntN(2) == 0 {
				p[9], p[32] = 6, 5<<4 // TCP
				gso = random.IntN(2) * 100
			}
			if random.IntN(6) == 0 {
				copy(p[16:], IMDSAddr.AsSlice())
			}
			from.run(l.objs.FromGuest, ethernet(RouterMAC, from.mac, 0x0800, p), gso)
			if random.IntN(6) == 0 {
				from.run(l.objs.ToGuest, ethernet(RouterMAC, RouterMAC, 0x0800, udp4(IMDSAddr, from.addr, 9)), 0)
			}
		}
		n, room, err := l.IntervalFill()
		if err != nil || room != 39 {
			t.Fatalf("fill %d of %d, %v", n, room, err)
		}
		i := l.interval()
		if len(i.Records) != n {
			t.Errorf("%d records read, %d counted", len(i.Records), n)
		}
		records += uint64(n)
		skipped += s.of(i)
	}
	l.reconcile(s)
	var counted uint64
	for _, h := range hosts {
		c := h.counters()
		counted += c.SkippedTxPackets + c.SkippedRxPackets
		if c.ExemptTxPackets == 0 || c.ExemptRxPackets == 0 {
			t.Errorf("%s has nothing exempt: %+v", h.eni, c)
		}
	}
	if skipped == 0 || records == 0 || counted != skipped {
		t.Errorf("%d records, %d packets skipped, %d by the counters", records, skipped, counted)
	}
}

// An interface that is gone keeps its name in the records of its time, and its
// number is nobody else's meanwhile.
func TestRecordsOfWhoIsGone(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetB, "10.0.1.4")
	l.set()
	a.gated(b, dgram4(a.addr, b.addr, 1, 2))
	// The last interface goes, and another comes in its stead.
	l.cfg.Interfaces = l.cfg.Interfaces[:1]
	l.set()
	c := l.add(subnetB, "10.0.1.5")
	l.shut()
	l.open()
	l.set()
	a.gated(c, dgram4(a.addr, c.addr, 3, 4))
	names := map[vpc.ENIID]string{a.eni: "a", b.eni: "b", c.eni: "c"}
	want := []string{
		"a egress path 1 ACCEPT: 17 10.0.0.4:1 > 10.0.1.4:2, 1 packets 32 bytes",
		"a egress path 1 ACCEPT: 17 10.0.0.4:3 > 10.0.1.5:4, 1 packets 32 bytes",
		"b ingress ACCEPT: 17 10.0.0.4:1 > 10.0.1.4:2, 1 packets 32 bytes",
		"c ingress ACCEPT: 17 10.0.0.4:3 > 10.0.1.5:4, 1 packets 32 bytes",
	}
	if d := cmp.Diff(want, lines(l.interval(), names)); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	known, attached, err := l.known()
	if err != nil || len(known) != 2 || len(attached) != 2 {
		t.Errorf("%d interfaces known, %d attached, %v; want the two that are left", len(known), len(attached), err)
	}
}

// udp makes a UDP socket in the guest.
func (h *host) udp(at netip.AddrPort) (c *net.UDPConn) {
	h.l.t.Helper()
	h.do(func() (err error) { c, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at)); return err })
	h.l.t.Cleanup(func() { c.Close() })
	return c
}

// Killed again and again while intervals end and packets pass, the process
// loses no record.
func TestRecordsSurviveKills(t *testing.T) {
	l := newLab(t)
	a := l.add(subnetA, "10.0.0.4")
	b := l.add(subnetB, "10.0.1.4")
	l.set()
	server := b.udp(netip.AddrPortFrom(b.addr, 5000))
	l.shut()
	stop, done := make(chan struct{}), make(chan uint64)
	client := a.udp(netip.AddrPortFrom(a.addr, 0))
	to := netip.AddrPortFrom(b.addr, uint16(server.LocalAddr().(*net.UDPAddr).Port))
	go func() {
		for n := uint64(0); ; {
			select {
			case <-stop:
				done <- n
				return
			default:
			}
			if _, err := client.WriteToUDPAddrPort([]byte("datagram"), to); err == nil {
				n++
			}
		}
	}()
	random := rand.New(rand.NewPCG(3, 4))
	for range 6 {
		p := l.spawn(endingIntervals)
		p.set(t, l.cfg)
		<-time.After(time.Duration(random.IntN(40)) * time.Millisecond) // a random moment to be killed at
		p.kill()
	}
	close(stop)
	sent := <-done
	l.open()
	l.discards = true
	l.set()
	for deadline := time.Now().Add(patience); a.counters().TxPackets != sent; <-time.After(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d datagrams have left", a.counters().TxPackets, sent)
		}
	}
	if err := l.EndInterval(); err != nil {
		t.Fatal(err)
	}
	s := sums{}
	numbers := l.EndedIntervals()
	for _, n := range numbers {
		i, err := l.ReadInterval(n)
		if err != nil {
			t.Fatal(err)
		}
		s.of(i)
		if err := l.DiscardInterval(n); err != nil {
			t.Fatal(err)
		}
	}
	l.reconcile(s)
	if len(numbers) < 6 || s[a.eni] == nil || s[a.eni][0] == 0 {
		t.Errorf("%d intervals, sums %v", len(numbers), s[a.eni])
	}
	if pins, err := os.ReadDir(filepath.Join(labOptions(l.name).BPFFS, layout, "intervals")); err != nil || len(pins) != 2 {
		t.Errorf("pins %v, %v; want the running interval's two", pins, err)
	}
	t.Logf("%d intervals, %d datagrams", len(numbers), sent)
}
