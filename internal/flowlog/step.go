package flowlog

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/underlay-cni/underlay/internal/packet"
)

// Counts are totals since a connection or an interface began.
type Counts struct {
	Packets uint64
	Bytes   uint64 // IP lengths
}

func (c Counts) add(d Counts) Counts { return Counts{c.Packets + d.Packets, c.Bytes + d.Bytes} }

// since returns what was added after a former reading. Each CPU's share is read
// at its own moment, so that a later reading can seem smaller: then nothing was.
func (c Counts) since(before Counts) Counts {
	var d Counts
	if c.Packets > before.Packets {
		d.Packets = c.Packets - before.Packets
	}
	if c.Bytes > before.Bytes {
		d.Bytes = c.Bytes - before.Bytes
	}
	return d
}

// Side is one direction of a connection.
type Side struct {
	Counts
	Flags uint8 // of TCP: all that were sent
}

// Conn is a connection as the datapath counts it.
type Conn struct {
	Tuple   packet.FiveTuple // of its first packet
	ID      uint64           // with Tuple its name: another one of the same tuple has another
	Created time.Time        // its first packet
	Last    time.Time        // its latest packet
	Sent    Side             // by the side that began it
	Answers Side             // by the other
	// The interfaces of this node at its ends, by their numbers in the Sample;
	// 0: the end is elsewhere.
	From, To int
	// What the gates of those two interfaces said of it, and whether they let it
	// pass: what From may not send never reaches To.
	Egress, Ingress             Verdict
	EgressDenied, IngressDenied bool
}

// Refusal is a packet that an interface did not let pass, or several alike.
type Refusal struct {
	On          int // the interface's number
	Direction   Direction
	Tuple       packet.FiveTuple
	Counts      Counts
	Flags       uint8
	First, Last time.Time
	Verdict     Verdict
}

// Totals are what an interface's own counters say, since it was made.
type Totals struct {
	Sent, Received, Refused Counts
	// Exempt packets make no records by definition, and are in Sent or Received.
	Exempt Counts
}

// Sample is a reading of the datapath. Interfaces are to be read before Conns
// and Refused: what the former have counted, the latter then know.
type Sample struct {
	At         time.Time
	Interfaces map[int]Reading // by number, > 0 and never given again
	Conns      []Conn
	Ended      []Conn    // over since the sample before, with their last counts
	Refused    []Refusal // since the sample before
}

// Reading is an interface with its counters.
type Reading struct {
	Interface
	Totals
}

// Log is what has been recorded so far. The zero value has seen nothing. Its
// fields are for who keeps it from one process to the next.
type Log struct {
	At    time.Time // of the latest sample
	Conns []Mark
	Ports []Port
}

// Mark is how far a connection is recorded.
type Mark struct {
	Tuple         packet.FiveTuple
	ID            uint64
	Sent, Answers Side
}

// Port is how far an interface is accounted for.
type Port struct {
	Number   int
	Recorded Counts // in records of status OK, refused packets included
	Skipped  Counts // in records of status SKIPDATA
	Open     Counts // counted by then, and in no record yet
}

// Name is that of a connection.
type Name struct {
	Tuple packet.FiveTuple
	ID    uint64
}

func (c *Conn) name() Name { return Name{c.Tuple, c.ID} }

// Change is what one step has changed in a Log: for who keeps it from one process
// to the next, and does not want to write all of it each time.
type Change struct {
	At        time.Time
	Conns     []Mark // of connections that are new or went on
	Gone      []Name `json:",omitempty"` // connections that have none any more
	Ports     []Port // likewise
	PortsGone []int  `json:",omitempty"`
}

// Apply makes the changes of steps, in their order.
func (l *Log) Apply(changes ...Change) {
	if len(changes) == 0 {
		return
	}
	marks := make(map[Name]Mark, len(l.Conns))
	for _, m := range l.Conns {
		marks[Name{m.Tuple, m.ID}] = m
	}
	ports := make(map[int]Port, len(l.Ports))
	for _, p := range l.Ports {
		ports[p.Number] = p
	}
	for _, c := range changes {
		l.At = c.At
		for _, n := range c.Gone {
			delete(marks, n)
		}
		for _, m := range c.Conns {
			marks[Name{m.Tuple, m.ID}] = m
		}
		for _, n := range c.PortsGone {
			delete(ports, n)
		}
		for _, p := range c.Ports {
			ports[p.Number] = p
		}
	}
	l.Conns, l.Ports = slices.Collect(maps.Values(marks)), slices.Collect(maps.Values(ports))
	slices.SortFunc(l.Ports, func(a, b Port) int { return cmp.Compare(a.Number, b.Number) })
}

// Step records what has happened between the sample before and this one, sorted
// by interface, direction and tuple. What an interface has counted and nothing
// tells of is waited for until the next step: news of a connection that has
// ended may be on its way. A pod's traffic before the first step of
// an empty Log is recorded as far as its connections still stand, and skipped as
// far as not.
func (l *Log) Step(s Sample) []Record {
	out, _ := l.Advance(s)
	return out
}

// Advance is Step, and tells what it has changed in l. What l had before is left
// as it was: a copy of l goes on to be good.
func (l *Log) Advance(s Sample) ([]Record, Change) {
	start := l.At
	change := Change{At: s.At}
	marks := make(map[Name]int, len(l.Conns))
	for i := range l.Conns {
		marks[Name{l.Conns[i].Tuple, l.Conns[i].ID}] = i
	}
	stands := make([]bool, len(l.Conns)) // such a mark's connection
	l.Ports = slices.Clone(l.Ports)
	had := make(map[int]Port, len(l.Ports))
	for _, p := range l.Ports {
		had[p.Number] = p
		if _, there := s.Interfaces[p.Number]; !there {
			change.PortsGone = append(change.PortsGone, p.Number)
		}
	}
	ports := make(map[int]*Port, len(s.Interfaces))
	for i := range l.Ports {
		if _, there := s.Interfaces[l.Ports[i].Number]; there {
			ports[l.Ports[i].Number] = &l.Ports[i]
		}
	}
	for n := range s.Interfaces {
		if ports[n] == nil {
			ports[n] = &Port{Number: n}
		}
	}

	var out []Record
	busy := map[int]bool{}
	add := func(n int, r Record) {
		in, there := s.Interfaces[n]
		if !there || r.Packets == 0 {
			return
		}
		r.Interface = in.Interface
		if r.Start.Before(start) {
			r.Start = start
		}
		ports[n].Recorded = ports[n].Recorded.add(Counts{r.Packets, r.Bytes})
		busy[n] = true
		out = append(out, r)
	}
	record := func(c *Conn) {
		var before Mark
		if i, ok := marks[c.name()]; ok {
			before = l.Conns[i]
		}
		sent, answers := c.Sent.since(before.Sent.Counts), c.Answers.since(before.Answers.Counts)
		began := Record{Start: c.Created, End: c.Last, Tuple: c.Tuple, Packets: sent.Packets, Bytes: sent.Bytes,
			TCPFlags: Flags(c.Sent.Flags&^before.Sent.Flags|keep(c.Sent.Flags), true), Accepted: true}
		answered := Record{Start: c.Created, End: c.Last, Tuple: c.Tuple.Reverse(), Packets: answers.Packets, Bytes: answers.Bytes,
			TCPFlags: Flags(c.Answers.Flags&^before.Answers.Flags|keep(c.Answers.Flags), false), Accepted: true}
		if c.From != 0 {
			began.Direction, answered.Direction, began.Verdict, answered.Verdict = Egress, Ingress, c.Egress, c.Egress
			began.Accepted = !c.EgressDenied
			add(c.From, began)
			add(c.From, answered)
		}
		if c.To != 0 && !c.EgressDenied {
			began.Direction, answered.Direction, began.Verdict, answered.Verdict = Ingress, Egress, c.Ingress, c.Ingress
			began.Accepted = !c.IngressDenied
			add(c.To, began)
			add(c.To, answered)
		}
	}
	ended := make(map[Name]bool, len(s.Ended))
	for i := range s.Ended {
		record(&s.Ended[i])
		ended[s.Ended[i].name()] = true
	}
	next := make([]Mark, 0, len(s.Conns))
	for i := range s.Conns {
		c := &s.Conns[i]
		if ended[c.name()] {
			continue // it ended while the sample was taken
		}
		record(c)
		now := Mark{c.Tuple, c.ID, c.Sent, c.Answers}
		next = append(next, now)
		was, ok := marks[c.name()]
		if ok {
			stands[was] = true
		}
		if !ok || l.Conns[was] != now {
			change.Conns = append(change.Conns, now)
		}
	}
	for i := range l.Conns {
		if !stands[i] {
			change.Gone = append(change.Gone, Name{l.Conns[i].Tuple, l.Conns[i].ID})
		}
	}
	for _, r := range s.Refused {
		add(r.On, Record{Start: r.First, End: r.Last, Direction: r.Direction, Tuple: r.Tuple, Packets: r.Counts.Packets, Bytes: r.Counts.Bytes,
			TCPFlags: Flags(r.Flags, r.Flags&ack == 0), Verdict: r.Verdict})
	}

	l.At, l.Conns, l.Ports = s.At, next, l.Ports[:0:0]
	for n, p := range ports {
		in := s.Interfaces[n]
		counted := in.Sent.add(in.Received).add(in.Refused)
		known := p.Recorded.add(p.Skipped).add(in.Exempt)
		remark := Record{Interface: in.Interface, Start: start, End: s.At}
		open := counted.since(known)
		lost := Counts{min(open.Packets, p.Open.Packets), min(open.Bytes, p.Open.Bytes)}
		p.Open = open.since(lost)
		if lost.Packets > 0 {
			p.Skipped = p.Skipped.add(lost)
			remark.Status, remark.Packets, remark.Bytes = SkipData, lost.Packets, lost.Bytes
			out = append(out, remark)
		} else if !busy[n] {
			remark.Status = NoData
			out = append(out, remark)
		}
		l.Ports = append(l.Ports, *p)
		if was, ok := had[n]; !ok || was != *p {
			change.Ports = append(change.Ports, *p)
		}
	}
	slices.SortFunc(l.Ports, func(a, b Port) int { return cmp.Compare(a.Number, b.Number) })
	slices.SortStableFunc(out, func(a, b Record) int {
		return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Status, b.Status), cmp.Compare(a.Direction, b.Direction), compareTuples(a.Tuple, b.Tuple))
	})
	return out, change
}

// keep are the flags that belong to each interval in which they can be seen:
// whether an ACK came with a SYN is told by the ACK, which was there before.
func keep(seen uint8) uint8 { return seen & ack }

func compareTuples(a, b packet.FiveTuple) int {
	return cmp.Or(a.Src.Compare(b.Src), a.Dst.Compare(b.Dst), cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.SrcPort, b.SrcPort), cmp.Compare(a.DstPort, b.DstPort))
}
