package bench

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/testenv"
	"github.com/underlay-cni/underlay/test/lab"
)

// measure is one figure of traffic between two namespaces; higher is better.
type measure struct {
	name, unit string
	of         func(testing.TB, pair, time.Duration) work
	perCPU     bool // per second of this process's CPU time, and not of the clock
}

var (
	measureTCP1 = measure{"tcp1", "bytes/s", tcp1, true}
	measureTCP2 = measure{"tcp2", "bytes/s", tcp2, false}
	measureRR1  = measure{"rr1", "round trips/s", rr1, true}
	measureCRR  = measure{"crr", "connections/s", crr, false}
	measureCRR1 = measure{"crr1", "connections/s", crr1, true}
	measureUDP  = measure{"udp64", "datagrams/s", udp64, true}
)

// parts is into how many pieces the traffic of a turn is cut, so that what happens on
// the machine meanwhile happens to all that are compared; and the rate of a stream,
// which depends on how its sender and receiver meet, is the mean of as many streams.
const parts = 10

func (m measure) take(b testing.TB, p pair) float64 {
	w := m.of(b, p, *slice/parts)
	if m.perCPU {
		return w.perCPUSecond()
	}
	return w.perSecond()
}

// contender is one way for packets that is measured beside others.
type contender struct {
	name string
	pair pair
	what string // as base of a row
}

// compare measures the contenders in turns and returns the rows of the first to
// each of the others.
func compare(b *testing.B, m measure, first contender, others ...contender) []Row {
	b.Helper()
	others = slices.DeleteFunc(others, func(c contender) bool { return !chosen(first.name + "-" + c.name + "/" + m.name) })
	if len(others) == 0 {
		return nil
	}
	all := append([]contender{first}, others...)
	subjects := make([]Subject, len(all))
	for i, c := range all {
		subjects[i] = Subject{c.name + "/" + m.name, func() float64 { return m.take(b, c.pair) }}
	}
	samples := Interleave(b, parts, subjects)
	var rows []Row
	for i, c := range others {
		r := RowOf(first.name+"-"+c.name+"/"+m.name, c.what+"; higher is better", samples[0], samples[i+1])
		r.Subject, r.Floor, r.Unit = Median(samples[0]), Median(samples[i+1]), m.unit
		rows = append(rows, r)
	}
	return rows
}

// BenchmarkNode measures the node's datapath against what pods could have
// instead, all with public tools and over equal wires: veth pairs between two
// network namespaces, no physical NIC. tcp1, rr1, crr1 and udp64 are on one CPU
// and by its time, which does not depend on who else is on the machine; tcp2, rr
// and crr between two CPUs and by the clock.
func BenchmarkNode(b *testing.B) {
	testenv.Require(b, "root", "bpf", "portmap") // for iptables
	allowedCPUs(b)
	ours := newUnderlay(b, "ours")
	podA, podB, podC := ours.busy(0), ours.busy(1), ours.busy(0)
	bare, emptyNF := newSite(b, "bare"), withEmptyNetfilter(b, "emptynf")
	aws, awsPods := newAWS(b, "aws")
	vxlan, vxlanPods := newVXLAN(b, "vxlan")
	floorPods := newFloor(b, "floor")
	withService := newUnderlay(b, "svc")
	serviceFrom, serviceTo := withService.busy(0), withService.busy(1)
	awsService, awsServicePods := newAWS(b, "awssvc")

	pod := contender{"pod", pairTo(podA.ns, podB.ns, podB.addr), ""}
	node := contender{"node", emptyNF.between(), "node to node over an equal wire; netfilter's tables are there and empty"}
	noNF := contender{"bare", bare.between(), "node to node over an equal wire, and no netfilter in the kernel's way"}
	asAWS := contender{"aws", pairTo(awsPods[0].ns, awsPods[1].ns, awsPods[1].addr), "pod to pod in the manner of the AWS VPC CNI: veth, ip rules, iptables SNAT and connmark"}
	asVXLAN := contender{"vxlan", pairTo(vxlanPods[0].ns, vxlanPods[1].ns, vxlanPods[1].addr), "pod to pod in the manner of flannel's VXLAN"}
	floor := contender{"floor", pairTo(floorPods[0].ns, floorPods[1].ns, floorPods[1].addr), "pod to pod by BPF programs that redirect whatever comes and check, track and count nothing"}
	samenode := contender{"samenode", pairTo(podA.ns, podC.ns, podC.addr), ""}
	veth := contender{"veth", newBare(b, "veth"), "two namespaces joined by one veth pair"}
	clusterIP := contender{"clusterip", withService.service(serviceFrom, serviceTo), ""}
	awsClusterIP := contender{"aws", awsService.service(awsServicePods[0], awsServicePods[1]), "the same ClusterIP in the manner of the AWS VPC CNI"}
	_, _ = aws, vxlan

	oneCPU(b)
	var rows []Row
	rows = append(rows, compare(b, measureTCP1, pod, node, noNF, floor, asAWS, asVXLAN)...)
	rows = append(rows, compare(b, measureTCP2, pod, node, noNF)...)
	if chosen("pod-node/rr") {
		rows = append(rows, roundTrips(b, pod, node)...)
	}
	rows = append(rows, compare(b, measureRR1, pod, node, noNF, floor, asAWS)...)
	rows = append(rows, compare(b, measureCRR, pod, node, noNF, asAWS)...)
	rows = append(rows, compare(b, measureCRR1, pod, node, noNF, floor, asAWS)...)
	rows = append(rows, compare(b, measureUDP, pod, node, noNF, floor, asAWS, asVXLAN)...)
	for _, m := range []measure{measureTCP1, measureRR1, measureCRR1, measureUDP} {
		rows = append(rows, compare(b, m, samenode, veth)...)
	}
	for _, m := range []measure{measureTCP1, measureRR1, measureCRR1} {
		rows = append(rows, compare(b, m, clusterIP, awsClusterIP)...)
	}
	for _, g := range growths {
		if !chosen(g.name + "-one") {
			continue
		}
		small, large := g.make(b)
		for _, m := range []measure{measureRR1, measureCRR1, measureUDP} {
			rows = append(rows, compare(b, m, contender{g.name, large, ""}, contender{"one", small, g.base})...)
		}
	}
	if chosen("group10000/replace") {
		rows = append(rows, replaced(b))
	}
	if chosen("memory/pod") {
		rows = append(rows, memory(b))
	}
	if err := Merge(kept(b, latest), rows); err != nil {
		b.Fatal(err)
	}
	if err := report(rows, kept(b, "node.md"), kept(b, "node.svg")); err != nil {
		b.Fatal(err)
	}
}

// roundTrips is compare for request and response, with a row for the time that
// 99 % of them take: of a turn it is the median of its parts'.
func roundTrips(b *testing.B, first, base contender) []Row {
	b.Helper()
	var slow [2][]float64 // by part
	var subjects []Subject
	for i, c := range []contender{first, base} {
		subjects = append(subjects, Subject{c.name + "/rr", func() float64 {
			client, server := twoCPUs(b)
			trips, p99 := pingPong(b, c.pair, client, server, *slice/parts)
			slow[i] = append(slow[i], p99)
			return trips.perSecond()
		}})
	}
	samples := Interleave(b, parts, subjects)
	r := RowOf(first.name+"-"+base.name+"/rr", base.what+"; higher is better", samples[0], samples[1])
	r.Subject, r.Floor, r.Unit = Median(samples[0]), Median(samples[1]), measureRR1.unit
	for i, all := range slow {
		slow[i] = nil
		for turn := range slices.Chunk(all[parts:], parts) { // without the round that warms up
			slow[i] = append(slow[i], Median(turn))
		}
	}
	tail := RowOf(first.name+"-"+base.name+"/rr-p99", base.what+"; lower is better", slow[0], slow[1])
	tail.Subject, tail.Floor, tail.Unit = Median(slow[0]), Median(slow[1]), "s"
	return []Row{r, tail}
}

// growth is something of which a node can have little or much. Its rows are of
// the same traffic on two equal sites, of which one has much.
type growth struct {
	name string
	base string
	make func(testing.TB) (small, large pair)
}

// grown makes the two sites, one with little and one with much.
func grown(b testing.TB, name string, little, much func(u *underlay, from, to benchPod)) (small, large pair) {
	b.Helper()
	var out [2]pair
	for i, size := range []string{"small", "large"} {
		u := newUnderlay(b, name+size)
		from, to := u.busy(0), u.busy(1)
		out[i] = pairTo(from.ns, to.ns, to.addr)
		if make := []func(*underlay, benchPod, benchPod){little, much}[i]; make != nil {
			make(u, from, to)
		}
	}
	return out[0], out[1]
}

const (
	manyPods        = 250
	manyRules       = 300
	manyPeers       = 10_000
	manyConnections = 100_000
)

// judged has both pods judged by a policy.
func judged(b testing.TB, rules, peers int) func(*underlay, benchPod, benchPod) {
	return func(u *underlay, from, to benchPod) {
		b.Helper()
		t := law(b, rules, peers, 0)
		for i, p := range []benchPod{from, to} {
			if err := u.d[i].SetPolicy(p.endpoint, t); err != nil {
				b.Fatal(err)
			}
		}
	}
}

var growths = []growth{
	{"pods250", "the same with one pod on the node", func(b testing.TB) (small, large pair) {
		return grown(b, "pods", nil, func(u *underlay, _, _ benchPod) {
			for range manyPods - 1 {
				u.pod(0)
			}
		})
	}},
	{"rules300", "the same with one rule in each gate and direction", func(b testing.TB) (small, large pair) {
		return grown(b, "rules", judged(b, 1, usualPeers), judged(b, manyRules, usualPeers))
	}},
	{"peers10000", "the same with ten peers", func(b testing.TB) (small, large pair) {
		return grown(b, "peers", judged(b, usualRules, 10), judged(b, usualRules, manyPeers))
	}},
	{"conns100000", "the same with no other connection", func(b testing.TB) (small, large pair) {
		// Of other pods: those that are measured have their share of the table to themselves.
		return grown(b, "conns", nil, func(u *underlay, _, _ benchPod) { connections(b, u.pod(0), u.pod(1), manyConnections) })
	}},
}

// connections has a pod send one datagram in each of n flows to another, so that
// whoever tracks connections tracks so many more. They count as idle from then
// on and stay for as long as an unanswered datagram's.
func connections(b testing.TB, from, to benchPod, n int) {
	b.Helper()
	// The far side takes them, or would answer each by ICMP.
	const ports = 400
	per := n / ports
	for i := range ports {
		port := uint16(20000 + i)
		sink := lab.In(b, nl.Path(to.ns), func() (*net.UDPConn, error) {
			return net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(to.addr, port)))
		})
		b.Cleanup(func() { _ = sink.Close() })
	}
	_ = lab.In(b, nl.Path(from.ns), func() (int, error) {
		for s := range per {
			c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(from.addr, uint16(30000+s))))
			if err != nil {
				return 0, err
			}
			for i := range ports {
				if _, err := c.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(to.addr, uint16(20000+i))); err != nil {
					return 0, err
				}
			}
			if err := c.Close(); err != nil {
				return 0, err
			}
		}
		return 0, nil
	})
}

// replaced returns the row of the time from new members of a group to packets
// that are judged by them: compiled, and put in the place of the old.
func replaced(b *testing.B) Row {
	b.Helper()
	const allowed = 0.1 // seconds
	u := newUnderlay(b, "replace")
	p := u.pod(0)
	turn := 0
	measured := Interleave(b, 1, []Subject{{"replace", func() float64 {
		turn++
		start := time.Now()
		if err := u.d[0].SetPolicy(p.endpoint, law(b, usualRules, manyPeers, turn%2)); err != nil {
			b.Fatal(err)
		}
		return time.Since(start).Seconds()
	}}})[0]
	limit := make([]float64, len(measured))
	for i := range limit {
		limit[i] = allowed
	}
	r := RowOf("group10000/replace", "100 ms; lower is better", measured, limit)
	r.Subject, r.Floor, r.Unit = Median(measured), allowed, "s"
	return r
}

// memoryPods is how many pods memory is measured with.
const memoryPods = 200

// memory returns the row of what a pod costs, in the kernel and in this process,
// with its network namespace, which the runtime makes. The kernel's share is what
// it keeps for itself by /proc/meminfo.
func memory(b *testing.B) Row {
	b.Helper()
	const allowed = 400 << 10 // bytes
	var perPod []float64
	for range min(*turns, 3) {
		u := newUnderlay(b, fmt.Sprintf("mem%d", sites))
		without := kernelMemory(b)
		for i := range memoryPods {
			u.netns(fmt.Sprintf("empty%d", i))
		}
		before, heapBefore := kernelMemory(b), heap()
		empty := before - without
		for range memoryPods {
			u.pod(0)
		}
		all := kernelMemory(b) - before + heap() - heapBefore
		perPod = append(perPod, max(all, 1)/memoryPods)
		b.Logf("a pod takes %.0f KiB, of which its empty namespace %.0f KiB", all/memoryPods/1024, empty/memoryPods/1024)
	}
	limit := make([]float64, len(perPod))
	for i := range limit {
		limit[i] = allowed
	}
	r := RowOf("memory/pod", "400 KiB, kernel and agent, the network namespace included; lower is better", perPod, limit)
	r.Subject, r.Floor, r.Unit = Median(perPod), allowed, "bytes"
	return r
}

// kernelMemory is what the kernel uses itself, in bytes, when it has settled.
func kernelMemory(b testing.TB) float64 {
	b.Helper()
	quiet()
	raw, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		b.Fatal(err)
	}
	sum := 0.0
	for line := range strings.Lines(string(raw)) {
		f := strings.Fields(line)
		switch f[0] {
		case "SUnreclaim:", "KernelStack:", "PageTables:", "VmallocUsed:", "Percpu:":
			kib, err := strconv.ParseFloat(f[1], 64)
			if err != nil {
				b.Fatal(err)
			}
			sum += kib * 1024
		}
	}
	return sum
}

func heap() float64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapInuse + m.StackInuse)
}

// kernelRelease is as uname -r prints it.
func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

var began = time.Now()
