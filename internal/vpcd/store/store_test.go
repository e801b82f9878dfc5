package store

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/vpc"
)

func open(t *testing.T, path string, o Options) *Store {
	t.Helper()
	s, err := Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func update(t *testing.T, s *Store, fn func(*Tx)) {
	t.Helper()
	if err := s.Update(func(tx *Tx) error { fn(tx); return nil }); err != nil {
		t.Fatal(err)
	}
}

const (
	testVPC    = vpc.VPCID("vpc-00000000000000001")
	testSubnet = vpc.SubnetID("subnet-00000000000000001")
)

func network(tx *Tx) {
	tx.PutVPC(&VPC{ID: testVPC, VNI: tx.NewVNI(), CIDRs: []CIDRAssociation{{"vpc-cidr-assoc-1", netip.MustParsePrefix("10.0.0.0/16")}}})
	tx.PutSubnet(&Subnet{ID: testSubnet, VPC: testVPC, CIDR: netip.MustParsePrefix("10.0.0.0/24"), Zone: "us-east-1a"})
}

func eni(n int) *ENI {
	return &ENI{ID: vpc.ENIID(fmt.Sprintf("eni-%017x", n)), VPC: testVPC, Subnet: testSubnet, MAC: fmt.Sprintf("02:00:00:00:%02x:%02x", n>>8, n&255), Primary: netip.AddrFrom4([4]byte{10, 0, 0, byte(n)})}
}

// objects is what a state holds that is stored, in a form that can be compared.
func objects(s *State) map[string]any {
	out := map[string]any{}
	for k, v := range s.VPCs.All() {
		out[string(k)] = v
	}
	for k, v := range s.Subnets.All() {
		out[string(k)] = v
	}
	for k, v := range s.Instances.All() {
		out[string(k)] = v
	}
	for k, v := range s.ENIs.All() {
		out[string(k)] = v
	}
	for k, v := range s.Groups.All() {
		out[string(k)] = v
	}
	for k, v := range s.Services.All() {
		out["service "+k] = v
	}
	collect(out, s.Reservations)
	collect(out, s.RouteTables)
	collect(out, s.ACLs)
	collect(out, s.Gateways)
	collect(out, s.EgressOnlyGateways)
	collect(out, s.Addresses)
	collect(out, s.NATs)
	collect(out, s.Peerings)
	collect(out, s.PrefixLists)
	collect(out, s.DHCPOptions)
	collect(out, s.FlowLogs)
	for k, v := range s.Tags.All() {
		out["tags "+k] = v
	}
	for k, v := range s.tokens.All() {
		out["token "+k] = v
	}
	return out
}

func collect[K ~string, V any](into map[string]any, t Table[K, V]) {
	for k, v := range t.All() {
		into[string(k)] = v
	}
}

var addrs = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
var prefixes = cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })

func TestTableIsAPersistentMap(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	tab := Table[string, int]{cmp: strings.Compare}
	model := map[string]int{}
	type version struct {
		tab   Table[string, int]
		model map[string]int
	}
	var versions []version
	check := func(tab Table[string, int], model map[string]int) {
		t.Helper()
		var keys []string
		for k, v := range tab.All() {
			if model[k] != v {
				t.Fatalf("%s = %d, want %d", k, v, model[k])
			}
			keys = append(keys, k)
		}
		if tab.Len() != len(model) || len(keys) != len(model) || !slices.IsSorted(keys) {
			t.Fatalf("%d entries, Len %d, want %d, in order", len(keys), tab.Len(), len(model))
		}
	}
	for i := range 3000 {
		k := fmt.Sprint(r.IntN(300))
		if r.IntN(3) == 0 {
			tab = tab.without(k)
			delete(model, k)
		} else {
			tab = tab.with(k, i)
			model[k] = i
		}
		if i%100 == 0 {
			m := map[string]int{}
			for k, v := range model {
				m[k] = v
			}
			versions = append(versions, version{tab, m})
		}
	}
	check(tab, model)
	for _, v := range versions { // what came later changed none of them
		check(v.tab, v.model)
	}
	var from []string
	for k := range tab.From("2") {
		from = append(from, k)
	}
	if len(from) == 0 || from[0] < "2" || !slices.IsSorted(from) {
		t.Errorf("From(2) = %v", from)
	}
}

func TestReopenFindsEverything(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	s := open(t, path, Options{})
	now := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	update(t, s, func(tx *Tx) {
		network(tx)
		e := eni(9)
		e.Secondary = []netip.Addr{netip.MustParseAddr("10.0.0.20")}
		e.Prefixes = []netip.Prefix{netip.MustParsePrefix("10.0.0.32/28")}
		e.Attachment = &Attachment{ID: "eni-attach-1", Instance: "i-1", DeviceIndex: 1, Status: Attaching, Due: now.Add(time.Second)}
		tx.PutENI(e)
		tx.PutInstance(&Instance{ID: "i-1", State: Pending, Due: now, Launched: now})
		tx.PutGroup(&Group{ID: "sg-1", VPC: testVPC, Rules: []Rule{{ID: "sgr-1", CIDR: netip.MustParsePrefix("0.0.0.0/0")}}})
		tx.PutService(&Service{Name: "db-1", ENI: e.ID})
		tx.SetTags("sgr-1", map[string]string{"a": "b"})
		tx.PutToken(&Token{Key: "RunInstances/x", Params: "y", Results: []string{"r-1"}, Created: now})
	})
	before := s.View()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, path, Options{})
	after := s.View()
	if d := cmp.Diff(objects(before), objects(after), addrs, prefixes); d != "" {
		t.Errorf("reopened (-before +after):\n%s", d)
	}
	if got := after.Space(testSubnet).Free(); got != 256-5-18 {
		t.Errorf("%d addresses free, want %d", got, 256-5-18)
	}
	if e := after.ByAddress(testSubnet, netip.MustParseAddr("10.0.0.47")); e == nil || e.ID != eni(9).ID {
		t.Errorf("10.0.0.47 belongs to %v", e)
	}
	if e := after.ByAttachment("eni-attach-1"); e == nil {
		t.Error("attachment lost")
	}
	if at, ok := after.NextDue(); !ok || !at.Equal(now) {
		t.Errorf("next due %v %v", at, ok)
	}
	if d := cmp.Diff([]string{"i-1", string(eni(9).ID)}, after.DueBy(now.Add(time.Second))); d != "" {
		t.Errorf("due:\n%s", d)
	}
	update(t, s, func(tx *Tx) {
		if n := tx.NewVNI(); n != 2 {
			t.Errorf("VNI %d used again", n)
		}
	})
}

func TestConflictChangesNothing(t *testing.T) {
	for name, spoil := range map[string]func(*ENI){
		"primary":        func(e *ENI) { e.Primary = netip.MustParseAddr("10.0.0.9") },
		"secondary":      func(e *ENI) { e.Secondary = []netip.Addr{netip.MustParseAddr("10.0.0.9")} },
		"own twice":      func(e *ENI) { e.Secondary = []netip.Addr{e.Primary} },
		"in a prefix":    func(e *ENI) { e.Secondary = []netip.Addr{netip.MustParseAddr("10.0.0.40")} },
		"prefix":         func(e *ENI) { e.Prefixes = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/28")} },
		"reserved":       func(e *ENI) { e.Primary = netip.MustParseAddr("10.0.0.3") },
		"outside":        func(e *ENI) { e.Primary = netip.MustParseAddr("10.0.1.3") },
		"MAC":            func(e *ENI) { e.MAC = eni(9).MAC },
		"unknown subnet": func(e *ENI) { e.Subnet = "subnet-2" },
		"device index": func(e *ENI) {
			e.Attachment = &Attachment{ID: "eni-attach-2", Instance: "i-1", DeviceIndex: 1}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, filepath.Join(t.TempDir(), "state.db"), Options{})
			update(t, s, func(tx *Tx) {
				network(tx)
				e := eni(9)
				e.Prefixes = []netip.Prefix{netip.MustParsePrefix("10.0.0.32/28")}
				e.Attachment = &Attachment{ID: "eni-attach-1", Instance: "i-1", DeviceIndex: 1}
				tx.PutENI(e)
			})
			before := s.View()
			e := eni(10)
			spoil(e)
			if err := s.Update(func(tx *Tx) error { tx.PutENI(e); return nil }); !errors.Is(err, ErrConflict) {
				t.Errorf("Update = %v, want ErrConflict", err)
			}
			if s.View() != before {
				t.Error("the snapshot changed")
			}
			boom := errors.New("boom")
			if err := s.Update(func(tx *Tx) error { tx.DeleteENI(eni(9).ID); return boom }); !errors.Is(err, boom) {
				t.Errorf("Update = %v, want boom", err)
			}
			if before.Space(testSubnet).Free() != 256-5-17 || s.View() != before {
				t.Error("a failed update left something behind")
			}
		})
	}
}

func TestTryUndoesWhatFails(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	s := open(t, path, Options{})
	boom := errors.New("boom")
	update(t, s, func(tx *Tx) {
		network(tx)
		tx.PutENI(eni(8))
		if err := tx.Try(func() error {
			tx.PutENI(eni(9))
			tx.DeleteENI(eni(8).ID)
			return boom
		}); !errors.Is(err, boom) {
			t.Errorf("Try = %v", err)
		}
		if err := tx.Try(func() error { e := eni(10); e.Primary = eni(8).Primary; tx.PutENI(e); return nil }); !errors.Is(err, ErrConflict) {
			t.Errorf("Try = %v", err)
		}
		if err := tx.Try(func() error { tx.PutENI(eni(11)); return nil }); err != nil {
			t.Error(err)
		}
	})
	check := func(v *State) {
		t.Helper()
		if v.ENI(eni(8).ID) == nil || v.ENI(eni(9).ID) != nil || v.ENI(eni(10).ID) != nil || v.ENI(eni(11).ID) == nil || v.Space(testSubnet).Free() != 251-2 {
			t.Errorf("%v, %d free", objects(v), v.Space(testSubnet).Free())
		}
	}
	check(s.View())
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	check(open(t, path, Options{}).View())
}

func TestAtReturnsWhatWasNewest(t *testing.T) {
	start := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	now := start
	s := open(t, filepath.Join(t.TempDir(), "state.db"), Options{Now: func() time.Time { return now }})
	s.KeepHistory(func() time.Duration { return 5 * time.Second })
	for i := range 20 {
		now = start.Add(time.Duration(i+1) * time.Second)
		update(t, s, func(tx *Tx) { tx.PutVPC(&VPC{ID: testVPC, VNI: uint32(i + 1)}) })
	}
	for ago, want := range map[time.Duration]uint32{0: 20, time.Second: 19, 1500 * time.Millisecond: 18, 5 * time.Second: 15, time.Hour: 15} {
		if v := s.At(now.Add(-ago)).VPC(testVPC); v == nil || v.VNI != want {
			t.Errorf("%s ago: %+v, want %d", ago, v, want)
		}
	}
	if n := len(s.past); n > 6 {
		t.Errorf("%d old snapshots kept", n)
	}
}

func TestChangedCoalesces(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "state.db"), Options{})
	sub := s.Subscribe()
	for range 3 {
		update(t, s, func(tx *Tx) { tx.NewVNI() })
	}
	for _, c := range []<-chan struct{}{s.Changed(), sub} {
		select {
		case <-c:
		default:
			t.Error("no trigger")
		}
		select {
		case <-c:
			t.Error("a second trigger")
		default:
		}
	}
}

// A file of the format before has VPCs without route tables and network ACLs.
func TestOlderFormatIsCompleted(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	s := open(t, path, Options{})
	update(t, s, func(tx *Tx) {
		network(tx)
		v := *tx.VPC(testVPC)
		v.DHCPOptions = "dopt-1"
		tx.PutVPC(&v)
	})
	if s.View().DHCP("dopt-1") == nil {
		t.Fatal("a VPC names DHCP options that are not there")
	}
	writes := []write{{bucketMeta, keyFormat, 1}}
	for id := range s.View().RouteTables.All() {
		writes = append(writes, write{bucketRouteTable, string(id), nil})
	}
	for id := range s.View().ACLs.All() {
		writes = append(writes, write{bucketACL, string(id), nil})
	}
	writes = append(writes, write{bucketDHCP, "dopt-1", nil})
	if err := s.commit(writes); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, path, Options{})
	v := s.View()
	table, acl := v.TableOf(testSubnet), v.ACLOf(testSubnet)
	if table == nil || table.Main() == nil || acl == nil || !acl.Default || len(acl.Entries) != 2 || len(acl.Associations) != 1 {
		t.Fatalf("completed with %+v and %+v", table, acl)
	}
	if o := v.DHCP("dopt-1"); o == nil || !o.Default {
		t.Errorf("DHCP options %+v", o)
	}
	// It is on file: the identifiers stay.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(objects(v), objects(open(t, path, Options{}).View()), addrs, prefixes); d != "" {
		t.Errorf("opened again (-first +second):\n%s", d)
	}
}

func TestDefaultsGoWithTheirVPC(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "state.db"), Options{})
	update(t, s, network)
	if v := s.View(); v.MainTable(testVPC) == nil || v.ACLOf(testSubnet) != v.DefaultACL(testVPC) || len(v.RoutesOf(v.TableOf(testSubnet))) != 1 {
		t.Errorf("%+v", objects(v))
	}
	own := &RouteTable{ID: "rtb-1", VPC: testVPC, Associations: []RouteAssociation{{ID: "rtbassoc-1", Subnet: testSubnet}}}
	update(t, s, func(tx *Tx) { tx.PutRouteTable(own) })
	if s.View().TableOf(testSubnet).ID != "rtb-1" {
		t.Error("the subnet's own table does not count")
	}
	second := &RouteTable{ID: "rtb-2", VPC: testVPC, Associations: own.Associations}
	if err := s.Update(func(tx *Tx) error { tx.PutRouteTable(second); return nil }); !errors.Is(err, ErrConflict) {
		t.Errorf("a second table of a subnet: %v", err)
	}
	update(t, s, func(tx *Tx) { tx.DeleteSubnet(testSubnet) })
	if v := s.View(); len(v.RouteTable("rtb-1").Associations) != 0 || len(v.DefaultACL(testVPC).Associations) != 0 {
		t.Error("a subnet that is gone has associations")
	}
	update(t, s, func(tx *Tx) { tx.DeleteRouteTable("rtb-1"); tx.DeleteVPC(testVPC) })
	if v := s.View(); v.RouteTables.Len()+v.ACLs.Len() != 0 || v.mainTables.Len()+v.explicitTables.Len()+v.defaultACLs.Len()+v.subnetACLs.Len() != 0 {
		t.Errorf("left behind: %+v", objects(v))
	}
}

func TestElasticAddressesLeaveWithThePrivate(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "state.db"), Options{})
	second, third := netip.MustParseAddr("10.0.0.20"), netip.MustParseAddr("10.0.0.21")
	update(t, s, func(tx *Tx) {
		network(tx)
		e := eni(9)
		e.Secondary = []netip.Addr{second, third}
		tx.PutENI(e)
		for i, private := range []netip.Addr{e.Primary, second, third} {
			tx.PutAddress(&Address{ID: vpc.AllocationID(fmt.Sprintf("eipalloc-%d", i)), Public: netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}),
				Association: "eipassoc", ENI: e.ID, Private: private})
		}
	})
	if a := s.View().ElasticOf(eni(9).ID, second); a == nil || a.ID != "eipalloc-1" || s.View().ByPublic(a.Public) != a {
		t.Errorf("%s leads to %+v", second, a)
	}
	if err := s.Update(func(tx *Tx) error {
		tx.PutAddress(&Address{ID: "eipalloc-9", Public: netip.MustParseAddr("203.0.113.9"), ENI: eni(9).ID, Private: second})
		return nil
	}); !errors.Is(err, ErrConflict) {
		t.Errorf("two addresses for one: %v", err)
	}
	update(t, s, func(tx *Tx) {
		e := *tx.ENI(eni(9).ID)
		e.Secondary = []netip.Addr{third}
		tx.PutENI(&e)
	})
	if a := s.View().Address("eipalloc-1"); a.ENI != "" || a.Association != "" || s.View().ElasticOf(eni(9).ID, second) != nil {
		t.Errorf("still associated: %+v", a)
	}
	update(t, s, func(tx *Tx) { tx.DeleteENI(eni(9).ID) })
	for _, a := range s.View().Addresses.All() {
		if a.ENI != "" {
			t.Errorf("still associated: %+v", a)
		}
	}
	if n := s.View().elastics.Len(); n != 0 {
		t.Errorf("%d in the index", n)
	}
}

// A route is a black hole as soon as what it leads to does not carry packets.
func TestRouteState(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "state.db"), Options{})
	table := func() *RouteTable { return s.View().MainTable(testVPC) }
	want := func(what string, to Target, want string) {
		t.Helper()
		if got := s.View().RouteState(table(), Route{Target: to}); got != want {
			t.Errorf("%s: %s, want %s", what, got, want)
		}
	}
	e := eni(9)
	e.Attachment = &Attachment{ID: "eni-attach-1", Instance: "i-1", Status: Attached}
	update(t, s, func(tx *Tx) {
		network(tx)
		tx.PutGateway(&InternetGateway{ID: "igw-1", VPC: testVPC})
		tx.PutENI(e)
		tx.PutENI(eni(10))
		tx.PutInstance(&Instance{ID: "i-1", State: Running})
		tx.PutNAT(&NATGateway{ID: "nat-1", VPC: testVPC, State: NATPending})
		tx.PutPeering(&Peering{ID: "pcx-1", Requester: PeeringSide{VPC: testVPC}, Accepter: PeeringSide{VPC: "vpc-2"}, Status: PeeringPending})
	})
	want("local", Target{Local: true}, RouteActive)
	want("gateway", Target{Gateway: "igw-1"}, RouteActive)
	want("no gateway", Target{Gateway: "igw-2"}, RouteBlackhole)
	want("NAT", Target{NAT: "nat-1"}, RouteActive)
	want("running", Target{ENI: e.ID}, RouteActive)
	want("unattached", Target{ENI: eni(10).ID}, RouteBlackhole)
	want("pending", Target{Peering: "pcx-1"}, RouteBlackhole)
	update(t, s, func(tx *Tx) {
		tx.PutGateway(&InternetGateway{ID: "igw-1"})
		tx.PutInstance(&Instance{ID: "i-1", State: Stopping})
		tx.PutNAT(&NATGateway{ID: "nat-1", VPC: testVPC, State: NATDeleting})
		tx.PutPeering(&Peering{ID: "pcx-1", Requester: PeeringSide{VPC: testVPC}, Accepter: PeeringSide{VPC: "vpc-2"}, Status: PeeringActive})
	})
	want("detached", Target{Gateway: "igw-1"}, RouteBlackhole)
	want("stopped", Target{ENI: e.ID}, RouteBlackhole)
	want("NAT deleted", Target{NAT: "nat-1"}, RouteBlackhole)
	want("active", Target{Peering: "pcx-1"}, RouteActive)
	if p := s.View().PeeringBetween("vpc-2", testVPC); p == nil || p.ID != "pcx-1" {
		t.Errorf("peering %+v", p)
	}
}

func TestSecondOpenIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	open(t, path, Options{})
	if _, err := Open(path, Options{}); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("Open = %v", err)
	}
}

func TestNewerFormatIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	s := open(t, path, Options{})
	if err := s.commit([]write{{bucketMeta, keyFormat, format + 1}}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path, Options{}); err == nil || !strings.Contains(err.Error(), "format") {
		t.Errorf("Open = %v", err)
	}
}

func TestSpace(t *testing.T) {
	for _, c := range []struct {
		cidr        string
		free        int
		first       string
		blocks      int
		firstBlock  string
		blockTooFew bool
	}{
		{"10.0.0.0/28", 11, "10.0.0.4", 0, "", true},
		{"10.0.0.0/24", 251, "10.0.0.4", 14, "10.0.0.16/28", false},
		{"10.0.0.16/28", 11, "10.0.0.20", 0, "", true},
		{"10.1.0.0/16", 65531, "10.1.0.4", 4094, "10.1.0.16/28", false},
	} {
		s := newSpace(netip.MustParsePrefix(c.cidr))
		if s.Free() != c.free {
			t.Errorf("%s: %d free, want %d", c.cidr, s.Free(), c.free)
		}
		if a := slices.Collect(s.FreeAddrs(0)); len(a) != c.free || a[0].String() != c.first {
			t.Errorf("%s: %d addresses, want %d from %s", c.cidr, len(a), c.free, c.first)
		}
		b := slices.Collect(s.FreeBlocks(0))
		if len(b) != c.blocks || len(b) > 0 && b[0].String() != c.firstBlock {
			t.Errorf("%s: %d blocks, want %d from %s", c.cidr, len(b), c.blocks, c.firstBlock)
		}
	}
}

// TestKilledWriterLosesNothing kills a process in the middle of a stream of
// updates, each acknowledged on its standard output, and looks for all of them.
func TestKilledWriterLosesNothing(t *testing.T) {
	if path := os.Getenv("STORE_TEST_WRITER"); path != "" {
		writeUntilKilled(t, path)
		return
	}
	for round, kill := range []int{1, 137, 400} {
		path := filepath.Join(t.TempDir(), "state.db")
		cmd := exec.Command(os.Args[0], "-test.run=^TestKilledWriterLosesNothing$")
		cmd.Env = append(os.Environ(), "STORE_TEST_WRITER="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		last := ""
		sc := bufio.NewScanner(out)
		for n := 0; sc.Scan(); n++ {
			if id, ok := strings.CutPrefix(sc.Text(), "ack "); ok {
				last = id
			}
			if n == kill {
				if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := cmd.Wait(); err == nil {
			t.Fatal("the writer ended by itself")
		}
		s := open(t, path, Options{})
		var acked int
		if _, err := fmt.Sscan(last, &acked); err != nil || acked < kill-1 {
			t.Fatalf("last acknowledged %q", last)
		}
		state := s.View()
		for i := range acked + 1 {
			id := fmt.Sprintf("vpc-%017x", i)
			if state.VPC(vpc.VPCID(id)) == nil || state.TagsOf(id)["n"] != fmt.Sprint(i) {
				t.Fatalf("round %d: update %d of %d acknowledged is lost", round, i, acked)
			}
		}
		if v, tags := state.VPCs.Len(), state.Tags.Len(); v != tags || v > acked+2 {
			t.Errorf("round %d: %d VPCs, %d tagged, %d acknowledged: half an update", round, v, tags, acked+1)
		}
		update(t, s, network) // the file can still be written to
	}
}

func writeUntilKilled(t *testing.T, path string) {
	s := open(t, path, Options{})
	for i := 0; ; i++ {
		update(t, s, func(tx *Tx) {
			id := fmt.Sprintf("vpc-%017x", i)
			tx.PutVPC(&VPC{ID: vpc.VPCID(id), VNI: tx.NewVNI()})
			tx.SetTags(id, map[string]string{"n": fmt.Sprint(i)})
		})
		if _, err := fmt.Printf("ack %d\n", i); err != nil {
			t.Fatal(err)
		}
	}
}

// BenchmarkUpdateAmongMany measures one assignment among 20,000 interfaces.
func BenchmarkUpdateAmongMany(b *testing.B) {
	s, err := Open(filepath.Join(b.TempDir(), "state.db"), Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = s.Close() })
	const n = 20000
	if err := s.Update(func(tx *Tx) error {
		tx.PutSubnet(&Subnet{ID: testSubnet, CIDR: netip.MustParsePrefix("10.0.0.0/16")})
		for i := range n {
			e := eni(i)
			e.Primary = netip.AddrFrom4([4]byte{10, 0, byte((i + 4) >> 8), byte(i + 4)})
			tx.PutENI(e)
		}
		return nil
	}); err != nil {
		b.Fatal(err)
	}
	i := 0
	for b.Loop() {
		i++
		if err := s.Update(func(tx *Tx) error {
			e := *tx.ENI(eni(i % n).ID)
			e.Secondary = slices.Clone(e.Secondary)
			for a := range tx.Space(testSubnet).FreeAddrs(0) {
				e.Secondary = append(e.Secondary, a)
				break
			}
			if len(e.Secondary) > 2 {
				e.Secondary = e.Secondary[1:]
			}
			tx.PutENI(&e)
			return nil
		}); err != nil {
			b.Fatal(err)
		}
	}
}
