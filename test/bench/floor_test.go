package bench

import (
	"encoding/binary"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/underlay-cni/underlay/internal/nl"
)

// newFloor is a pod on each node, and programs that send on whatever comes and look
// at nothing: what forwarding by BPF costs before it checks, tracks or counts.
// They stand where ours do, on TCX.
func newFloor(b testing.TB, name string) [2]benchPod {
	b.Helper()
	s := newSite(b, name)
	var pods [2]benchPod
	for i, node := range s.nodes {
		p := benchPod{addr: netip.AddrFrom4([4]byte{10, byte(s.n), 1, byte(1 + i)})}
		var host string
		p.ns, host = s.barePod(i, "pod"+strconv.Itoa(i), netip.PrefixFrom(p.addr, 32), wireMTU)
		s.link(node, host, p.ns)
		wire, veth := ifindex(b, node, "eth0"), ifindex(b, node, host)
		// Out by the wire, to its router.
		router := s.addr(1).As4()
		s.hook(node, veth, asm.Instructions{
			asm.Mov.Imm(asm.R1, 2), // AF_INET
			asm.StoreMem(asm.RFP, -20, asm.R1, asm.Word),
			asm.Mov.Imm(asm.R1, int32(binary.NativeEndian.Uint32(router[:]))),
			asm.StoreMem(asm.RFP, -16, asm.R1, asm.Word),
			asm.Mov.Imm(asm.R1, 0),
			asm.StoreMem(asm.RFP, -12, asm.R1, asm.Word),
			asm.StoreMem(asm.RFP, -8, asm.R1, asm.Word),
			asm.StoreMem(asm.RFP, -4, asm.R1, asm.Word),
			asm.Mov.Imm(asm.R1, int32(wire)),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -20), // struct bpf_redir_neigh
			asm.Mov.Imm(asm.R3, 20),
			asm.Mov.Imm(asm.R4, 0),
			asm.FnRedirectNeigh.Call(),
			asm.Return(),
		})
		// And into the pod.
		s.hook(node, wire, asm.Instructions{
			asm.Mov.Imm(asm.R1, int32(veth)),
			asm.Mov.Imm(asm.R2, 0),
			asm.FnRedirectPeer.Call(),
			asm.Return(),
		})
		pods[i] = p
	}
	return pods
}

// hook puts a program at what a device of a node receives.
func (s *site) hook(node string, ifindex int, code asm.Instructions) {
	s.b.Helper()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "Dual BSD/GPL", Instructions: code})
	if err != nil {
		s.b.Fatal(err)
	}
	s.b.Cleanup(func() { _ = prog.Close() })
	err = nl.Do(nl.Path(node), func() error {
		l, err := link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: prog, Attach: ebpf.AttachTCXIngress})
		if err == nil {
			s.b.Cleanup(func() { _ = l.Close() })
		}
		return err
	})
	if err != nil {
		s.b.Fatal(err)
	}
}

func ifindex(b testing.TB, netns, device string) int {
	b.Helper()
	n, err := strconv.Atoi(strings.TrimSpace(output(b, "ip netns exec "+netns+" cat /sys/class/net/"+device+"/ifindex")))
	if err != nil {
		b.Fatal(err)
	}
	return n
}

// withEmptyNetfilter is a site whose nodes have netfilter's tables without a rule,
// and so its connection tracking: what a node on which kube-proxy or Docker runs
// has at the least.
func withEmptyNetfilter(b testing.TB, name string) *site {
	b.Helper()
	s := newSite(b, name)
	for _, node := range s.nodes {
		s.load(node, `*mangle
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
COMMIT
`, "iptables-restore")
	}
	return s
}
