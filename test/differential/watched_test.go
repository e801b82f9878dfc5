package differential

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"

	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
	"github.com/underlay-cni/underlay/test/vpcmodel"
)

// watched is a world that changes while packets are judged by it. One goroutine
// changes it, others probe it.
//
//	asked:   s1 s2 s3 s4 s5
//	                ▲     ▲
//	         answered     len(asked)
//
// A packet is sent after `answered` was read and is through before `asked` was:
// the rules that it met are those after one of the statements between, and what it
// meets must be the model's verdict on one of them.
type watched struct {
	*stand
	cloud   *cloud
	changes *generator // of the goroutine that changes it

	mu       sync.Mutex
	asked    []vpcmodel.Statement
	answered int

	probing sync.Mutex // guards what follows
	probes  *generator // its world is that after `at` statements
	at      int
	ports   map[string]*port
	tuples  map[flowKind]uint16 // source ports that were used
}

// flowKind is a tuple but for the source port.
type flowKind struct {
	src, dst netip.Addr
	proto    uint8
	port     uint16
}

// watch makes a world in vpcd; with moves, its changes include those of interfaces
// between instances.
func (s *stand) watch(seed uint64, f Features, moves bool) (*watched, error) {
	g := &generator{
		moves: moves, Rand: rand.New(rand.NewPCG(seed, 2)), features: f, world: vpcmodel.NewWorld(vpcmodel.Defaults()),
		open: map[vpc.VPCID]vpc.SecurityGroupID{}, counts: Counts{}, wanted: wanted(f), emphasis: onAll, dual: f.dual(seed), second: map[vpc.ENIID]bool{},
	}
	g.build()
	w := &watched{stand: s, cloud: newCloud(s.ctx, s.endpoint), changes: g, ports: map[string]*port{}, tuples: map[flowKind]uint16{}}
	for _, st := range g.script {
		if err := w.cloud.apply(st); err != nil {
			return nil, fmt.Errorf("%q: %w", st, err)
		}
	}
	w.asked, w.answered, w.at = g.script, len(g.script), len(g.script)
	probes := *g
	probes.Rand, probes.world = rand.New(rand.NewPCG(seed, 3)), g.world.Clone()
	w.probes = &probes
	return w, s.openPorts(w.cloud, w.ports)
}

// doneAlready are the errors that a call gives when what it asks for has been done.
var doneAlready = []string{
	"InvalidPermission.Duplicate", "InvalidPermission.NotFound", "NetworkAclEntryAlreadyExists", "InvalidNetworkAclEntry.NotFound",
	"RouteAlreadyExists", "InvalidRoute.NotFound", "PrefixListVersionMismatch", "Resource.AlreadyAssigned", "InvalidIPAddress.InUse",
	"InvalidStateTransition", "Some of the specified", // … addresses are not assigned
}

// change makes one change, and does not return before it is answered. A call whose
// answer is lost is repeated as a client would, once up returns: then, and only
// then, it may turn out to have been done.
func (w *watched) change(up func() error) error {
	from := len(w.changes.script)
	w.changes.change()
	for _, st := range w.changes.script[from:] {
		if err := st.Apply(w.cloud.world); err != nil {
			return fmt.Errorf("%q: %w", st, err)
		}
		w.mu.Lock()
		w.asked = append(w.asked, st)
		w.mu.Unlock()
		if err := w.insist(st, up); err != nil {
			return fmt.Errorf("%q: %w", st, err)
		}
		w.mu.Lock()
		w.answered++
		w.mu.Unlock()
	}
	return nil
}

func (w *watched) insist(st vpcmodel.Statement, up func() error) error {
	repeated := false
	for {
		err := w.cloud.make(st)
		var lost *url.Error
		switch {
		case err == nil:
			return nil
		case errors.As(err, &lost):
			repeated = true
			for again := true; again; {
				if err := up(); err != nil {
					return err
				}
				err := w.cloud.lookAgain(st)
				if again = errors.As(err, &lost); err != nil && !again {
					return err
				}
			}
		case repeated && slices.ContainsFunc(doneAlready, func(code string) bool { return strings.Contains(err.Error(), code) }):
			// An error promises nothing of the fabric.
			if _, err := w.settle(); err == nil {
				if s, ok := st.(vpcmodel.SetList); ok {
					w.cloud.listIs[s.ID] = listState{w.cloud.listIs[s.ID].version + 1, s.CIDRs}
				}
				return nil
			} else if !errors.As(err, &lost) {
				return err
			}
			if err := up(); err != nil {
				return err
			}
		default:
			return err
		}
	}
}

// lookAgain forgets what a call whose answer was lost may have changed.
func (c *cloud) lookAgain(st vpcmodel.Statement) (err error) {
	switch s := st.(type) {
	case vpcmodel.SetACL:
		delete(c.aclOf, s.Subnet)
	case vpcmodel.SetTable:
		c.tableOf[s.Subnet], err = c.tableAssociation(s.Subnet)
	}
	return err
}

// finding is what a probe met that no rules of its time allow.
type finding struct {
	packet   vpcmodel.Packet
	verdicts []vpcmodel.Verdict // after each statement that was open
	got      string
	open     []vpcmodel.Statement
	before   vpcmodel.Script
}

func (f *finding) Error() string {
	var b strings.Builder
	who := f.got
	if who == "" {
		who = "nobody"
	}
	fmt.Fprintf(&b, "%s was received by %s; the model, before the open change and after each: ", &f.packet, who)
	for _, v := range f.verdicts {
		fmt.Fprintf(&b, "[%s] ", v)
	}
	for _, st := range f.open {
		fmt.Fprintf(&b, "\nopen: %s", st)
	}
	fmt.Fprintf(&b, "\nafter:\n%ssend 1 %s %s\n", f.before, f.packet.From, &f.packet)
	return b.String()
}

// tally counts packets.
type tally struct {
	sent     int
	sure     int // whose verdict is the same by all rules that were open
	received int
	decisive int // whose verdict is another than before the last answered change
}

func (t *tally) add(o tally) {
	t.sent, t.sure, t.received, t.decisive = t.sent+o.sent, t.sure+o.sure, t.received+o.received, t.decisive+o.decisive
}

// advance brings the probes' world to where all answered statements are applied. It
// returns the world of before, nil if that is the same.
func (w *watched) advance() (old *vpcmodel.World, err error) {
	w.mu.Lock()
	answered := slices.Clone(w.asked[w.at:w.answered])
	w.mu.Unlock()
	if len(answered) > 0 {
		old = w.probes.world.Clone()
	}
	for _, st := range answered {
		if err := st.Apply(w.probes.world); err != nil {
			return nil, fmt.Errorf("%q: %w", st, err)
		}
		w.at++
		// The port of a detached interface stays, to see whether it receives.
		if a, ok := st.(vpcmodel.Attach); ok {
			w.drop(string(a.ENI))
		}
	}
	for name, e := range w.probes.world.ENIs {
		if e.Attached && w.ports[string(name)] == nil {
			return old, w.openSome()
		}
	}
	return old, nil
}

func (w *watched) drop(name string) {
	if p := w.ports[name]; p != nil {
		p.close()
		delete(w.ports, name)
	}
}

// openSome opens the ports of interfaces that have been attached.
func (w *watched) openSome() error {
	namespaces, err := w.settle()
	if err != nil {
		return err
	}
	for name, e := range w.probes.world.ENIs {
		if e.Attached && w.ports[string(name)] == nil {
			p, err := openPort(namespaces[w.cloud.ids[string(e.Instance)]], w.cloud.macs[name])
			if err != nil && w.leaving(name) {
				continue
			} else if err != nil {
				return err
			}
			w.ports[string(name)] = p
		}
	}
	return nil
}

// leaving reports whether a call to detach an interface is open.
func (w *watched) leaving(e vpc.ENIID) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.ContainsFunc(w.asked[w.at:], func(st vpcmodel.Statement) bool {
		d, ok := st.(vpcmodel.Detach)
		return ok && d.ENI == e
	})
}

// probe sends n packets, each the first of a flow of its own, and returns an error
// if one of them met what it should not.
func (w *watched) probe(n int) (t tally, err error) {
	w.probing.Lock()
	defer w.probing.Unlock()
	old, err := w.advance()
	if err != nil {
		return t, err
	}
	lo := w.at
	packets := make([]*vpcmodel.Packet, n)
	for i := range packets {
		packets[i] = w.fresh()
		for tries := 0; old != nil && i%2 == 0 && tries < 30; tries++ {
			if old.Peek(packets[i]).To != w.probes.world.Peek(packets[i]).To {
				t.decisive++
				break
			}
			packets[i] = w.fresh()
		}
	}
	got, err := w.sendAll(packets)
	if err != nil {
		return t, err
	}
	t.sent = n
	w.mu.Lock()
	open := slices.Clone(w.asked[lo:])
	script := slices.Clone(w.asked[:lo])
	w.mu.Unlock()

	verdicts := make([][]vpcmodel.Verdict, n)
	world := w.probes.world
	for k := 0; ; k++ {
		for i, p := range packets {
			verdicts[i] = append(verdicts[i], world.Peek(p))
		}
		if k == len(open) {
			break
		}
		if k == 0 {
			world = world.Clone()
		}
		if err := open[k].Apply(world); err != nil {
			return t, fmt.Errorf("%q: %w", open[k], err)
		}
	}
	for i, p := range packets {
		same := !slices.ContainsFunc(verdicts[i], func(v vpcmodel.Verdict) bool { return v.To != verdicts[i][0].To })
		if !slices.ContainsFunc(verdicts[i], func(v vpcmodel.Verdict) bool { return string(v.To) == got[i] }) {
			return t, &finding{*p, verdicts[i], got[i], open, script}
		}
		if same {
			t.sure++
		}
		if got[i] != "" {
			t.received++
		}
	}
	return t, nil
}

// fresh is the first packet of a flow that was never there: TCP or UDP, from a
// source port of its own.
func (w *watched) fresh() *vpcmodel.Packet {
	for {
		p := w.probes.aimed()
		if len(w.probes.world.Gateways) > 0 && w.probes.chance(0.2) {
			p = w.probes.fromInternet()
		} else if p == nil || w.probes.chance(0.3) {
			p = w.probes.newFlow()
		}
		p = w.probes.tidy(p)
		if p.From != vpcmodel.Internet && w.ports[string(p.From)] == nil {
			continue
		}
		if p.Proto != packet.ProtoTCP && p.Proto != packet.ProtoUDP || p.Fragments > 0 || p.Orphan || p.Direct != "" || p.Length > 0 {
			continue
		}
		kind := flowKind{p.Src, p.Dst, p.Proto, p.DstPort}
		if p.From == vpcmodel.Internet || !p.Dst.IsPrivate() {
			// A public address changes hands: behind it, what went to two of
			// them would be one flow.
			kind.src, kind.dst = netip.Addr{}, netip.Addr{}
		}
		if w.tuples[kind] == 50000 {
			continue
		}
		w.tuples[kind]++
		p.SrcPort = 10000 + w.tuples[kind]
		return p
	}
}

// sendAll sends packets and returns who received each, by name, "" if nobody.
func (w *watched) sendAll(packets []*vpcmodel.Packet) ([]string, error) {
	w.stand.mu.Lock()
	defer w.stand.mu.Unlock()
	sent := map[uint32]int{}
	ports := maps.Clone(w.ports)
	if w.internet != nil {
		ports[string(vpcmodel.Internet)] = w.internet
	}
	err := onOneCPU(func() error {
		for i, p := range packets {
			w.number++
			q := *p
			q.Src, q.Dst = w.cloud.real(q.Src), w.cloud.real(q.Dst)
			d := datagrams(&q, w.number)[0]
			sent[w.number] = i
			from := ports[string(p.From)]
			err := from.send(frame(packet.MAC(from.mac), packet.MAC(fabric.RouterMAC), d))
			if err != nil && w.leaving(p.From) {
				continue
			} else if err != nil {
				return fmt.Errorf("send %s: %w", p, err)
			}
		}
		if err := w.sendMarker(); err != nil || w.internet == nil {
			return err
		}
		return w.sendMarker() // what passes a NAT gateway passes the fabric twice
	})
	if err != nil {
		return nil, err
	}
	got := make([]string, len(packets))
	buf := make([]byte, 1<<14)
	for name, p := range ports {
		for {
			frame, err := p.receive(buf)
			if err != nil && name != string(vpcmodel.Internet) && (w.leaving(vpc.ENIID(name)) || !w.probes.world.ENIs[vpc.ENIID(name)].Attached) {
				break
			} else if err != nil {
				return nil, fmt.Errorf("receive on %s: %w", name, err)
			}
			if frame == nil {
				break
			}
			if len(frame) < 14 {
				continue
			}
			if i, ok := sent[numberOf(frame[14:])]; ok {
				if got[i] != "" {
					got[i] += " and "
				}
				got[i] += name
			}
		}
	}
	return got, nil
}

func (w *watched) close() {
	for _, p := range w.ports {
		p.close()
	}
}
