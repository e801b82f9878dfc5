package bench

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/agentapi/pipe"
	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/test/lab"
)

// agentSide asks the agent of a node as the plugin does, without starting the
// plugin.
type agentSide struct {
	plugin cniPlugin
	call   *pipe.Caller
}

// cycle is cniPlugin.cycle: the seconds of n ADDs and of their DELs, from the
// request to the answer.
func (a agentSide) cycle(b testing.TB, n int) (add, del float64) {
	b.Helper()
	names := a.plugin.namespaces(b, n)
	quiet()
	for _, step := range []struct {
		command string
		took    *float64
	}{{"ADD", &add}, {"DEL", &del}} {
		start := time.Now()
		for _, name := range names {
			a.ask(b, step.command, name)
		}
		*step.took = time.Since(start).Seconds()
		b.Logf("agent: %s %.2f ms each", step.command, *step.took/float64(n)*1e3)
	}
	for _, name := range names {
		if err := nl.DeleteNamed(name); err != nil {
			b.Fatal(err)
		}
	}
	return add, del
}

// metricsAddr is where the agents serve Prometheus, each in its namespace.
const metricsAddr = "127.0.0.1:9464"

// busy returns the seconds that the agent spent on all ADDs so far, by its own
// clock: without the socket and the way of two processes to and from the CPU.
func (a agentSide) busy(b testing.TB) float64 {
	b.Helper()
	const metric = "underlay_add_duration_seconds_sum"
	conn := lab.In(b, a.plugin.lab.Nodes[0].Netns, func() (net.Conn, error) { return net.Dial("tcp4", metricsAddr) })
	defer conn.Close()
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(context.Context, string, string) (net.Conn, error) { return conn, nil },
	}}
	resp, err := client.Get("http://" + metricsAddr + "/metrics")
	if err != nil {
		b.Fatal(err)
	}
	defer resp.Body.Close()
	sum := -1.0
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), " ")
		if strings.HasPrefix(name, metric) {
			v, err := strconv.ParseFloat(value, 64)
			if err != nil {
				b.Fatal(err)
			}
			sum = max(sum, 0) + v
		}
	}
	if sum < 0 {
		b.Fatalf("no %s among the agent's metrics", metric)
	}
	return sum
}

func (a agentSide) ask(b testing.TB, command, name string) {
	b.Helper()
	netns, err := os.Open(nl.Path(name))
	if err != nil {
		b.Fatal(err)
	}
	defer netns.Close()
	a.call.Put(&pipe.Call{
		Env:   []string{"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + name, "CNI_IFNAME=eth0", "CNI_PATH=" + a.plugin.path, "CNI_NETNS=" + nl.Path(name)},
		Stdin: []byte(a.plugin.config),
	})
	exit, out, err := a.call.Do(a.plugin.lab.Nodes[0].AgentSocket, int(netns.Fd()), 58)
	if err != nil || exit != 0 {
		b.Fatalf("%s %s: exit code %d, %v\n%s", command, name, exit, err, out)
	}
}

// recordSize is that of struct endpoint of bpf/node_state.h, in bytes.
const recordSize = 1208

// kernelFloor makes the same netlink and bpf calls as an ADD, in a namespace of
// its own and by nobody who thinks about them: what no ADD can be faster than.
type kernelFloor struct {
	plugin  cniPlugin // for the pods' namespaces
	host    *nl.Conn
	prog    *ebpf.Program
	records *ebpf.Map // as `endpoints`
	ifaces  *ebpf.Map // as `ifaces`
	stats   *ebpf.Map // as `iface_stats`
	next    int
}

func newKernelFloor(b testing.TB, l *lab.Lab, p cniPlugin) *kernelFloor {
	b.Helper()
	f := &kernelFloor{plugin: p}
	name := fmt.Sprintf("ul-%s-floor", l.Name)
	if err := nl.NewNamed(name); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := nl.DeleteNamed(name); err != nil {
			b.Error(err)
		}
	})
	f.host = lab.In(b, nl.Path(name), nl.Dial)
	b.Cleanup(func() { _ = f.host.Close() })
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	var err error
	f.prog, err = ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}})
	must(err)
	b.Cleanup(func() { _ = f.prog.Close() })
	for _, m := range []struct {
		to        **ebpf.Map
		kind      ebpf.MapType
		key, size uint32
	}{{&f.records, ebpf.Hash, 16, recordSize}, {&f.ifaces, ebpf.Hash, 4, 40}, {&f.stats, ebpf.PerCPUHash, 4, 64}} {
		*m.to, err = ebpf.NewMap(&ebpf.MapSpec{Type: m.kind, KeySize: m.key, ValueSize: m.size, MaxEntries: 4096})
		must(err)
		b.Cleanup(func() { _ = (*m.to).Close() })
	}
	return f
}

// cycle returns the seconds that the calls of n ADDs take.
func (f *kernelFloor) cycle(b testing.TB, n int) float64 {
	b.Helper()
	names := f.plugin.namespaces(b, n)
	quiet()
	start := time.Now()
	for _, name := range names {
		if err := f.add(name); err != nil {
			b.Fatal(err)
		}
	}
	took := time.Since(start).Seconds()
	for _, name := range names {
		if err := nl.DeleteNamed(name); err != nil { // the devices go with it
			b.Fatal(err)
		}
	}
	return took
}

func (f *kernelFloor) add(name string) error {
	f.next++
	index := 1<<20 + f.next
	addr := netip.AddrFrom4([4]byte{198, 19, byte(f.next >> 8), byte(f.next)})
	gateway := netip.AddrFrom4([4]byte{169, 254, 1, 1})
	mac := net.HardwareAddr{0x02, 0x75, 198, 19, byte(f.next >> 8), byte(f.next)}
	hostMAC := net.HardwareAddr{0x02, 0x6c, 0x75, 0, 0, 1}

	netns, err := os.Open(nl.Path(name))
	if err != nil {
		return err
	}
	defer netns.Close()
	pod, err := nl.DialIn(netns)
	if err != nil {
		return err
	}
	defer pod.Close()
	if _, err := pod.NetnsCookie(); err != nil {
		return err
	}
	record, iface := make([]byte, recordSize), make([]byte, 40)
	key := addr.As16()
	put := func(how ebpf.MapUpdateFlags) error {
		if err := f.ifaces.Update(uint32(index), iface, ebpf.UpdateAny); err != nil {
			return err
		}
		return f.records.Update(key[:], record, how)
	}
	if err := put(ebpf.UpdateNoExist); err != nil {
		return err
	}
	cpus := make([][]byte, ebpf.MustPossibleCPU())
	for i := range cpus {
		cpus[i] = make([]byte, 64)
	}
	if err := f.stats.Update(uint32(index), cpus, ebpf.UpdateNoExist); err != nil {
		return err
	}

	link := fmt.Sprintf("ul%012x", f.next)
	var veth, qdisc, filters, inside, outside nl.Batch
	veth.VethAdd(nl.Veth{Name: link, Index: index, MAC: hostMAC, MTU: 9001, Group: 7, NoARP: true, PeerNetns: netns, PeerName: "eth0", PeerIndex: index, PeerMAC: mac, PeerMTU: 9001})
	qdisc.ClsactSet(index)
	for _, d := range []nl.Direction{nl.Ingress, nl.Egress} {
		filters.FilterSet(nl.Filter{Index: index, Direction: d, Priority: 1, Handle: 1, Name: "floor", FD: f.prog.FD()})
	}
	inside.LinkQuiet(index, "")
	inside.AddrAdd(index, netip.PrefixFrom(addr, 32))
	inside.LinkUp(index)
	inside.NeighSet(index, gateway, hostMAC)
	inside.RouteSet(nl.Route{Dst: netip.PrefixFrom(gateway, 32), Index: index, Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_STATIC})
	inside.RouteSet(nl.Route{Dst: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Gateway: gateway, Index: index, Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_STATIC})
	outside.LinkQuiet(index, link)
	outside.LinkUp(index)
	outside.NeighSet(index, addr, mac)
	outside.RouteSet(nl.Route{Dst: netip.PrefixFrom(addr, 32), Index: index, Table: 30060, Protocol: 117})
	for _, step := range []struct {
		conn  *nl.Conn
		batch *nl.Batch
	}{{f.host, &veth}, {f.host, &qdisc}, {f.host, &filters}, {pod, &inside}, {f.host, &outside}} {
		if err := step.conn.Exec(step.batch); err != nil {
			return err
		}
	}
	if _, err := pod.LinkByIndex(index); err != nil {
		return err
	}
	return put(ebpf.UpdateExist)
}
