package differential

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
	"github.com/underlay-cni/underlay/test/vpcmodel"
)

// outcome of a script: what the model says and who received what.
type outcome struct {
	script   vpcmodel.Script
	verdicts map[int]vpcmodel.Verdict // by index of the Send
	received map[int]string           // "" if nobody, else who, as words
	noise    int                      // frames that no script sent
	records  []recordDifference
	kinds    int // of records that were compared
}

// mismatches lists the Sends of which model and fabric say different things.
func (o *outcome) mismatches() (out []int) {
	for i, v := range o.verdicts {
		if expected(v) != o.received[i] {
			out = append(out, i)
		}
	}
	for _, d := range o.records {
		out = append(out, d.index)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// report writes the script as one that can be replayed, with both verdicts where
// they differ.
func (o *outcome) report() string {
	var b strings.Builder
	for i, st := range o.script {
		b.WriteString(st.String())
		if v, ok := o.verdicts[i]; ok {
			fmt.Fprintf(&b, " # model: %s", v)
			if expected(v) != o.received[i] {
				got := o.received[i]
				if got == "" {
					got = "nobody"
				}
				fmt.Fprintf(&b, "; FABRIC: received by %s", got)
			}
		}
		for _, d := range o.records {
			if d.index == i {
				b.WriteString(" # " + d.text)
			}
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// run builds a script's world in vpcd, sends its packets, and removes the world.
func (s *stand) run(script vpcmodel.Script) (o *outcome, err error) {
	c := newCloud(s.ctx, s.endpoint)
	r := &runner{stand: s, started: time.Now().Add(-time.Second), cloud: c, ports: map[string]*port{}, sent: map[string]fragment{}, whole: map[int]int{},
		expect: map[uint32]*translated{}, indexOf: map[uint32]int{}, told: map[int]string{}, natPorts: map[natPort]uint16{}, pieces: pieces{},
		out: &outcome{script: script, verdicts: map[int]vpcmodel.Verdict{}, received: map[int]string{}}}
	defer func() {
		for _, p := range r.ports {
			p.close()
		}
		err = errors.Join(err, c.remove(s.terminated))
	}()
	for i, st := range script {
		send, ok := st.(vpcmodel.Send)
		if !ok {
			if err := r.flush(); err != nil {
				return nil, err
			}
			if err := c.apply(st); err != nil {
				return nil, fmt.Errorf("statement %d, %q: %w", i+1, st, err)
			}
			r.settled = false
			continue
		}
		if send.From == vpcmodel.Internet && len(c.world.NATs) > 0 {
			// To what port it goes, packets of before tell.
			if err := r.flush(); err != nil {
				return nil, err
			}
		}
		r.batch = append(r.batch, sending{i, send})
	}
	if err := r.flush(); err != nil || !Enforced.Records || len(r.out.mismatches()) > 0 {
		return r.out, err
	}
	r.out.records, err = r.compareRecords()
	r.out.kinds = len(r.wantRecords())
	return r.out, err
}

type sending struct {
	index int
	vpcmodel.Send
}

// fragment is a datagram on the wire, by its bytes: of which Send it is a part.
type fragment struct {
	index int
	parts int // what it counts for: 1, or all when it is the datagram made whole
}

type runner struct {
	*stand
	cloud   *cloud
	out     *outcome
	ports   map[string]*port
	settled bool
	batch   []sending
	sent    map[string]fragment
	whole   map[int]int // parts of each Send
	noted   []noted
	started time.Time

	expect   map[uint32]*translated // by number
	indexOf  map[uint32]int         // of all Sends, by number
	numbers  map[uint16]int         // Send by the identification of its IP packet, of this batch
	told     map[int]string         // what its sender was told about a Send
	natPorts map[natPort]uint16
	pieces   pieces
}

// flush sends the batch and collects what was received.
func (r *runner) flush() error {
	if len(r.batch) == 0 {
		return nil
	}
	batch := r.batch
	r.batch, r.numbers = nil, map[uint16]int{}
	if err := r.refresh(); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	exempt, err := r.exempt(batch)
	if err != nil {
		return err
	}
	err = onOneCPU(func() error {
		for _, b := range batch {
			if err := r.sendOne(b); err != nil {
				return fmt.Errorf("statement %d, %q: %w", b.index+1, b.Send, err)
			}
		}
		if err := r.sendMarker(); err != nil || len(r.cloud.world.NATs) == 0 {
			return err
		}
		return r.sendMarker() // what passes a NAT gateway passes the fabric twice
	})
	if err != nil {
		return err
	}
	if err := r.collect(batch); err != nil {
		return err
	}
	return exempt()
}

// refresh waits for the fabric and opens ports that are new.
func (r *runner) refresh() error {
	if r.settled {
		return nil
	}
	r.settled = true
	for name, p := range r.ports {
		if !r.cloud.world.ENIs[vpc.ENIID(name)].Attached {
			p.close()
			delete(r.ports, name)
		}
	}
	return r.openPorts(r.cloud, r.ports)
}

func (r *runner) sendOne(b sending) error {
	v, err := b.Judge(r.cloud.world)
	if err != nil {
		return err
	}
	r.out.verdicts[b.index] = v
	from := r.ports[string(b.From)]
	if b.From == vpcmodel.Internet {
		from = r.internet
	}
	if from == nil {
		return fmt.Errorf("%s has no port", b.From)
	}
	to := packet.MAC(fabric.RouterMAC)
	if b.Direct != "" {
		if p := r.ports[string(b.Direct)]; p != nil {
			to = packet.MAC(p.mac)
		}
	}
	if b.Dst.Is6() && b.Dst.IsMulticast() && b.Direct == "" {
		to = multicastMAC(b.Dst)
	}
	r.number++
	real := r.real(&b.Packet)
	parts := datagrams(real, r.number)
	r.whole[b.index] = len(parts)
	if b.From == vpcmodel.Internet && v.NAT == "" && b.Proto != packet.ProtoICMP {
		for i := range v.Records {
			if v.Records[i].DstPort == b.DstPort {
				v.Records[i].DstPort = real.DstPort
			}
		}
	}
	if r.unseen(&b.Packet, &v) {
		delete(r.out.verdicts, b.index)
	}
	r.note(b, v, parts)
	r.numbers[uint16(r.number)], r.indexOf[r.number] = b.index, b.index
	if v.Seen != nil {
		t := &translated{index: b.index, number: r.number, seen: *v.Seen, cut: b.MayFragment}
		if b.From != vpcmodel.Internet {
			t.nat = v.NAT
		} else if v.NAT == "" {
			t.seen.DstPort, t.seen.Ident = real.DstPort, real.Ident // also past a NAT gateway
		}
		r.expect[r.number] = t
	} else {
		for _, d := range parts {
			r.sent[string(d)] = fragment{b.index, 1}
		}
		if b.Fragments > 1 {
			r.sent[string(reassembled(parts))] = fragment{b.index, len(parts)}
		}
	}
	for _, d := range parts {
		if err := from.send(frame(packet.MAC(from.mac), to, d)); err != nil {
			return fmt.Errorf("send: %w", err)
		}
	}
	return nil
}

// reassembled is the datagram that fragments make.
func reassembled(parts [][]byte) []byte {
	first := parts[0]
	if first[0]>>4 == 6 {
		return reassembled6(parts)
	}
	var body []byte
	for _, p := range parts {
		body = append(body, p[20:]...)
	}
	h := first[:20]
	return ip(addr(h[12:16]), addr(h[16:20]), h[9], uint16(h[4])<<8|uint16(h[5]), 0, body)
}

// collect empties all ports.
func (r *runner) collect(batch []sending) error {
	buf := make([]byte, 1<<14)
	got := map[int]map[string]int{}
	ports := maps.Clone(r.ports)
	if r.internet != nil && len(r.cloud.world.Gateways) > 0 {
		ports[string(vpcmodel.Internet)] = r.internet
	}
	for name, p := range ports {
		for {
			frame, err := p.receive(buf)
			if err != nil {
				return fmt.Errorf("receive on %s: %w", name, err)
			}
			if frame == nil {
				break
			}
			if len(frame) < 34 || frame[14]>>4 == 6 && len(frame) < 14+headerLength6 {
				continue
			}
			f, how, err := r.whose(name, frame[14:])
			if err != nil {
				return fmt.Errorf("received on %s: %w", name, err)
			}
			if f.parts == 0 {
				continue
			}
			if got[f.index] == nil {
				got[f.index] = map[string]int{}
			}
			who := name + how
			if packet.MAC(frame[:6]) != packet.MAC(p.mac) {
				who += " with another's MAC"
			}
			got[f.index][who] += f.parts
		}
	}
	for _, b := range batch {
		var who []string
		for name, parts := range got[b.index] {
			switch n := r.whole[b.index]; {
			case parts == n:
			case parts < n:
				name += fmt.Sprintf(" (%d of %d fragments)", parts, n)
			default:
				name += fmt.Sprintf(" (%d times)", parts/n)
			}
			who = append(who, name)
		}
		slices.Sort(who)
		r.out.received[b.index] = strings.TrimSpace(strings.Join(who, " and ") + r.told[b.index])
	}
	return nil
}

// whose finds the Send that a datagram received by name is of, and how it differs
// from what it should be. Without parts it is not to be counted.
func (r *runner) whose(name string, d []byte) (f fragment, how string, err error) {
	if f, ok := r.sent[string(d)]; ok {
		return f, "", nil
	}
	if d[0]>>4 == 6 {
		return r.whose6(d), r.otherwise(d), nil
	}
	if mtu, from, about := told(d); mtu > 0 {
		i, ok := r.numbers[binary.BigEndian.Uint16(about[4:])]
		if e := r.cloud.world.ENIs[vpc.ENIID(name)]; ok && e != nil && from == vpc.Router(r.cloud.world.Subnets[e.Subnet].CIDR) {
			r.told[i] += fmt.Sprintf(" told %d", mtu)
			if send := r.out.script[i].(vpcmodel.Send); string(send.From) != name {
				r.told[i] += " at " + name
			}
			return fragment{}, "", nil
		}
	}
	if d, err = r.pieces.add(d); err != nil || d == nil {
		return fragment{}, "", err
	}
	t := r.expect[numberOf(d)]
	if i, ok := r.indexOf[numberOf(d)]; t == nil && ok && d[9] == r.out.script[i].(vpcmodel.Send).Proto {
		return fragment{i, r.whole[i]}, fmt.Sprintf(" as %s > %s", addr(d[12:16]), addr(d[16:20])), nil
	}
	if t == nil {
		r.out.noise++
		return fragment{}, "", nil
	}
	if how := r.match(t, d); how != "" {
		return fragment{t.index, r.whole[t.index]}, " " + how, nil
	}
	return fragment{t.index, r.whole[t.index]}, "", nil
}

// runAll runs scripts, several at once, and returns what became of each.
func (s *stand) runAll(scripts []vpcmodel.Script) ([]*outcome, []error) {
	outcomes, errs := make([]*outcome, len(scripts)), make([]error, len(scripts))
	var group errgroup.Group
	group.SetLimit(atOnce)
	for i, script := range scripts {
		group.Go(func() error {
			outcomes[i], errs[i] = s.run(script)
			return nil
		})
	}
	_ = group.Wait() // errors are in errs
	return outcomes, errs
}

// atOnce is how many scripts run at the same time.
const atOnce = 10

// differs runs a script and reports whether model and fabric still differ.
func (s *stand) differs(script vpcmodel.Script) (*outcome, error) {
	o, err := s.run(script)
	if err != nil {
		return nil, err
	}
	if len(o.mismatches()) == 0 {
		return nil, nil
	}
	return o, nil
}

// minimal shrinks a script whose outcome has mismatches.
func (s *stand) minimal(o *outcome, tries int) *outcome {
	// What comes after the first mismatch had no part in it.
	best := o
	script := fit(o.script[:o.mismatches()[0]+1])
	Shrink(script, tries, func(c vpcmodel.Script) bool {
		o, err := s.differs(c)
		if err != nil || o == nil {
			return false
		}
		best = o
		return true
	})
	return best
}
