package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/testenv"
	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
	"github.com/underlay-cni/underlay/test/lab"
)

// BenchmarkFabric measures the VPC's wires with everything that they judge by,
// on one CPU and by its time: two instances in two subnets, each with five groups of 60 rules,
// of which the last to be looked at allows, tracked flows, ACLs and a route
// table of the size of AWS's quotas. The base is the kernel's own forwarding
// between the same two namespaces, over two veth pairs and a third namespace.
func BenchmarkFabric(b *testing.B) {
	testenv.Require(b, "root", "bpf")
	f := newFabricLab(b)
	heavy := f.pair(groupsOf(60, 5), 0)
	light := f.pair(groupsOf(1, 1), 1)
	routed := f.routed(heavy)
	crowd := f.crowd(10_000)
	f.set()
	f.endIntervals()
	oneCPU(b)

	// What a measure counts, and how much of it its rate has for one.
	type kind struct {
		name    string
		measure func(testing.TB, pair) float64
		unit    string
		per     float64
	}
	tcp1 := kind{"tcp1", tcpBytesPerSecond, "ns of CPU time per 8949 bytes, a packet's", 8949}
	rr := kind{"rr", roundTripsPerSecond, "ns of CPU time per round trip", 1}
	crr := kind{"crr", connectionsPerSecond, "ns of CPU time per connection", 1}
	udp64 := kind{"udp64", datagramsPerSecond, "ns of CPU time per packet", 1}
	compare := func(group string, k kind, base string, subject, floor func() pair) Row {
		b.Helper()
		rate := func(p func() pair) func() float64 {
			return func() float64 {
				// vpcd does every five seconds; here it must not be in a measure.
				if _, err := f.f.ExpireFlows(); err != nil {
					b.Fatal(err)
				}
				return perCPUSecond(b, k.measure, p())
			}
		}
		name := group + "/" + k.name
		samples := Interleave(b, 1, []Subject{{"subject of " + name, rate(subject)}, {"base of " + name, rate(floor)}})
		r := RowOf(name, base, samples[0], samples[1])
		r.Subject, r.Floor, r.Unit = k.per*1e9/Median(samples[0]), k.per*1e9/Median(samples[1]), k.unit
		b.Logf("%s: %.0f against %.0f %s", name, r.Subject, r.Floor, r.Unit)
		return r
	}
	just := func(p pair) func() pair { return func() pair { return p } }

	var rows []Row
	for _, k := range []kind{tcp1, rr, crr, udp64} {
		rows = append(rows, compare("fabric", k, "the kernel's forwarding between the same namespaces; higher is better", just(heavy), just(routed)))
	}
	for _, k := range []kind{rr, crr, udp64} {
		rows = append(rows, compare("fabric-300-rules", k, "a pair with one group of one rule; higher is better", just(heavy), just(light)))
	}
	// The same pair with the crowd's addresses in the VPC and without them.
	for _, k := range []kind{crr, udp64} {
		rows = append(rows, compare("fabric-10000-addresses", k, "the same pair without them; higher is better",
			func() pair { crowd(true); return heavy }, func() pair { crowd(false); return heavy }))
	}
	if err := Write(kept(b, "fabric.json"), rows); err != nil {
		b.Fatal(err)
	}
}

// endIntervals ends and discards intervals of flow records when they are half
// full, as vpcd does: otherwise what is measured is a full map.
func (l *fabricLab) endIntervals() {
	stop, done := make(chan struct{}), make(chan struct{})
	l.b.Cleanup(func() { close(stop); <-done })
	go func() {
		defer close(done)
		tick := time.NewTicker(250 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			records, room, err := l.f.IntervalFill()
			if err == nil && records > room/2 {
				err = l.f.EndInterval()
			}
			for _, n := range l.f.EndedIntervals() {
				err = errors.Join(err, l.f.DiscardInterval(n))
			}
			if err != nil {
				l.b.Error(err)
				return
			}
		}
	}()
}

// fabricLab is a fabric with one VPC and no vpcd.
type fabricLab struct {
	b    testing.TB
	name string
	f    *fabric.Fabric
	cfg  fabric.Config
}

const (
	benchACL   = vpc.NetworkACLID("acl-00000000000000001")
	benchTable = vpc.RouteTableID("rtb-00000000000000001")
	routerName = "svc-router" // a guest without interface
)

// newFabricLab makes a VPC whose ACL and route table are as long as AWS's
// quotas allow (20 entries, 50 routes).
func newFabricLab(b testing.TB) *fabricLab {
	l := &fabricLab{b: b, name: fmt.Sprintf("t%dx1", os.Getpid())}
	root := filepath.Join("/run/underlay", l.name)
	if err := os.MkdirAll(filepath.Join(root, "bpf"), 0o755); err != nil {
		b.Fatal(err)
	}
	if err := unix.Mount("bpf", filepath.Join(root, "bpf"), "bpf", 0, ""); err != nil {
		b.Fatal(err)
	}
	o := fabric.Options{Lab: l.name, BPFFS: filepath.Join(root, "bpf", "vpcd")}
	f, err := fabric.Open(o)
	if err != nil {
		b.Fatal(err)
	}
	l.f = f
	b.Cleanup(func() {
		for _, err := range []error{f.Close(), fabric.Destroy(o), unix.Unmount(filepath.Join(root, "bpf"), unix.MNT_DETACH), os.RemoveAll(root)} {
			if err != nil {
				b.Error(err)
			}
		}
	})
	var entries []fabric.ACLEntry
	for n := range 19 {
		entries = append(entries, fabric.ACLEntry{Protocol: 6, From: 1 + n, To: 1 + n, CIDR: netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(n)}), 32)})
	}
	entries = append(entries, fabric.ACLEntry{Protocol: fabric.AllProtocols, CIDR: netip.MustParsePrefix("0.0.0.0/0"), Allow: true})
	routes := []fabric.Route{{CIDR: netip.MustParsePrefix("10.0.0.0/8"), Local: true}}
	for n := range 49 {
		routes = append(routes, fabric.Route{CIDR: netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 16, byte(n), 0}), 24)})
	}
	l.cfg = fabric.Config{
		ACLs:   []fabric.ACL{{ID: benchACL, Ingress: entries, Egress: entries}},
		Tables: []fabric.RouteTable{{ID: benchTable, Routes: routes}},
		Guests: []fabric.Guest{{Netns: l.netns(routerName)}},
	}
	return l
}

func (l *fabricLab) netns(name string) string { return "ul-" + l.name + "-" + name }

func (l *fabricLab) set() {
	l.b.Helper()
	if err := l.f.Set(context.Background(), l.cfg); err != nil {
		l.b.Fatal(err)
	}
}

// groupsOf returns groups of as many rules each way; the last rule of the last
// group allows TCP and UDP within the VPC, the others what nobody sends.
func groupsOf(rules, groups int) []fabric.Group {
	var out []fabric.Group
	for g := range groups {
		one := fabric.Group{ID: vpc.SecurityGroupID(fmt.Sprintf("sg-%017x", 0x100*rules+g+1))}
		for n := range rules {
			r := fabric.Rule{Protocol: 6, From: n + 1, To: n + 1, Group: vpc.SecurityGroupID(fmt.Sprintf("sg-%017x", 0xf0000+g*rules+n))}
			if g == groups-1 && n == rules-1 {
				// The programs have the rules in order of their groups' numbers.
				r = fabric.Rule{Protocol: fabric.AllProtocols, Group: "sg-0ffffffffffffffff"}
			}
			one.Ingress, one.Egress = append(one.Ingress, r), append(one.Egress, r)
		}
		out = append(out, one)
	}
	return out
}

// pair adds two instances in two subnets that have the groups, and the group
// that each lets in.
func (l *fabricLab) pair(groups []fabric.Group, n int) pair {
	const members = vpc.SecurityGroupID("sg-0ffffffffffffffff")
	if n == 0 {
		l.cfg.Groups = append(l.cfg.Groups, fabric.Group{ID: members})
	}
	ids := []vpc.SecurityGroupID{members}
	for _, g := range groups {
		ids = append(ids, g.ID)
	}
	l.cfg.Groups = append(l.cfg.Groups, groups...)
	var ends [2]*fabric.Interface
	for i := range ends {
		ends[i] = l.add(2*n+i, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(2*n + i), 0, 0}), 24))
		ends[i].Groups = ids
		l.cfg.Interfaces = append(l.cfg.Interfaces, *ends[i])
	}
	return pair{from: fabric.NetnsPath(ends[0].Guest), to: fabric.NetnsPath(ends[1].Guest), addr: ends[1].Primary}
}

// add adds a subnet and a guest, and returns an interface for them.
func (l *fabricLab) add(n int, subnet netip.Prefix) *fabric.Interface {
	id := vpc.SubnetID(fmt.Sprintf("subnet-%017x", n+1))
	guest := l.netns(fmt.Sprintf("i-%017x", n+1))
	first := subnet.Addr().As4()
	first[3] = 4
	l.cfg.Subnets = append(l.cfg.Subnets, fabric.Subnet{ID: id, VNI: 1, CIDR: subnet, Table: benchTable, ACL: benchACL})
	l.cfg.Guests = append(l.cfg.Guests, fabric.Guest{Netns: guest})
	primary := netip.AddrFrom4(first)
	return &fabric.Interface{
		ID: vpc.ENIID(fmt.Sprintf("eni-%017x", n+1)), VNI: 1, Subnet: id, MAC: net.HardwareAddr{2, 0xbe, 0, 0, 0, byte(n + 1)}, Guest: guest,
		Primary: primary, Addresses: []netip.Prefix{netip.PrefixFrom(primary, 32)}, SourceDestCheck: true, Configure: true,
	}
}

// crowd adds an instance and returns what gives its interface n more addresses,
// in prefixes, or takes them.
func (l *fabricLab) crowd(n int) func(there bool) {
	e := l.add(8, netip.MustParsePrefix("10.128.0.0/16"))
	e.Groups = []vpc.SecurityGroupID{l.cfg.Groups[0].ID}
	at := len(l.cfg.Interfaces)
	l.cfg.Interfaces = append(l.cfg.Interfaces, *e)
	alone := e.Addresses
	full := append([]netip.Prefix{}, alone...)
	for i := range n / 16 {
		a := binary.BigEndian.AppendUint32(nil, 10<<24|128<<16|uint32(256+16*i))
		full = append(full, netip.PrefixFrom(netip.AddrFrom4([4]byte(a)), 28))
	}
	return func(there bool) {
		l.cfg.Interfaces[at].Addresses = alone
		if there {
			l.cfg.Interfaces[at].Addresses = full
		}
		l.set()
	}
}

// routed joins the namespaces of p by two veth pairs and a namespace that
// forwards between them.
func (l *fabricLab) routed(p pair) pair {
	l.set()
	router := l.netns(routerName)
	for i, end := range []string{p.from, p.to} {
		lab.In(l.b, fabric.NetnsPath(router), func() (int, error) {
			return 0, os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0)
		})
		end = filepath.Base(end)
		for _, args := range [][]string{
			{"-n", end, "link", "add", "routed", "mtu", "9001", "type", "veth", "peer", "name", "r" + strconv.Itoa(i), "mtu", "9001", "netns", router},
			{"-n", end, "addr", "add", fmt.Sprintf("198.18.%d.2/24", i), "dev", "routed"},
			{"-n", router, "addr", "add", fmt.Sprintf("198.18.%d.1/24", i), "dev", "r" + strconv.Itoa(i)},
			{"-n", end, "link", "set", "routed", "up"},
			{"-n", router, "link", "set", "r" + strconv.Itoa(i), "up"},
			{"-n", end, "route", "add", fmt.Sprintf("198.18.%d.0/24", 1-i), "via", fmt.Sprintf("198.18.%d.1", i)},
		} {
			if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
				l.b.Fatalf("ip %v: %v: %s", args, err, out)
			}
		}
	}
	return pair{from: p.from, to: p.to, addr: netip.MustParseAddr("198.18.1.2")}
}

// datagramsPerSecond is udp64 by the clock.
func datagramsPerSecond(b testing.TB, p pair) float64 {
	return udp64(b, p, *slice).perSecond()
}

// perCPUSecond turns a measure by the clock into one by the CPU time of this
// process, in which the kernel's work for it is: on one CPU it is what the
// measure would be if the CPU were this process's own. Other processes then
// cost nothing but their traces in the caches.
func perCPUSecond(b testing.TB, measure func(testing.TB, pair) float64, p pair) float64 {
	w := startWatch()
	rate := measure(b, p)
	all := w.of(1)
	return rate * all.perCPUSecond() / all.perSecond()
}

// oneCPU keeps this process on one CPU: what sender, wires and receiver cost
// then adds up, and the scheduler has no say.
func oneCPU(b testing.TB) {
	var before unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		b.Fatal(err)
	}
	last := -1
	for cpu := range len(before) * 64 {
		if before.IsSet(cpu) {
			last = cpu
		}
	}
	var one unix.CPUSet
	one.Set(last)
	all := func(set *unix.CPUSet) {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			b.Fatal(err)
		}
		for _, t := range tasks {
			id, _ := strconv.Atoi(t.Name())
			if err := unix.SchedSetaffinity(id, set); err != nil && err != unix.ESRCH {
				b.Fatal(err)
			}
		}
	}
	all(&one)
	b.Cleanup(func() { all(&before) })
}
