package datapath

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	probegen "github.com/underlay-cni/underlay/internal/datapath/probe/bpfgen"
	"github.com/underlay-cni/underlay/internal/policy"
	"github.com/underlay-cni/underlay/internal/testenv"
	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/test/bench"
)

// BenchmarkPolicy measures what a flow's first packet pays for its verdict, in
// runs of 4096 questions to policy_judge, and how long it takes to replace a
// group's members.
func BenchmarkPolicy(b *testing.B) {
	testenv.Require(b, "root", "bpf")
	onceForAllHooks(b)
	w := newWorld(b)
	w.quiet = true
	d := w.open(Options{})
	p := newProbe(b, d, nil)

	var rows []bench.Row
	for _, m := range []struct {
		name, base  string
		much, basis subject
	}{
		{"policy-300-rules/judge", "ns of a verdict by one rule; lower is better", ruled(b, d, 1, 300), ruled(b, d, 2, 1)},
		{"policy-1000-rules/judge", "ns of a verdict by one rule; lower is better", ruled(b, d, 3, 1000), ruled(b, d, 2, 1)},
		{"policy-10000-peers/judge", "ns of a verdict about one of 10 peers; lower is better", peered(b, d, 4, 10_000), peered(b, d, 5, 10)},
	} {
		rows = append(rows, bench.Compare(b, m.name, m.base, m.much.measure(b, p), m.basis.measure(b, p)))
		b.Logf("%s: %.0f ns, base %.0f ns", m.name, m.much.best, m.basis.best)
	}

	// A group of 10,000: compiled anew, written, and exchanged.
	e := fakeIface(b, d, 6)
	var input policy.Input
	n := 0
	replace := func() float64 {
		n++
		input = groupOf(crowd(10_000, byte(n%4)), fmt.Sprint(n))
		start := time.Now()
		t := compileGroups(b, &input)
		if err := d.SetPolicy(e, t); err != nil {
			b.Fatal(err)
		}
		took := time.Since(start).Seconds()
		b.Logf("10,000 members replaced in %.1f ms (a table of %d KiB)", took*1e3, len(t.Gates[policy.Groups].Cells)>>10)
		return took
	}
	rows = append(rows, bench.Compare(b, "policy-replace-10000/compile-set", "0.1 s; lower is better", replace, func() float64 { return 0.1 }))
	if err := bench.Write("../../docs/bench/policy.json", rows); err != nil {
		b.Fatal(err)
	}
}

// subject is an endpoint and flows that its policy allows.
type subject struct {
	questions []probegen.ProbeQuestion
	best      float64 // ns
}

// measure returns a function that asks all questions and returns the nanoseconds
// of one.
func (s *subject) measure(b testing.TB, p *probe) func() float64 {
	return func() float64 {
		p.fill(s.questions)
		p.run(len(s.questions))
		const runs = 50
		_, took, err := p.objs.PolicyProbe.Benchmark(make([]byte, 64), runs, nil)
		if err != nil {
			b.Fatal(err)
		}
		ns := float64(took.Nanoseconds()) / float64(len(s.questions))
		if s.best == 0 || ns < s.best {
			s.best = ns
		}
		return ns
	}
}

func compileGroups(b testing.TB, in *policy.Input) policy.Tables {
	b.Helper()
	t, err := policy.NewCompiler(in).Compile(&policy.Endpoint{Groups: vpc.GroupSet(webGroup)})
	if err != nil {
		b.Fatal(err)
	}
	return t
}

func groupOf(members []netip.Prefix, rule string) policy.Input {
	return policy.Input{
		Groups: map[vpc.SecurityGroupID]policy.SecurityGroup{webGroup: {Ingress: []policy.GroupRule{
			{ID: "sgr-" + rule, Protocol: int(policy.TCP), FromPort: 80, ToPort: 80, Group: peerGroup},
		}}},
		Members: map[vpc.SecurityGroupID][]netip.Prefix{peerGroup: members},
	}
}

// peered is an endpoint that n members of a group may reach.
func peered(b testing.TB, d *Datapath, index, n int) subject {
	b.Helper()
	members := crowd(n, 0)
	in := groupOf(members, "1")
	return subject{questions: ask(b, d, index, compileGroups(b, &in), func(i int) policy.Flow {
		return policy.Flow{Src: members[i*7919%n].Addr(), Protocol: policy.TCP, DstPort: 80}
	})}
}

// ruled is an endpoint with n rules, each of a block and a port of its own.
func ruled(b testing.TB, d *Datapath, index, n int) subject {
	b.Helper()
	var group policy.SecurityGroup
	for i := range n {
		group.Ingress = append(group.Ingress, policy.GroupRule{
			ID: fmt.Sprintf("sgr-%04d", i), Protocol: int(policy.TCP), FromPort: 1000 + 2*i, ToPort: 1000 + 2*i,
			CIDR: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 6), byte(i << 2), 0}), 23),
		})
	}
	in := policy.Input{Groups: map[vpc.SecurityGroupID]policy.SecurityGroup{webGroup: group}}
	return subject{questions: ask(b, d, index, compileGroups(b, &in), func(i int) policy.Flow {
		r := group.Ingress[i*7919%n]
		return policy.Flow{Src: r.CIDR.Addr().Next(), Protocol: policy.TCP, DstPort: uint16(r.FromPort)}
	})}
}

func ask(b testing.TB, d *Datapath, index int, t policy.Tables, flow func(i int) policy.Flow) []probegen.ProbeQuestion {
	b.Helper()
	e := fakeIface(b, d, index)
	if err := d.SetPolicy(e, t); err != nil {
		b.Fatal(err)
	}
	out := make([]probegen.ProbeQuestion, 4096)
	for i := range out {
		f := flow(i)
		f.Dst = e.Addr
		if v := t.Judge(policy.Ingress, f)[policy.Groups]; !v.Allow {
			b.Fatalf("%+v is denied", f)
		}
		out[i] = question(index, policy.Ingress, f)
	}
	return out
}
