package datapath

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
	probegen "github.com/underlay-cni/underlay/internal/datapath/probe/bpfgen"
	"github.com/underlay-cni/underlay/internal/policy"
	"github.com/underlay-cni/underlay/internal/policy/policytest"
	"github.com/underlay-cni/underlay/internal/testenv"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// probe asks policy_judge, on the maps of a datapath.
type probe struct {
	t    testing.TB
	objs probegen.ProbeObjects
	room int // questions in one run
}

// newProbe loads the program; object, if set, in the place of the embedded one.
func newProbe(t testing.TB, d *Datapath, object []byte) *probe {
	t.Helper()
	p := &probe{t: t}
	spec, err := probegen.LoadProbe()
	if object != nil {
		spec, err = ebpf.LoadCollectionSpecFromReader(bytes.NewReader(object))
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
	}
	err = spec.LoadAndAssign(&p.objs, &ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{
		probegen.ProbeMapPolicyTables:     d.objs.PolicyTables,
		probegen.ProbeMapPolicyEndpoints:  d.objs.PolicyEndpoints,
		probegen.ProbeMapPolicyGeneration: d.objs.PolicyGeneration,
	}})
	if err != nil {
		var verifier *ebpf.VerifierError
		if errors.As(err, &verifier) {
			t.Fatalf("%+v", verifier)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.objs.Close() })
	p.room = int(p.objs.Questions.MaxEntries())
	return p
}

func question(index int, dir policy.Direction, f policy.Flow) probegen.ProbeQuestion {
	q := probegen.ProbeQuestion{Ifindex: uint32(index), Ask: uint32(dir)}
	if f.FromHost {
		q.Ask |= 2 // POLICY_FROM_HOST
	}
	q.Tuple = probegen.ProbeTuple{
		Src: probegen.ProbeAddr{B: f.Src.As16()}, Dst: probegen.ProbeAddr{B: f.Dst.As16()},
		Sport: f.SrcPort, Dport: f.DstPort, Protocol: uint8(f.Protocol), IcmpType: f.ICMPType, IcmpCode: f.ICMPCode,
	}
	return q
}

// ask asks all questions and returns the answers, in order.
func (p *probe) ask(questions []probegen.ProbeQuestion) []probegen.ProbeVerdict {
	p.t.Helper()
	var out []probegen.ProbeVerdict
	for len(questions) > 0 {
		n := min(len(questions), p.room)
		p.fill(questions[:n])
		p.run(n)
		keys, answers := numbersTo(n), make([]probegen.ProbeVerdict, n)
		var cursor ebpf.MapBatchCursor
		if _, err := p.objs.Answers.BatchLookup(&cursor, keys, answers, nil); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			p.t.Fatal(err)
		}
		out = append(out, answers...)
		questions = questions[n:]
	}
	return out
}

func numbersTo(n int) []uint32 {
	keys := make([]uint32, n)
	for i := range keys {
		keys[i] = uint32(i)
	}
	return keys
}

func (p *probe) fill(questions []probegen.ProbeQuestion) {
	p.t.Helper()
	if _, err := p.objs.Questions.BatchUpdate(numbersTo(len(questions)), questions, nil); err != nil {
		p.t.Fatal(err)
	}
}

// run lets the program go over the first n questions.
func (p *probe) run(n int) {
	p.t.Helper()
	if err := p.objs.Asked.Set(uint32(n)); err != nil {
		p.t.Fatal(err)
	}
	if _, err := p.objs.PolicyProbe.Run(&ebpf.RunOptions{Data: make([]byte, 64)}); err != nil {
		p.t.Fatal(err)
	}
}

// fakeIface enters an interface that no device has, so that a policy can be set.
func fakeIface(t testing.TB, d *Datapath, index int) Endpoint {
	t.Helper()
	e := Endpoint{ContainerID: fmt.Sprint(index), IfName: "eth0", HostIfIndex: index, Addr: netip.AddrFrom4([4]byte{10, 0, byte(index >> 8), byte(index)})}
	k := uint32(index)
	if err := d.objs.Ifaces.Update(&k, &bpfgen.NodeIface{Addr: addrKey(e.Addr)}, ebpf.UpdateAny); err != nil {
		t.Fatal(err)
	}
	return e
}

// difference compares the programs with the reference in worlds from seed on,
// until verdicts were compared; "" if they agree.
func difference(t testing.TB, d *Datapath, p *probe, seed uint64, verdicts int) string {
	t.Helper()
	const each = 300 // flows of an endpoint
	for done := 0; done < verdicts; seed++ {
		w := policytest.New(seed)
		c := policy.NewCompiler(&w.Input)
		var flows []policy.Flow
		var questions []probegen.ProbeQuestion
		for i := range w.Endpoints {
			tables, err := c.Compile(&w.Endpoints[i])
			if err != nil {
				t.Fatal(err)
			}
			index := 1 + i
			if err := d.SetPolicy(fakeIface(t, d, index), tables); err != nil {
				t.Fatal(err)
			}
			for n := range each {
				dir := policy.Direction(n % 2)
				f := w.Flow(&w.Endpoints[i], dir)
				flows = append(flows, f)
				questions = append(questions, question(index, dir, f))
			}
		}
		rules := c.Rules()
		for n, v := range p.ask(questions) {
			ep, dir := &w.Endpoints[n/each], policy.Direction(questions[n].Ask&1)
			want := policy.Evaluate(&w.Input, ep, dir, flows[n])
			for g := range policy.GateID(policy.Gates) {
				got := policy.Judgement{Allow: v.Allow[g] == 1, Audit: v.Audit[g] == 1, Rule: rules.Name(policy.RuleID(v.Rule[g]))}
				got.Untracked = g == policy.Groups && v.Untracked == 1
				if got != want[g] {
					return fmt.Sprintf("world %d, %s of %s/%s by %s: %+v: programs: %+v, reference: %+v",
						seed, dir, ep.Namespace, ep.Name, g, flows[n], got, want[g])
				}
			}
			if (v.Stack == 1) != ep.Stack {
				return fmt.Sprintf("world %d: %s/%s is kept on the stack: %v", seed, ep.Namespace, ep.Name, v.Stack == 1)
			}
			done += policy.Gates
		}
	}
	return ""
}

// The programs say what the reference evaluator says, rule for rule.
// POLICY_VERDICTS says how many verdicts are compared.
func TestPolicyFuzz(t *testing.T) {
	testenv.Require(t, "root", "bpf")
	onceForAllHooks(t)
	verdicts := 50_000
	if s := os.Getenv("POLICY_VERDICTS"); s != "" {
		verdicts, _ = strconv.Atoi(s)
	}
	w := newWorld(t)
	w.quiet = true
	d := w.open(Options{})
	if diff := difference(t, d, newProbe(t, d, nil), 1<<32, verdicts); diff != "" {
		t.Fatal(diff)
	}
}

// As many rules as fit, and as many IPv6 addresses: the deepest that is looked up.
func TestPolicyAtItsLimits(t *testing.T) {
	testenv.Require(t, "root", "bpf")
	onceForAllHooks(t)
	w := newWorld(t)
	d := w.open(Options{})
	p := newProbe(t, d, nil)
	e := fakeIface(t, d, 1)

	member := func(i int) netip.Addr {
		b := netip.MustParseAddr("2600:1f18::").As16()
		binary.BigEndian.PutUint32(b[12:], uint32(2*i))
		return netip.AddrFrom16(b)
	}
	const members = 32_000
	var group policy.SecurityGroup
	in := policy.Input{
		Groups:  map[vpc.SecurityGroupID]policy.SecurityGroup{},
		Members: map[vpc.SecurityGroupID][]netip.Prefix{peerGroup: nil},
	}
	for i := range members {
		in.Members[peerGroup] = append(in.Members[peerGroup], netip.PrefixFrom(member(i), 128))
	}
	for i := range policy.MaxRules {
		group.Ingress = append(group.Ingress, policy.GroupRule{ID: fmt.Sprintf("sgr-%05d", i), Protocol: int(policy.TCP), FromPort: 10 * i, ToPort: 10 * i, Group: peerGroup})
	}
	in.Groups[webGroup] = group
	c := policy.NewCompiler(&in)
	tables, err := c.Compile(&policy.Endpoint{Groups: vpc.GroupSet(webGroup)})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.SetPolicy(e, tables); err != nil {
		t.Fatal(err)
	}
	own := netip.MustParseAddr("2600:1f18::ffff:ffff")
	var questions []probegen.ProbeQuestion
	var want []string
	for i := range policy.MaxRules {
		m := i * (members - 1) / (policy.MaxRules - 1)
		f := policy.Flow{Src: member(m), Dst: own, Protocol: policy.TCP, DstPort: uint16(10 * i)}
		questions, want = append(questions, question(1, policy.Ingress, f)), append(want, fmt.Sprintf("%s ingress sgr-%05d", webGroup, i))
		f.Src = f.Src.Next()
		questions, want = append(questions, question(1, policy.Ingress, f)), append(want, string(webGroup)+" ingress: no rule allows it")
	}
	rules := c.Rules()
	for i, v := range p.ask(questions) {
		if got := rules.Name(policy.RuleID(v.Rule[policy.Groups])); got != want[i] {
			t.Fatalf("question %d: %q, want %q", i, got, want[i])
		}
	}

	group.Ingress = append(group.Ingress, policy.GroupRule{ID: "sgr-x", Protocol: policy.AnyProtocol, Group: peerGroup})
	in.Groups[webGroup] = group
	var large *policy.TooLargeError
	if _, err := policy.NewCompiler(&in).Compile(&policy.Endpoint{Groups: vpc.GroupSet(webGroup)}); !errors.As(err, &large) {
		t.Errorf("one rule more: %v", err)
	}
}
