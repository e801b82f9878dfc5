package flowlog

import (
	"encoding/json"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/underlay-cni/underlay/internal/packet"
)

var (
	epoch = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	web   = Interface{Addr: netip.MustParseAddr("10.0.0.21"), Namespace: "shop", Pod: "web-1", ENI: "eni-0000000000000000a", Primary: netip.MustParseAddr("10.0.0.9"), Subnet: "subnet-1"}
	api   = Interface{Addr: netip.MustParseAddr("10.0.0.22"), Namespace: "shop", Pod: "api-1", ENI: "eni-0000000000000000a", Primary: netip.MustParseAddr("10.0.0.9"), Subnet: "subnet-1"}
)

func at(seconds int) time.Time { return epoch.Add(time.Duration(seconds) * time.Second) }

func tuple(src, dst netip.Addr, sport, dport uint16) packet.FiveTuple {
	return packet.FiveTuple{Src: src, Dst: dst, SrcPort: sport, DstPort: dport, Proto: packet.ProtoTCP}
}

// Both pods of one node make records of a connection between them, and a second
// step records only what came after the first.
func TestStepBothSides(t *testing.T) {
	ask := tuple(web.Addr, api.Addr, 40000, 8080)
	conn := Conn{
		Tuple: ask, Created: at(1), Last: at(3), From: 1, To: 2,
		Sent: Side{Counts{5, 300}, syn | ack | fin}, Answers: Side{Counts{4, 4000}, syn | ack},
		Egress: Verdict{Text: "allow", Rule: "sgr-1"}, Ingress: Verdict{Text: "allow", Rule: "sgr-2"},
	}
	counters := map[int]Reading{
		1: {web, Totals{Sent: Counts{5, 300}, Received: Counts{4, 4000}}},
		2: {api, Totals{Sent: Counts{4, 4000}, Received: Counts{5, 300}}},
	}
	var l Log
	got := l.Step(Sample{At: at(60), Interfaces: counters, Conns: []Conn{conn}})
	want := []Record{
		{Interface: web, Start: at(1), End: at(3), Direction: Egress, Tuple: ask, Packets: 5, Bytes: 300, TCPFlags: 3, Accepted: true, Verdict: conn.Egress},
		{Interface: web, Start: at(1), End: at(3), Direction: Ingress, Tuple: ask.Reverse(), Packets: 4, Bytes: 4000, TCPFlags: 18, Accepted: true, Verdict: conn.Egress},
		{Interface: api, Start: at(1), End: at(3), Direction: Egress, Tuple: ask.Reverse(), Packets: 4, Bytes: 4000, TCPFlags: 18, Accepted: true, Verdict: conn.Ingress},
		{Interface: api, Start: at(1), End: at(3), Direction: Ingress, Tuple: ask, Packets: 5, Bytes: 300, TCPFlags: 3, Accepted: true, Verdict: conn.Ingress},
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Fatalf("-want +got:\n%s", diff)
	}

	conn.Answers = Side{Counts{6, 6000}, syn | ack | fin}
	conn.Last = at(70)
	counters[1] = Reading{web, Totals{Sent: Counts{5, 300}, Received: Counts{6, 6000}}}
	counters[2] = Reading{api, Totals{Sent: Counts{6, 6000}, Received: Counts{5, 300}}}
	got = l.Step(Sample{At: at(120), Interfaces: counters, Conns: []Conn{conn}})
	want = []Record{
		{Interface: web, Start: at(60), End: at(70), Direction: Ingress, Tuple: ask.Reverse(), Packets: 2, Bytes: 2000, TCPFlags: 1, Accepted: true, Verdict: conn.Egress},
		{Interface: api, Start: at(60), End: at(70), Direction: Egress, Tuple: ask.Reverse(), Packets: 2, Bytes: 2000, TCPFlags: 1, Accepted: true, Verdict: conn.Ingress},
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Fatalf("-want +got:\n%s", diff)
	}
}

// What a pod may not send is refused at the pod and reaches nobody; what another
// may not receive was sent, and is refused there.
func TestStepDenied(t *testing.T) {
	ask := tuple(web.Addr, api.Addr, 40000, 8080)
	deny := Verdict{Text: "deny", Rule: "default"}
	both := func(sent, refused1, received, refused2 uint64) map[int]Reading {
		n := func(packets uint64) Counts { return Counts{packets, 60 * packets} }
		return map[int]Reading{1: {web, Totals{Sent: n(sent), Refused: n(refused1)}}, 2: {api, Totals{Received: n(received), Refused: n(refused2)}}}
	}
	conn := Conn{Tuple: ask, Created: at(1), Last: at(3), From: 1, To: 2, Sent: Side{Counts{3, 180}, syn}, Egress: deny, EgressDenied: true}
	var l Log
	got := l.Step(Sample{At: at(60), Interfaces: both(0, 3, 0, 0), Conns: []Conn{conn}})
	want := []Record{
		{Interface: web, Start: at(1), End: at(3), Direction: Egress, Tuple: ask, Packets: 3, Bytes: 180, TCPFlags: 2, Verdict: deny},
		{Interface: api, Status: NoData, End: at(60)},
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	conn.Egress, conn.EgressDenied, conn.Ingress, conn.IngressDenied = Verdict{Text: "allow"}, false, deny, true
	l = Log{}
	got = l.Step(Sample{At: at(60), Interfaces: both(3, 0, 0, 3), Conns: []Conn{conn}})
	want = []Record{
		{Interface: web, Start: at(1), End: at(3), Direction: Egress, Tuple: ask, Packets: 3, Bytes: 180, TCPFlags: 2, Accepted: true, Verdict: conn.Egress},
		{Interface: api, Start: at(1), End: at(3), Direction: Ingress, Tuple: ask, Packets: 3, Bytes: 180, TCPFlags: 2, Verdict: deny},
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// What the counters have and no connection tells of is waited for, then skipped, once; an
// interval without packets is remarked on.
func TestStepRemarks(t *testing.T) {
	counters := map[int]Reading{1: {web, Totals{Sent: Counts{10, 1000}, Received: Counts{2, 100}, Refused: Counts{3, 180}, Exempt: Counts{2, 100}}}}
	refused := []Refusal{{On: 1, Direction: Egress, Tuple: tuple(web.Addr, api.Addr, 1, 2), Counts: Counts{3, 180}, Flags: syn, First: at(5), Last: at(9),
		Verdict: Verdict{Text: "deny", Rule: "default"}}}
	var l Log
	got := l.Step(Sample{At: at(60), Interfaces: counters, Refused: refused})
	want := []Record{
		{Interface: web, Start: at(5), End: at(9), Direction: Egress, Tuple: refused[0].Tuple, Packets: 3, Bytes: 180, TCPFlags: 2, Verdict: refused[0].Verdict},
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Fatalf("-want +got:\n%s", diff)
	}
	got = l.Step(Sample{At: at(120), Interfaces: counters})
	want = []Record{{Interface: web, Status: SkipData, Start: at(60), End: at(120), Packets: 10, Bytes: 1000}}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Fatalf("-want +got:\n%s", diff)
	}
	got = l.Step(Sample{At: at(180), Interfaces: counters})
	want = []Record{{Interface: web, Status: NoData, Start: at(120), End: at(180)}}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Fatalf("-want +got:\n%s", diff)
	}
}

// Whatever connections come, go unseen between two steps, or begin again with
// the same tuple, and wherever the Log is put away and taken up again: recorded,
// exempt and skipped packets are those that the interface counted.
func TestStepAddsUp(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 1))
		var l Log
		totals := Totals{}
		var conns []Conn
		var recorded, skipped Counts
		for step := range 20 {
			now := at(60 * (step + 1))
			var ended, twice []Conn
			for range r.IntN(30) {
				n := Counts{1 + r.Uint64N(9), 40 + r.Uint64N(9000)}
				switch r.IntN(5) {
				case 0: // a connection begins; a few tuples, so that they come again
					conns = append(conns, Conn{Tuple: tuple(web.Addr, api.Addr, uint16(r.IntN(4)), 80), From: 1, ID: r.Uint64(), Created: now.Add(-time.Duration(r.IntN(59e9)))})
				case 1:
					totals.Exempt, totals.Sent = totals.Exempt.add(n), totals.Sent.add(n)
				case 2:
					if len(conns) > 0 { // one ends; unseen, what it counted since the last step is lost
						i := r.IntN(len(conns))
						if r.IntN(2) == 0 {
							ended = append(ended, conns[i])
							if r.IntN(4) == 0 { // the sample has it in both places
								twice = append(twice, conns[i])
							}
						}
						conns = append(conns[:i:i], conns[i+1:]...)
					}
				default:
					if len(conns) > 0 {
						c := &conns[r.IntN(len(conns))]
						if r.IntN(2) == 0 {
							c.Sent.Counts, totals.Sent = c.Sent.add(n), totals.Sent.add(n)
						} else {
							c.Answers.Counts, totals.Received = c.Answers.add(n), totals.Received.add(n)
						}
						c.Last = now
					}
				}
			}
			for _, rec := range l.Step(Sample{At: now, Interfaces: map[int]Reading{1: {web, totals}}, Conns: append(twice, conns...), Ended: ended}) {
				switch rec.Status {
				case OK:
					recorded = recorded.add(Counts{rec.Packets, rec.Bytes})
				case SkipData:
					skipped = skipped.add(Counts{rec.Packets, rec.Bytes})
				}
			}
			if got, want := recorded.add(skipped).add(totals.Exempt).add(l.Ports[0].Open), totals.Sent.add(totals.Received); got != want {
				t.Fatalf("seed %d, step %d: recorded %v + skipped %v + exempt %v = %v, the interface counted %v", seed, step, recorded, skipped, totals.Exempt, got, want)
			}
			if r.IntN(3) == 0 {
				text, err := json.Marshal(l)
				if err != nil {
					t.Fatal(err)
				}
				l = Log{}
				if err := json.Unmarshal(text, &l); err != nil {
					t.Fatal(err)
				}
			}
		}
		for i := range 2 {
			for _, rec := range l.Step(Sample{At: at(60 * (22 + i)), Interfaces: map[int]Reading{1: {web, totals}}, Conns: conns}) {
				if rec.Status == SkipData {
					skipped = skipped.add(Counts{rec.Packets, rec.Bytes})
				}
			}
		}
		if got, want := recorded.add(skipped).add(totals.Exempt), totals.Sent.add(totals.Received); got != want {
			t.Fatalf("seed %d: recorded and skipped are %v in the end, the interface counted %v", seed, got, want)
		}
		if recorded.Packets == 0 {
			t.Fatalf("seed %d: nothing was recorded", seed)
		}
	}
}

func TestFlags(t *testing.T) {
	for _, tc := range []struct {
		seen  uint8
		first bool
		want  uint8
	}{
		{syn, true, 2}, {syn | ack, true, 2}, {syn | ack, false, 18}, {ack, false, 0}, {ack | 0x08, true, 0},
		{syn | ack | fin, true, 3}, {syn | ack | fin, false, 19}, {rst, true, 4}, {rst | ack, false, 4},
	} {
		if got := Flags(tc.seen, tc.first); got != tc.want {
			t.Errorf("Flags(%#x, %t) = %d, want %d", tc.seen, tc.first, got, tc.want)
		}
	}
}

// Who keeps a log by its changes has the log.
func TestChanges(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	var l, kept Log
	conns := map[int]*Conn{}
	counters := map[int]Reading{}
	for step := range 200 {
		var s Sample
		for i := range 12 {
			switch c := conns[i]; {
			case c == nil && r.IntN(3) == 0:
				conns[i] = &Conn{Tuple: tuple(web.Addr, api.Addr, uint16(i), 80), ID: uint64(step), Created: at(step), Last: at(step), From: 1, Sent: Side{Counts{1, 60}, syn}}
			case c != nil && r.IntN(4) == 0:
				c.Sent.Packets++
				c.Last = at(step)
			case c != nil && r.IntN(6) == 0:
				if r.IntN(2) == 0 {
					s.Ended = append(s.Ended, *c)
				}
				delete(conns, i)
			}
			if c := conns[i]; c != nil {
				s.Conns = append(s.Conns, *c)
			}
		}
		for n := 1; n < 4; n++ {
			if r.IntN(5) == 0 {
				delete(counters, n)
			} else if r.IntN(2) == 0 {
				c := counters[n]
				c.Interface = web
				c.Sent.Packets += uint64(r.IntN(4))
				counters[n] = c
			}
		}
		s.At, s.Interfaces = at(60*step), counters
		before := len(l.Conns)
		_, change := l.Advance(s)
		b, err := json.Marshal(change)
		if err != nil {
			t.Fatal(err)
		}
		var read Change
		if err := json.Unmarshal(b, &read); err != nil {
			t.Fatal(err)
		}
		kept.Apply(read)
		if len(change.Conns) > len(l.Conns) || len(change.Gone) > before {
			t.Fatalf("step %d: %d of %d connections changed, %d of %d went", step, len(change.Conns), len(l.Conns), len(change.Gone), before)
		}
		if d := cmp.Diff(l, kept, cmpopts.EquateComparable(netip.Addr{}), cmpopts.EquateEmpty(), cmpopts.SortSlices(func(a, b Mark) bool {
			return compareTuples(a.Tuple, b.Tuple) < 0 || a.Tuple == b.Tuple && a.ID < b.ID
		})); d != "" {
			t.Fatalf("step %d: -log +kept by changes:\n%s", step, d)
		}
	}
	// Where nothing has changed, nothing is said.
	s := Sample{At: at(100_000), Interfaces: counters}
	for _, c := range conns {
		s.Conns = append(s.Conns, *c)
	}
	l.Advance(s)
	l.Advance(s)
	if _, c := l.Advance(s); len(c.Conns)+len(c.Gone)+len(c.Ports)+len(c.PortsGone) != 0 {
		t.Errorf("of nothing: %+v", c)
	}
}
