package differential

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd"
	"github.com/underlay-cni/underlay/test/vpcmodel"
)

// logged is what adds up in flow records of one key.
type logged struct {
	packets, bytes int
	flags          uint8
	last           int  // Send that was the last to add to it
	skip           bool // not compared
}

func (l *logged) String() string {
	if l == nil {
		return "no record"
	}
	return fmt.Sprintf("%d packets, %d bytes, tcp-flags %d", l.packets, l.bytes, l.flags)
}

// difference of records, at the Send that it is shown with.
type recordDifference struct {
	index int
	text  string
}

// noted are records that the model wants.
type noted struct {
	index int
	vpcmodel.Record
	nat            vpcmodel.NATID // that chose the source port
	packets, bytes int
	skip           bool
}

// note keeps what the model says of a Send's records.
func (r *runner) note(b sending, v vpcmodel.Verdict, parts [][]byte) {
	bytes := 0
	for _, d := range parts {
		bytes += len(d)
	}
	for _, rec := range v.Records {
		n := noted{index: b.index, Record: rec, packets: len(parts), bytes: bytes}
		if v.NAT != "" && b.From != vpcmodel.Internet && rec.PktSrc != b.Src {
			n.nat = v.NAT // also at the sender, to which it may come back
		}
		// The later fragments of what is refused are nobody's.
		n.skip = b.Fragments > 1 && !v.Delivered()
		n.skip = n.skip || r.unseen(&b.Packet, &v)
		r.noted = append(r.noted, n)
	}
}

// unseen reports whether a packet is for a NAT gateway's side of a flow, by a port
// that nobody has seen: what the gateway makes of it the model cannot know.
func (r *runner) unseen(p *vpcmodel.Packet, v *vpcmodel.Verdict) bool {
	switch {
	case v.NAT == "":
		return false
	case p.From == vpcmodel.Internet:
		return !r.learnt(v.NAT, p)
	}
	return v.Seen != nil && v.Seen.Dst != p.Dst // within the VPC, to the gateway's own address
}

// learnt reports whether it is known which port a NAT gateway gave the flow that a
// packet from the internet is for.
func (r *runner) learnt(nat vpcmodel.NATID, p *vpcmodel.Packet) bool {
	port := p.DstPort
	if p.Proto == 1 {
		port = p.Ident
	}
	_, ok := r.natPorts[natPort{nat, p.Proto, port}]
	return ok
}

// recordKey is a record without what adds up. What path a refused packet would
// have taken the facts do not say.
func recordKey(r vpcmodel.Record) vpcmodel.Record {
	r = r.Key()
	if !r.Accepted {
		r.Path = 0
	}
	return r
}

func (r *runner) wantRecords() map[vpcmodel.Record]*logged {
	want := map[vpcmodel.Record]*logged{}
	for i := range r.noted {
		n := &r.noted[i]
		k := recordKey(n.Record)
		if n.nat != "" && k.Proto != 1 {
			if real, ok := r.natPorts[natPort{n.nat, k.Proto, k.SrcPort}]; ok {
				k.SrcPort = real
			} else {
				n.skip = true // nobody has seen the port
			}
		}
		l := want[k]
		if l == nil {
			l = &logged{}
			want[k] = l
		}
		l.packets, l.bytes, l.flags, l.last = l.packets+n.packets, l.bytes+n.bytes, l.flags|n.Flags, n.index
		l.skip = l.skip || n.skip
	}
	return want
}

// line is a record of GET /_vpcd/flows.
type line struct {
	Interface string     `json:"interface-id"`
	Status    string     `json:"log-status"`
	Src       netip.Addr `json:"srcaddr"`
	Dst       netip.Addr `json:"dstaddr"`
	PktSrc    netip.Addr `json:"pkt-srcaddr"`
	PktDst    netip.Addr `json:"pkt-dstaddr"`
	SrcPort   uint16     `json:"srcport"`
	DstPort   uint16     `json:"dstport"`
	Protocol  uint8      `json:"protocol"`
	Packets   int        `json:"packets"`
	Bytes     int        `json:"bytes"`
	Action    string     `json:"action"`
	Flags     uint8      `json:"tcp-flags"`
	Direction string     `json:"flow-direction"`
	Path      int        `json:"traffic-path"`
	Type      string     `json:"type"`
}

// flows reads the flow records since a time.
func (s *stand) flows(since time.Time, yield func(line)) error {
	req, err := http.NewRequestWithContext(s.ctx, http.MethodGet, s.endpoint+vpcd.AdminPath+"flows?since="+url.QueryEscape(since.UTC().Format(time.RFC3339Nano)), nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("read flow records: %s", resp.Status)
	}
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		var l line
		if err := json.Unmarshal(lines.Bytes(), &l); err != nil {
			return fmt.Errorf("read flow record %q: %w", lines.Bytes(), err)
		}
		yield(l)
	}
	return lines.Err()
}

func (r *runner) gotRecords() (map[vpcmodel.Record]*logged, error) {
	names := map[string]vpc.ENIID{}
	for name := range r.cloud.world.ENIs {
		names[r.cloud.ids[string(name)]] = name
	}
	got := map[vpcmodel.Record]*logged{}
	var skipped []string
	err := r.flows(r.started, func(l line) {
		eni, ok := names[l.Interface]
		switch {
		case !ok || l.Status == "NODATA":
			return
		case l.Status != "OK":
			skipped = append(skipped, l.Status+" of "+string(eni))
			return
		}
		k := recordKey(vpcmodel.Record{
			ENI: eni, Dir: vpcmodel.Direction(l.Direction == "egress"), SrcAddr: r.cloud.scripted(l.Src), DstAddr: r.cloud.scripted(l.Dst),
			PktSrc: r.cloud.scripted(l.PktSrc), PktDst: r.cloud.scripted(l.PktDst), IPv6: l.Type == "IPv6",
			SrcPort: l.SrcPort, DstPort: l.DstPort, Proto: l.Protocol, Accepted: l.Action == "ACCEPT", Path: l.Path,
		})
		n := got[k]
		if n == nil {
			n = &logged{}
			got[k] = n
		}
		n.packets, n.bytes, n.flags = n.packets+l.Packets, n.bytes+l.Bytes, n.flags|l.Flags
	})
	if err == nil && len(skipped) > 0 {
		err = fmt.Errorf("flow records are not whole: %s", strings.Join(skipped, ", "))
	}
	return got, err
}

// compareRecords compares what the flow logs have of the script's interfaces with
// what the model says.
func (r *runner) compareRecords() ([]recordDifference, error) {
	want := r.wantRecords()
	var out []recordDifference
	// An interval may end between the two looks that a reader takes.
	for range 3 {
		got, err := r.gotRecords()
		if err != nil {
			return nil, err
		}
		if out = r.differences(want, got); len(out) == 0 {
			break
		}
	}
	return out, nil
}

func (r *runner) differences(want, got map[vpcmodel.Record]*logged) (out []recordDifference) {
	last := 0
	for i, st := range r.out.script {
		if _, ok := st.(vpcmodel.Send); ok {
			last = i
		}
	}
	for k, w := range want {
		g := got[k]
		if !w.skip && (g == nil || g.packets != w.packets || g.bytes != w.bytes || g.flags != w.flags) {
			out = append(out, recordDifference{w.last, fmt.Sprintf("records of %s: model: %s; FABRIC: %s", k, w, g)})
		}
	}
	for k, g := range got {
		if want[k] != nil {
			continue
		}
		at, skip := last, false
		for _, n := range r.noted {
			if n.PktSrc == k.PktSrc && n.PktDst == k.PktDst && n.Proto == k.Proto && (n.DstPort == k.DstPort || n.nat != "") {
				at, skip = n.index, skip || n.skip
			}
		}
		if !skip {
			out = append(out, recordDifference{at, fmt.Sprintf("records of %s: model: no record; FABRIC: %s", k, g)})
		}
	}
	slices.SortFunc(out, func(a, b recordDifference) int { return a.index - b.index })
	return out
}
