package datapath

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
	probegen "github.com/underlay-cni/underlay/internal/datapath/probe/bpfgen"
	"github.com/underlay-cni/underlay/internal/policy"
	"github.com/underlay-cni/underlay/internal/testenv"
	"github.com/underlay-cni/underlay/internal/vpc"
)

const (
	webGroup  = vpc.SecurityGroupID("sg-0000000000000000a")
	peerGroup = vpc.SecurityGroupID("sg-0000000000000000b")
)

// fromPeers compiles the policy of an endpoint that receives TCP to port 80 from
// the members of a group, and sends anything.
func fromPeers(t testing.TB, ruleID string, members ...netip.Prefix) policy.Tables {
	t.Helper()
	c := policy.NewCompiler(&policy.Input{
		Groups: map[vpc.SecurityGroupID]policy.SecurityGroup{webGroup: {
			Ingress: []policy.GroupRule{{ID: ruleID, Protocol: int(policy.TCP), FromPort: 80, ToPort: 80, Group: peerGroup}},
			Egress:  []policy.GroupRule{{ID: "sgr-egress", Protocol: policy.AnyProtocol, CIDR: netip.MustParsePrefix("0.0.0.0/0")}},
		}},
		Members: map[vpc.SecurityGroupID][]netip.Prefix{peerGroup: members},
	})
	tables, err := c.Compile(&policy.Endpoint{Groups: vpc.GroupSet(webGroup)})
	if err != nil {
		t.Fatal(err)
	}
	return tables
}

// isolated compiles a NetworkPolicy that lets nothing in, or audits what it would.
func isolated(t testing.TB, audit bool) policy.Tables {
	t.Helper()
	pod := policy.Pod{Namespace: "default", Name: "web"}
	c := policy.NewCompiler(&policy.Input{Policies: []policy.NetworkPolicy{{Namespace: "default", Name: "deny", Audit: audit}}})
	tables, err := c.Compile(&policy.Endpoint{Pod: pod})
	if err != nil {
		t.Fatal(err)
	}
	return tables
}

func host(a string) netip.Prefix {
	ip := netip.MustParseAddr(a)
	return netip.PrefixFrom(ip, ip.BitLen())
}

// web is a flow to port 80 of the n-th pod.
func web(from string, to netip.Addr) policy.Flow {
	return policy.Flow{Src: netip.MustParseAddr(from), Dst: to, Protocol: policy.TCP, SrcPort: 40000, DstPort: 80}
}

func (p *probe) one(e Endpoint, dir policy.Direction, f policy.Flow) probegen.ProbeVerdict {
	p.t.Helper()
	return p.ask([]probegen.ProbeQuestion{question(e.HostIfIndex, dir, f)})[0]
}

func tableCount(t testing.TB, d *Datapath) int {
	t.Helper()
	n := 0
	var number uint32
	var id ebpf.MapID
	for number = range maxPolicyTables {
		if err := d.objs.PolicyTables.Lookup(&number, &id); err == nil {
			n++
		} else if !errors.Is(err, ebpf.ErrKeyNotExist) {
			t.Fatal(err)
		}
	}
	return n
}

// A policy is there before the endpoint's gate opens, goes with it, and can be set
// for none that is gone.
func TestPolicyComesAndGoesWithTheEndpoint(t *testing.T) {
	w := newWorld(t)
	var d *Datapath
	tables := fromPeers(t, "sgr-1", host("10.0.1.7"))
	d = w.open(Options{BeforeReady: func(_ context.Context, e Endpoint) error { return d.SetPolicy(e, tables) }})
	p := newProbe(t, d, nil)
	a := w.addPod(d, 1)
	if v := p.one(a.Endpoint, policy.Ingress, web("10.0.1.7", a.Addr)); v.Allow != [2]uint8{1, 1} || v.Rule[policy.Groups] < 16 || v.Epoch[policy.Groups] == 0 {
		t.Errorf("a member's flow: %+v", v)
	}
	if v := p.one(a.Endpoint, policy.Ingress, web("10.0.1.8", a.Addr)); v.Allow != [2]uint8{0, 1} || v.Rule[policy.Groups] < 16 {
		t.Errorf("a stranger's flow: %+v", v)
	}
	// The node's own processes reach it, whatever address they have.
	probed := web("10.0.1.8", a.Addr)
	probed.FromHost = true
	if v := p.one(a.Endpoint, policy.Ingress, probed); v.Allow != [2]uint8{1, 1} || v.Rule[policy.Groups] != uint32(policy.RuleHost) {
		t.Errorf("a probe of the node's: %+v", v)
	}
	if _, err := d.Delete(context.Background(), a.ContainerID, a.IfName); err != nil {
		t.Fatal(err)
	}
	if v := p.one(a.Endpoint, policy.Ingress, web("10.0.1.8", a.Addr)); v.Allow != [2]uint8{1, 1} || v.Epoch != [2]uint32{} {
		t.Errorf("after it is deleted, its policy is there: %+v", v)
	}
	if err := d.SetPolicy(a.Endpoint, tables); !errors.Is(err, ErrNotFound) {
		t.Errorf("the policy of a deleted endpoint can be set: %v", err)
	}
}

// A policy that is set while the endpoint is deleted leaves nothing behind.
func TestPolicyMeetsDelete(t *testing.T) {
	w := newWorld(t)
	w.quiet = true
	d := w.open(Options{})
	states := []policy.Tables{fromPeers(t, "sgr-1"), fromPeers(t, "sgr-2")}
	for n := range 5 {
		a := w.addPod(d, 1+n)
		if err := d.SetPolicy(a.Endpoint, states[0]); err != nil {
			t.Fatal(err)
		}
		begun, ended := make(chan struct{}), make(chan error)
		go func() {
			close(begun)
			for i := 0; ; i++ {
				if err := d.SetPolicy(a.Endpoint, states[i%2]); err != nil {
					ended <- err
					return
				}
			}
		}()
		<-begun
		if _, err := d.Delete(context.Background(), a.ContainerID, a.IfName); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; !errors.Is(err, ErrNotFound) {
			t.Fatal(err)
		}
		index := uint32(a.HostIfIndex)
		var v bpfgen.NodePolicyEndpoint
		if err := d.objs.PolicyEndpoints.Lookup(&index, &v); !errors.Is(err, ebpf.ErrKeyNotExist) {
			t.Fatalf("the deleted endpoint has a policy: %+v (%v)", v, err)
		}
	}
	for _, known := range d.policies.numbers {
		if known.users != 0 {
			t.Errorf("table %d has %d users, and there is no endpoint", known.number, known.users)
		}
	}
}

// The gates are exchanged one by one: the epoch of one tells nothing of the other.
func TestPolicyEpochs(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	p := newProbe(t, d, nil)
	a := w.addPod(d, 1)
	set := func(tables policy.Tables) probegen.ProbeVerdict {
		t.Helper()
		if err := d.SetPolicy(a.Endpoint, tables); err != nil {
			t.Fatal(err)
		}
		return p.one(a.Endpoint, policy.Ingress, web("10.0.1.7", a.Addr))
	}
	groups, policies := fromPeers(t, "sgr-1", host("10.0.1.7")), isolated(t, false)
	both := policy.Tables{Gates: [policy.Gates]*policy.Table{groups.Gates[policy.Groups], policies.Gates[policy.Policies]}}

	first := set(groups)
	second := set(both)
	if first.Epoch[0] == 0 || second.Epoch[0] != first.Epoch[0] || first.Epoch[1] != 0 || second.Epoch[1] == 0 {
		t.Errorf("epochs %v, then with a NetworkPolicy %v", first.Epoch, second.Epoch)
	}
	if second.Generation <= first.Generation || second.Allow != [2]uint8{1, 0} {
		t.Errorf("%+v, then with a NetworkPolicy %+v", first, second)
	}
	if again := set(both); again != second {
		t.Errorf("the same once more: %+v, it was %+v", again, second)
	}
	both.Gates[policy.Policies] = isolated(t, true).Gates[policy.Policies]
	third := set(both)
	if third.Epoch[0] != first.Epoch[0] || third.Epoch[1] == second.Epoch[1] || third.Allow != [2]uint8{1, 1} || third.Audit != [2]uint8{0, 1} {
		t.Errorf("in audit mode: %+v, it was %+v", third, second)
	}
}

// Endpoints with equal policy share a table; what nobody has is replaced, and of
// what is kept there is little.
func TestPolicyTablesAreShared(t *testing.T) {
	w := newWorld(t)
	w.quiet = true
	d := w.open(Options{})
	var pods []Endpoint
	for i := range 5 {
		pods = append(pods, fakeIface(t, d, 1+i))
	}
	for i := range 10 {
		tables := fromPeers(t, "sgr-1", host(fmt.Sprintf("10.0.1.%d", 100+i)))
		for _, e := range pods {
			if err := d.SetPolicy(e, tables); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := tableCount(t, d); n > 3 {
		t.Errorf("%d tables for five endpoints with one policy, changed ten times: want this one and two before", n)
	}
	// Many that are different, and then all alike.
	for i := range 30 {
		if err := d.SetPolicy(fakeIface(t, d, 100+i), fromPeers(t, "sgr-1", host(fmt.Sprintf("10.0.2.%d", i)))); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 30 {
		if err := d.SetPolicy(fakeIface(t, d, 100+i), fromPeers(t, "sgr-1")); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.SetPolicy(pods[0], fromPeers(t, "sgr-2")); err != nil {
		t.Fatal(err)
	}
	if n := tableCount(t, d); n > unusedTables+3 {
		t.Errorf("%d tables, of which 3 are in use", n)
	}
	// No epoch is given twice, whatever became of the table that had the latest.
	latest := d.policies.epoch
	for _, e := range pods {
		if err := d.SetPolicy(e, policy.Tables{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if next := w.open(Options{}); next.policies.epoch < latest {
		t.Errorf("the next agent gives epochs after %d, and %d was given", next.policies.epoch, latest)
	}
}

// An endpoint's policy goes on without an agent, and the next one finds it; what no
// endpoint has is swept.
func TestPolicySurvivesTheAgent(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	a := w.addPod(d, 1)
	tables := fromPeers(t, "sgr-1", host("10.0.1.7"))
	tables.Stack = true
	if err := d.SetPolicy(a.Endpoint, tables); err != nil {
		t.Fatal(err)
	}
	// Left by a crash: the policy of an interface that is gone.
	gone := fakeIface(t, d, 77)
	if err := d.SetPolicy(gone, isolated(t, false)); err != nil {
		t.Fatal(err)
	}
	p := newProbe(t, d, nil)
	before := p.one(a.Endpoint, policy.Ingress, web("10.0.1.7", a.Addr))
	if before.Stack != 1 {
		t.Error("its packets may be forwarded directly")
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if during := p.one(a.Endpoint, policy.Ingress, web("10.0.1.7", a.Addr)); during != before {
		t.Errorf("without an agent: %+v, it was %+v", during, before)
	}
	d = w.open(Options{})
	p = newProbe(t, d, nil)
	if after := p.one(a.Endpoint, policy.Ingress, web("10.0.1.7", a.Addr)); after != before {
		t.Errorf("with the next agent: %+v, it was %+v", after, before)
	}
	if err := d.SetPolicy(a.Endpoint, tables); err != nil {
		t.Fatal(err)
	}
	if same := p.one(a.Endpoint, policy.Ingress, web("10.0.1.7", a.Addr)); same != before {
		t.Errorf("set again by the next agent: %+v, it was %+v", same, before)
	}
	var v bpfgen.NodePolicyEndpoint
	index := uint32(gone.HostIfIndex)
	if err := d.objs.PolicyEndpoints.Lookup(&index, &v); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Errorf("the policy of an interface that is gone is there: %+v (%v)", v, err)
	}
	if d.policies.epoch < before.Epoch[policy.Groups] {
		t.Errorf("the next epoch may be one that is in use: %d after %d", d.policies.epoch, before.Epoch[policy.Groups])
	}
}

// Ten thousand members of a group are replaced by ten thousand others, and by
// another rule, again and again: every packet is judged by one of the two, whole.
func TestPolicyIsReplacedWhole(t *testing.T) {
	testenv.Require(t, "root", "bpf")
	onceForAllHooks(t)
	w := newWorld(t)
	w.quiet = true
	d := w.open(Options{})
	e := fakeIface(t, d, 1)
	var states [12]policy.Tables
	for i := range states {
		states[i] = fromPeers(t, fmt.Sprintf("sgr-%d", i), crowd(10_000, byte(i%2))...)
	}
	var flows []policy.Flow
	for i := range 2 {
		for _, m := range crowd(100, byte(i)) {
			flows = append(flows, policy.Flow{Src: m.Addr(), Dst: e.Addr, Protocol: policy.TCP, DstPort: 80})
		}
	}
	if err := d.SetPolicy(e, states[0]); err != nil {
		t.Fatal(err)
	}
	p := newProbe(t, d, nil)
	first := p.one(e, policy.Ingress, flows[0]).Epoch[policy.Groups]
	done := make(chan error, 1)
	go func() {
		for _, s := range states[1:] {
			if err := d.SetPolicy(e, s); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	var questions []probegen.ProbeQuestion
	for len(questions)+len(flows) <= p.room {
		for _, f := range flows {
			questions = append(questions, question(e.HostIfIndex, policy.Ingress, f))
		}
	}
	var want [len(states)][]policy.Verdict
	for i := range states {
		for _, f := range flows {
			want[i] = append(want[i], states[i].Judge(policy.Ingress, f)[policy.Groups])
		}
	}
	judged, seen, running := 0, map[uint32]bool{}, true
	for running {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			running = false
		default:
		}
		for i, v := range p.ask(questions) {
			n := v.Epoch[policy.Groups] - first
			if int(n) >= len(states) {
				t.Fatalf("epoch %d, the first was %d", v.Epoch[policy.Groups], first)
			}
			got := policy.Verdict{Allow: v.Allow[policy.Groups] == 1, Rule: policy.RuleID(v.Rule[policy.Groups])}
			if w := want[n][i%len(flows)]; got != w {
				t.Fatalf("%v by table %d: %+v, want %+v", flows[i%len(flows)].Src, n, got, w)
			}
			seen[n] = true
			judged++
		}
	}
	if !seen[uint32(len(states)-1)] {
		t.Error("the last table never judged")
	}
	t.Logf("%d verdicts by %d of %d tables", judged, len(seen), len(states))
}

// crowd returns n addresses, none beside another, all of them different for
// different i.
func crowd(n int, i byte) []netip.Prefix {
	out := make([]netip.Prefix, n)
	for k := range out {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], 10<<24|uint32(4*k)|uint32(i))
		out[k] = netip.PrefixFrom(netip.AddrFrom4(b), 32)
	}
	return out
}
