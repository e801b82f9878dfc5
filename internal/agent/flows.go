package agent

import (
	"cmp"
	"context"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/underlay-cni/underlay/internal/agent/recorder"
	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/datapath"
	"github.com/underlay-cni/underlay/internal/flowlog"
	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/internal/policy"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// Connections is what flow records need of the kernel; see package datapath.
type Connections interface {
	Connections() iter.Seq2[datapath.Connection, error]
	Traffic() (map[netip.Addr]datapath.Traffic, error)
	Endpoints() ([]datapath.Endpoint, error)
}

// FlowOptions say what becomes of flow records.
type FlowOptions struct {
	Dir      string          // for files; "": none
	Format   *flowlog.Format // nil: JSON
	Interval time.Duration   // 0: a minute
	Node     string          // its name in records; "": the instance's ID
}

// maxEnded bounds the connections that have ended since the latest record;
// what is beyond is missing in the records, which then say SKIPDATA.
const maxEnded = 1 << 16

// Ended collects connections that are over until they are recorded. It is made
// before the datapath, which tells of them; the zero value is ready.
type Ended struct {
	mu    sync.Mutex
	conns []datapath.Connection
}

// Add is for datapath.Options.Ended.
func (e *Ended) Add(c datapath.Connection) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.conns) < maxEnded {
		e.conns = append(e.conns, c)
	}
}

func (e *Ended) all() []datapath.Connection {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.conns)
}

// taken forgets the first n.
func (e *Ended) taken(n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.conns = slices.Clone(e.conns[n:])
}

// Flows makes the flow records of an agent's node.
type Flows struct {
	a        *Agent
	o        FlowOptions
	conns    Connections
	ended    *Ended
	recorder *recorder.Recorder

	mu   sync.Mutex
	past map[int]past // interfaces that were there, by number
}

// past is an interface as it was last seen. It is remembered while its
// connections may still be told of.
type past struct {
	flowlog.Reading
	seen time.Time
}

// remembered is how long that is: longer than closed and idle connections stay,
// but for established ones, which end with their pod.
const remembered = 10 * time.Minute

// NewFlows takes over the records where the agent before left off.
func NewFlows(a *Agent, conns Connections, ended *Ended, boot string, o FlowOptions) (*Flows, error) {
	f := &Flows{a: a, o: o, conns: conns, ended: ended, past: map[int]past{}}
	var err error
	f.recorder, err = recorder.New(recorder.Options{
		Dir: o.Dir, Format: o.Format, Interval: o.Interval, Boot: boot, Node: f.node, Sample: f.sample, Logger: a.log,
	})
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	a.flows = f
	a.mu.Unlock()
	return f, nil
}

// Run records until ctx ends.
func (f *Flows) Run(ctx context.Context) error { return f.recorder.Run(ctx) }

// Totals are the sums of what was recorded.
func (f *Flows) Totals() (recorder.Totals, error) { return f.recorder.Totals() }

func (f *Flows) node() flowlog.Node {
	f.a.mu.Lock()
	defer f.a.mu.Unlock()
	id := f.a.identity
	return flowlog.Node{
		Name: cmp.Or(f.o.Node, string(id.Instance)), Account: id.Account, VPC: string(id.VPC), Instance: string(id.Instance),
		Region: id.Region, ZoneID: id.ZoneID,
	}
}

// sample reads the interfaces' counters first and what tells of their packets
// after them.
func (f *Flows) sample() (flowlog.Sample, func(), error) {
	s := flowlog.Sample{Interfaces: map[int]flowlog.Reading{}}
	endpoints, err := f.conns.Endpoints()
	if err != nil {
		return s, nil, err
	}
	traffic, err := f.conns.Traffic()
	if err != nil {
		return s, nil, err
	}
	enis := f.enis()
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	for i := range endpoints {
		e := &endpoints[i]
		t, counted := traffic[e.Addr]
		if e.State != datapath.Live || !counted {
			continue
		}
		eni := enis[e.ENI]
		f.past[e.HostIfIndex] = past{seen: now, Reading: flowlog.Reading{
			Interface: flowlog.Interface{Addr: e.Addr, Namespace: e.PodNamespace, Pod: cmp.Or(e.PodName, e.ContainerID), ENI: string(e.ENI), Primary: eni.primary, Subnet: string(eni.subnet)},
			Totals: flowlog.Totals{
				Sent:     flowlog.Counts{Packets: t.FromPackets, Bytes: t.FromBytes},
				Received: flowlog.Counts{Packets: t.ToPackets, Bytes: t.ToBytes},
			},
		}}
	}
	maps.DeleteFunc(f.past, func(_ int, p past) bool { return now.Sub(p.seen) > remembered })
	for n, p := range f.past {
		s.Interfaces[n] = p.Reading
	}
	rules := f.a.gate.rules()
	for c, err := range f.conns.Connections() {
		if err != nil {
			return s, nil, err
		}
		s.Conns = append(s.Conns, conn(&c, rules))
	}
	ended := f.ended.all()
	for i := range ended {
		s.Ended = append(s.Ended, conn(&ended[i], rules))
	}
	s.At = time.Now()
	return s, func() { f.ended.taken(len(ended)) }, nil
}

// place is where in the VPC an ENI is.
type place struct {
	primary netip.Addr
	subnet  vpc.SubnetID
}

// enis returns the node's, as far as they are known yet.
func (f *Flows) enis() map[vpc.ENIID]place {
	out := map[vpc.ENIID]place{}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	// Without an owner there are no ENIs to tell of: the records say so by "-".
	_ = f.a.ask(ctx, func(o *owner) {
		for _, e := range o.state.ENIs {
			out[e.ID] = place{e.Primary, e.Subnet}
		}
	})
	return out
}

// conn is a connection as flow records have it.
func conn(c *datapath.Connection, rules policy.Rules) flowlog.Conn {
	out := flowlog.Conn{
		Tuple:   packet.FiveTuple{Src: c.Opener.Addr, Dst: c.Responder.Addr, SrcPort: c.Opener.Port, DstPort: c.Responder.Port, Proto: c.Protocol},
		ID:      c.ID,
		Created: c.Created, Last: c.Last,
		Sent:    flowlog.Side{Counts: flowlog.Counts{Packets: c.Opener.Packets, Bytes: c.Opener.Bytes}, Flags: c.Opener.TCPFlags},
		Answers: flowlog.Side{Counts: flowlog.Counts{Packets: c.Responder.Packets, Bytes: c.Responder.Bytes}, Flags: c.Responder.TCPFlags},
		From:    c.Opener.HostIfIndex, To: c.Responder.HostIfIndex,
	}
	if c.Protocol == packet.ProtoICMP || c.Protocol == packet.ProtoICMPv6 {
		out.Tuple.SrcPort, out.Tuple.DstPort = c.ICMPID, uint16(c.ICMPType)<<8|uint16(c.ICMPCode)
	}
	out.Egress, out.EgressDenied = verdict(&c.Opener, rules)
	out.Ingress, out.IngressDenied = verdict(&c.Responder, rules)
	return out
}

// verdict is what the gates of a connection's end said: the one that refuses
// decides; if none does, that of the security groups is told before the other.
func verdict(e *datapath.ConnEnd, rules policy.Rules) (v flowlog.Verdict, denied bool) {
	for _, g := range e.Gates {
		if !g.Judged {
			continue
		}
		text := "allow"
		switch {
		case !g.Allowed:
			text = "deny"
		case g.Audit:
			text = "audit"
		}
		if v.Text == "" || text == "deny" || text == "audit" && v.Text == "allow" {
			v = flowlog.Verdict{Text: text}
			if g.Rule != uint32(policy.NoRule) {
				v.Rule = cmp.Or(rules.Name(policy.RuleID(g.Rule)), strconv.FormatUint(uint64(g.Rule), 10))
			}
		}
		denied = denied || text == "deny"
	}
	return v, denied
}

// Flows returns the records whose interval has ended at or after since, and what
// the running interval has so far.
func (a *Agent) Flows(_ context.Context, q agentapi.FlowQuery) (*agentapi.Flows, error) {
	a.mu.Lock()
	f := a.flows
	a.mu.Unlock()
	if f == nil {
		return nil, agentapi.Errorf(agentapi.CodeNotAvailable, "this agent makes no flow records yet; ask again when it serves")
	}
	ended, running, err := f.recorder.Recent(q.Since)
	if err != nil {
		return nil, agentapi.Errorf(agentapi.CodeDatapath, "read the connections: %v; see the agent's log", err)
	}
	n, out := f.node(), &agentapi.Flows{Interval: cmp.Or(f.o.Interval, time.Minute).Seconds(), Ended: []flowlog.Object{}, Running: []flowlog.Object{}}
	if extra := len(ended) - agentapi.MaxFlows; extra > 0 {
		ended, out.Omitted = ended[extra:], out.Omitted+extra
	}
	if extra := len(running) - agentapi.MaxFlows; extra > 0 {
		running, out.Omitted = running[:agentapi.MaxFlows], out.Omitted+extra
	}
	for i := range ended {
		out.Ended = append(out.Ended, ended[i].Object(n))
	}
	for i := range running {
		out.Running = append(out.Running, running[i].Object(n))
	}
	return out, nil
}
