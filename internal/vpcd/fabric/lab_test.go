package fabric

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/testenv"
	"github.com/underlay-cni/underlay/internal/testenv/bpfcache"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// patience bounds every wait of these tests for something that must happen.
const patience = 5 * time.Second

// refusal is how long a test waits for what must not arrive.
const refusal = 150 * time.Millisecond

const childVariable = "UNDERLAY_FABRIC_TEST_LAB"

// endingIntervals, in a child's environment, makes it end one interval of flow
// records after the other.
const endingIntervals = "UNDERLAY_FABRIC_TEST_INTERVALS=1"

// TestMain sweeps what killed test processes left. With childVariable set it
// is a process that opens a lab, sets the Config on its standard input, says so and
// waits to be killed.
func TestMain(m *testing.M) {
	if lab := os.Getenv(childVariable); lab != "" {
		if err := child(lab); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if os.Geteuid() == 0 {
		sweep()
		var err error
		if programs, err = bpfcache.New(filepath.Join("/run", fmt.Sprintf("%s%d", cachePrefix, os.Getpid()))); err != nil {
			fmt.Fprintln(os.Stderr, "programs are loaded anew for each lab:", err)
		}
	}
	code := m.Run()
	if programs != nil {
		if err := programs.Close(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = max(code, 1)
		}
	}
	os.Exit(code)
}

// programs keeps what the verifier has looked at; nil: there is nothing to keep.
var programs *bpfcache.Cache

const (
	cachePrefix   = "ul-tfabric"
	cacheVariable = "UNDERLAY_FABRIC_TEST_PROGRAMS" // in a child's environment
)

func child(lab string) error {
	if dir := os.Getenv(cacheVariable); dir != "" {
		programs = bpfcache.Join(dir)
	}
	f, err := Open(labOptions(lab))
	if err != nil {
		return err
	}
	for d := json.NewDecoder(os.Stdin); ; {
		var c Config
		if err := d.Decode(&c); errors.Is(err, io.EOF) {
			select {} // until it is killed
		} else if err != nil {
			return err
		}
		if err := f.Set(context.Background(), c); err != nil {
			return err
		}
		fmt.Println("set")
		for os.Getenv("UNDERLAY_FABRIC_TEST_INTERVALS") != "" {
			if err := f.EndInterval(); err != nil {
				return err
			}
			fmt.Println("interval ended")
		}
	}
}

func labRoot(lab string) string { return "/run/underlay/" + lab }

func labOptions(lab string) Options {
	o := Options{Lab: lab, BPFFS: labRoot(lab) + "/bpf/vpcd"}
	if programs != nil {
		o.loader = programs.Load
	}
	return o
}

var testLabName = regexp.MustCompile(`^(?:ul-)?(t([0-9]+)x[0-9]+)(?:-|$)`)

func sweep() {
	labs := map[string]bool{}
	for _, dir := range []string{nl.NetnsDir, "/run/underlay"} {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if m := testLabName.FindStringSubmatch(e.Name()); m != nil {
				if pid, _ := strconv.Atoi(m[2]); unix.Kill(pid, 0) != nil {
					labs[m[1]] = true
				}
			}
		}
	}
	for lab := range labs {
		removeLab(lab)
	}
	testenv.SweepDead(cachePrefix)
}

func removeLab(lab string) error {
	err := Destroy(labOptions(lab))
	_ = unix.Unmount(labRoot(lab)+"/bpf", unix.MNT_DETACH)
	return errors.Join(err, os.RemoveAll(labRoot(lab)))
}

var labs atomic.Int32

// lab is a fabric of the test's own.
type lab struct {
	*Fabric
	t    testing.TB
	name string
	next int // for IDs and MACs
	cfg  Config
	// discards says that the test discards intervals of flow records, so that at
	// its end they do not tell of all packets.
	discards bool
}

// newLab makes an empty lab with two VPCs of the same CIDR, numbers 1 and 2:
// subnets a (10.0.0.0/24) and b (10.0.1.0/24) of VPC 1, other (10.0.0.0/24) of
// VPC 2.
func newLab(t testing.TB) *lab {
	t.Helper()
	testenv.Require(t, "root", "bpf")
	name := fmt.Sprintf("t%dx%d", os.Getpid(), labs.Add(1))
	if err := os.MkdirAll(labRoot(name)+"/bpf", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("bpf", labRoot(name)+"/bpf", "bpf", 0, ""); err != nil {
		t.Fatal(err)
	}
	l := &lab{t: t, name: name}
	t.Cleanup(func() {
		if l.Fabric != nil {
			l.addsUp()
			if err := l.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
		}
		// With the lab's devices go its programs from where they run.
		if err := removeLab(name); err != nil {
			t.Error(err)
		} else if programs != nil {
			programs.Release(filepath.Join(labOptions(name).BPFFS, layout), nil)
		}
	})
	l.open()
	l.cfg.Subnets = []Subnet{
		{ID: subnetA, VNI: 1, CIDR: netip.MustParsePrefix("10.0.0.0/24"), Table: tableMain, ACL: aclOpen},
		{ID: subnetB, VNI: 1, CIDR: netip.MustParsePrefix("10.0.1.0/24"), Table: tableMain, ACL: aclOpen},
		{ID: subnetOther, VNI: 2, CIDR: netip.MustParsePrefix("10.0.0.0/24"), Table: tableOther, ACL: aclOpen},
	}
	local := []Route{{CIDR: netip.MustParsePrefix("10.0.0.0/16"), Local: true}}
	l.cfg.Tables = []RouteTable{{ID: tableMain, Routes: local}, {ID: tableOther, Routes: local}}
	pass := []ACLEntry{{Protocol: AllProtocols, CIDR: netip.MustParsePrefix("0.0.0.0/0"), Allow: true}}
	l.cfg.ACLs = []ACL{{ID: aclOpen, Ingress: pass, Egress: pass}}
	all := []Rule{{Protocol: AllProtocols, Peers: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}}}
	l.cfg.Groups = []Group{{ID: groupOpen, Ingress: all, Egress: all}}
	return l
}

// The route tables of the two VPCs, and an ACL that allows everything.
const (
	tableMain  vpc.RouteTableID = "rtb-0000000000000000a"
	tableOther vpc.RouteTableID = "rtb-0000000000000000b"
	aclOpen    vpc.NetworkACLID = "acl-0000000000000000f"
)

// groupOpen allows everything; add gives it to each interface.
const groupOpen vpc.SecurityGroupID = "sg-0000000000000000f"

const (
	subnetA     vpc.SubnetID = "subnet-0000000000000000a"
	subnetB     vpc.SubnetID = "subnet-0000000000000000b"
	subnetOther vpc.SubnetID = "subnet-0000000000000000c"
)

func (l *lab) open() {
	l.t.Helper()
	f, err := Open(labOptions(l.name))
	if err != nil {
		l.t.Fatal(err)
	}
	l.Fabric = f
}

// host is a guest with one configured interface.
type host struct {
	l    *lab
	ns   string
	eni  vpc.ENIID
	addr netip.Addr
	six  netip.Addr // of IPv6, see add6
	mac  net.HardwareAddr
}

// add adds a guest with one interface to the Config, not yet to the fabric.
func (l *lab) add(subnet vpc.SubnetID, primary string, more ...string) *host {
	l.t.Helper()
	l.next++
	h := &host{
		l:    l,
		ns:   fmt.Sprintf("ul-%s-i-%017x", l.name, l.next),
		eni:  vpc.ENIID(fmt.Sprintf("eni-%017x", 0xabc0000000000000+uint64(l.next))),
		addr: netip.MustParseAddr(primary),
		mac:  net.HardwareAddr{0x02, 0xaa, 0, 0, 0, byte(l.next)},
	}
	i := Interface{
		ID: h.eni, Subnet: subnet, MAC: h.mac, Guest: h.ns, Primary: h.addr,
		Addresses:       []netip.Prefix{netip.PrefixFrom(h.addr, 32)},
		SourceDestCheck: true, Configure: true, Groups: []vpc.SecurityGroupID{groupOpen},
	}
	for _, s := range l.cfg.Subnets {
		if s.ID == subnet {
			i.VNI = s.VNI
		}
	}
	for _, m := range more {
		i.Addresses = append(i.Addresses, netip.MustParsePrefix(m))
	}
	l.cfg.Guests = append(l.cfg.Guests, Guest{Netns: h.ns})
	l.cfg.Interfaces = append(l.cfg.Interfaces, i)
	return h
}

func (l *lab) iface(id vpc.ENIID) *Interface {
	for i := range l.cfg.Interfaces {
		if l.cfg.Interfaces[i].ID == id {
			return &l.cfg.Interfaces[i]
		}
	}
	l.t.Fatalf("no interface %s", id)
	return nil
}

func (l *lab) set() {
	l.t.Helper()
	if err := l.Set(context.Background(), l.cfg); err != nil {
		l.t.Fatal(err)
	}
	l.replaced()
}

// replaced says that the programs of processes before run no more: Set has put
// others in their place.
func (l *lab) replaced() {
	l.t.Helper()
	if programs == nil {
		return
	}
	if err := programs.Replaced(filepath.Join(labOptions(l.name).BPFFS, layout)); err != nil {
		l.t.Fatal(err)
	}
}

// do runs fn in the guest.
func (h *host) do(fn func() error) {
	h.l.t.Helper()
	if err := nl.Do(NetnsPath(h.ns), fn); err != nil {
		h.l.t.Fatal(err)
	}
}

// ip runs the ip command in the guest.
func (h *host) ip(args ...string) {
	h.l.t.Helper()
	out, err := exec.Command("ip", append([]string{"-n", h.ns}, args...)...).CombinedOutput()
	if err != nil {
		h.l.t.Fatalf("ip -n %s %v: %v: %s", h.ns, args, err, out)
	}
}

// ping sends one echo request and returns the TTL of its answer.
func (h *host) ping(from, to netip.Addr, size int, wait time.Duration) (ttl int, err error) {
	err = nl.Do(NetnsPath(h.ns), func() error {
		c, err := net.ListenPacket("ip4:icmp", from.String())
		if err != nil {
			return err
		}
		defer c.Close()
		p := ipv4.NewPacketConn(c)
		if err := p.SetControlMessage(ipv4.FlagTTL, true); err != nil {
			return err
		}
		echo := &icmp.Echo{ID: os.Getpid() & 0xffff, Seq: int(pingSeq.Add(1)) & 0xffff, Data: make([]byte, size)}
		m, err := (&icmp.Message{Type: ipv4.ICMPTypeEcho, Body: echo}).Marshal(nil)
		if err != nil {
			return err
		}
		if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
			return err
		}
		if _, err := c.WriteTo(m, &net.IPAddr{IP: to.AsSlice()}); err != nil {
			return err
		}
		buf := make([]byte, 1<<16)
		for {
			n, cm, src, err := p.ReadFrom(buf)
			if err != nil {
				return err
			}
			r, err := icmp.ParseMessage(1, buf[:n])
			if err != nil || r.Type != ipv4.ICMPTypeEchoReply {
				continue
			}
			if e := r.Body.(*icmp.Echo); e.ID == echo.ID && e.Seq == echo.Seq && src.String() == to.String() && len(e.Data) == size {
				ttl = cm.TTL
				return nil
			}
		}
	})
	return ttl, err
}

var pingSeq atomic.Int32

func (h *host) reaches(o *host) {
	h.l.t.Helper()
	h.reachesAt(h.addr, o.addr)
}

func (h *host) reachesAt(from, to netip.Addr) {
	h.l.t.Helper()
	ttl, err := h.ping(from, to, 56, patience)
	if err != nil {
		h.l.t.Errorf("ping %s → %s: %v", from, to, err)
	} else if ttl != 64 {
		h.l.t.Errorf("ping %s → %s: TTL %d of the answer, want it untouched (64)", from, to, ttl)
	}
}

func (h *host) reachesNot(from, to netip.Addr) {
	h.l.t.Helper()
	if _, err := h.ping(from, to, 56, refusal); err == nil {
		h.l.t.Errorf("ping %s → %s was answered", from, to)
	}
}

// drops returns how many frames of the ENI were dropped for the reason.
func (h *host) drops(reason DropReason) uint64 {
	h.l.t.Helper()
	return h.counters().Drops[reason]
}

func (h *host) counters() Counters {
	h.l.t.Helper()
	all, err := h.l.Counters()
	if err != nil {
		h.l.t.Fatal(err)
	}
	c, ok := all[h.eni]
	if !ok {
		h.l.t.Fatalf("no counters of %s", h.eni)
	}
	return c
}

// counts checks that fn makes the ENI's drops for the reason grow.
func (h *host) counts(reason DropReason, fn func()) {
	h.l.t.Helper()
	before := h.drops(reason)
	fn()
	if after := h.drops(reason); after <= before {
		h.l.t.Errorf("%s: %d drops for %s before and %d after", h.eni, before, reason, after)
	}
}

// process is a child that holds the lab open.
type process struct {
	cmd    *exec.Cmd
	config *json.Encoder
	said   *bufio.Scanner
}

// spawn starts a child process on the lab; this process must have it closed.
func (l *lab) spawn(env ...string) *process {
	l.t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(append(os.Environ(), childVariable+"="+l.name), env...)
	if programs != nil {
		cmd.Env = append(cmd.Env, cacheVariable+"="+programs.Dir())
	}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	p := &process{cmd, json.NewEncoder(in), bufio.NewScanner(out)}
	l.t.Cleanup(func() { p.kill() })
	return p
}

func (p *process) set(t testing.TB, c Config) {
	t.Helper()
	if err := p.config.Encode(c); err != nil {
		t.Fatal(err)
	}
	p.says(t, "set")
}

func (p *process) says(t testing.TB, what string) {
	t.Helper()
	if !p.said.Scan() || p.said.Text() != what {
		t.Fatalf("child said %q (%v), want %q", p.said.Text(), p.said.Err(), what)
	}
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

func (l *lab) shut() {
	l.t.Helper()
	if err := l.Close(); err != nil {
		l.t.Fatal(err)
	}
	l.Fabric = nil
}

func linkPin(l *lab, name string) string {
	return filepath.Join(labOptions(l.name).BPFFS, layout, "links", name)
}
