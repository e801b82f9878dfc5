package fabric

import (
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// What people are told of the defaults is what the programs do.
func TestDefaultInferred(t *testing.T) {
	spec, err := bpfgen.LoadFabric()
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]time.Duration{
		bpfgen.FabricVarTcpHandshakeTimeout: DefaultInferred.TCPHandshake, bpfgen.FabricVarTcpClosedTimeout: DefaultInferred.TCPClosed,
		bpfgen.FabricVarIcmpTimeout: DefaultInferred.ICMP, bpfgen.FabricVarFragmentTimeout: DefaultInferred.Fragments,
	} {
		var got uint32
		if err := spec.Variables[name].Get(&got); err != nil || time.Duration(got)*time.Second != want {
			t.Errorf("%s is %d s (%v), DefaultInferred says %v", name, got, err, want)
		}
	}
}

// TestInferred opens a lab with other settings than the default ones.
func TestInferred(t *testing.T) {
	l, a, b := clientServer(t, anyICMP)
	m := l.add(subnetA, "10.0.0.5")
	l.iface(m.eni).SourceDestCheck = false
	m.groups(groupOpen)
	l.shut()
	o := labOptions(l.name)
	o.Inferred = Inferred{TCPHandshake: 20 * time.Second, TCPClosed: 2 * time.Second, ICMP: 5 * time.Second, Fragments: 3 * time.Second, ReceiverGroups: true}
	f, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	l.Fabric = f
	l.set()
	answer := icmp4(b.addr, a.addr, 0, 0, 7)
	a.wants(b, "query", icmp4(a.addr, b.addr, 8, 0, 7), "")
	l.after(4 * time.Second)
	b.wants(a, "answer in time", answer, "")
	l.after(6 * time.Second)
	b.wants(a, "answer too late", answer, SGEgress)
	l.group(1, nil, []Rule{{Protocol: 1, From: Any, To: Any, Group: testGroup(2)}})
	l.set()
	if got := a.gatedBy(m, m.mac, icmp4(a.addr, b.addr, 8, 0, 8)); got != SGEgress {
		t.Errorf("through a middlebox, by the group of the destination: %q", got)
	}
	l.shut()
	o.Inferred.ICMP = 1500 * time.Millisecond
	if f, err := Open(o); err == nil {
		l.Fabric = f
		t.Error("a second and a half is taken")
	}
}
