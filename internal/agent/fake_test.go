package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/underlay-cni/underlay/internal/datapath"
	"github.com/underlay-cni/underlay/internal/ec2"
	"github.com/underlay-cni/underlay/internal/imds"
	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/policy"
	"github.com/underlay-cni/underlay/internal/vpc"
)

const (
	testInstance = vpc.InstanceID("i-0123456789abcdef0")
	testSubnet   = vpc.SubnetID("subnet-0123456789abcdef0")
)

var testCIDR = netip.MustParsePrefix("10.0.0.0/20")

// fakeCloud is EC2 and IMDS: it holds state, takes its time, and fails when
// told to.
type fakeCloud struct {
	mu                   sync.Mutex
	typ                  string
	enis                 map[vpc.ENIID]*vpc.ENI
	tokens               map[string]vpc.ENIID
	used                 map[netip.Addr]time.Time
	since                map[vpc.ENIID]time.Time // of the attachment
	seq                  int
	writes               []string
	asked                int                     // for groups
	fail                 func(call string) error // nil: go on
	noIMDS               error
	groups               []vpc.SecurityGroup
	rules                []vpc.SecurityGroupRule
	lists                map[vpc.PrefixListID][]netip.Prefix
	members              map[vpc.SecurityGroupID][]netip.Prefix // outside of the node
	ruleReads, listReads int
	cidrs                []netip.Prefix // of the VPC
	peers                []netip.Prefix // of peered VPCs
	noPeers              error

	latency, attach, lag time.Duration
}

func newCloud(typ string) *fakeCloud {
	c := &fakeCloud{typ: typ, enis: map[vpc.ENIID]*vpc.ENI{}, tokens: map[string]vpc.ENIID{}, used: map[netip.Addr]time.Time{}, since: map[vpc.ENIID]time.Time{},
		latency: 50 * time.Millisecond, attach: time.Second, lag: 500 * time.Millisecond}
	e := c.make()
	e.Instance, e.Attachment, e.Attached = testInstance, "eni-attach-00000000000000001", true
	c.since[e.ID] = time.Time{}
	return c
}

func (c *fakeCloud) make() *vpc.ENI {
	c.seq++
	e := &vpc.ENI{ID: vpc.ENIID(fmt.Sprintf("eni-%017x", c.seq)), Subnet: testSubnet, MAC: fmt.Sprintf("02:00:00:00:00:%02x", c.seq),
		Groups: []vpc.SecurityGroupID{"sg-0123456789abcdef0"}, Tags: map[string]string{}, Primary: c.take()}
	c.enis[e.ID] = e
	return e
}

func (c *fakeCloud) take() netip.Addr {
	for a := testCIDR.Addr().Next().Next().Next().Next(); ; a = a.Next() {
		if _, ok := c.used[a]; !ok {
			c.used[a] = time.Now()
			return a
		}
	}
}

func apiError(code string) error { return ec2.NewError(code, "told to fail") }

// call takes its time, then runs fn under the lock.
func (c *fakeCloud) call(ctx context.Context, name string, write bool, fn func() error) error {
	t := time.NewTimer(c.latency)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if write {
		c.writes = append(c.writes, name)
	}
	if c.fail != nil {
		if err := c.fail(name); err != nil {
			return err
		}
	}
	return fn()
}

func (c *fakeCloud) setFail(fn func(string) error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fail = fn
}

func (c *fakeCloud) written() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.writes)
}

func copyENI(e *vpc.ENI) vpc.ENI {
	o := *e
	o.Secondary, o.Prefixes = slices.Clone(e.Secondary), slices.Clone(e.Prefixes)
	return o
}

func (c *fakeCloud) Interfaces(ctx context.Context, instance vpc.InstanceID, tag string) (out []vpc.ENI, err error) {
	err = c.call(ctx, "describe", false, func() error {
		for _, e := range c.enis {
			if e.Instance == instance || e.Tags[tag] == string(instance) {
				out = append(out, copyENI(e))
			}
		}
		return nil
	})
	return out, err
}

func (c *fakeCloud) Subnet(ctx context.Context, id vpc.SubnetID) (vpc.Subnet, error) {
	return vpc.Subnet{ID: id, CIDR: testCIDR}, nil
}

func (c *fakeCloud) SecurityGroups(ctx context.Context, in vpc.VPCID, ids []vpc.SecurityGroupID, names []string) (out []vpc.SecurityGroup, err error) {
	err = c.call(ctx, "describe-groups", false, func() error {
		c.asked++
		for _, g := range c.groups {
			if slices.Contains(ids, g.ID) || g.VPC == in && slices.Contains(names, g.Name) {
				out = append(out, g)
			}
		}
		return nil
	})
	return out, err
}

func (c *fakeCloud) SecurityGroupRules(ctx context.Context, ids []vpc.SecurityGroupID) (out []vpc.SecurityGroupRule, err error) {
	err = c.call(ctx, "describe-rules", false, func() error {
		c.ruleReads++
		for _, r := range c.rules {
			if slices.Contains(ids, r.Group) {
				out = append(out, r)
			}
		}
		return nil
	})
	return out, err
}

func (c *fakeCloud) PrefixListVersions(ctx context.Context, ids []vpc.PrefixListID) (map[vpc.PrefixListID]int64, error) {
	out := map[vpc.PrefixListID]int64{}
	err := c.call(ctx, "prefix-lists", false, func() error {
		for _, id := range ids {
			if l, ok := c.lists[id]; ok {
				out[id] = int64(len(l))
			}
		}
		return nil
	})
	return out, err
}

func (c *fakeCloud) PrefixListEntries(ctx context.Context, id vpc.PrefixListID) (out []netip.Prefix, err error) {
	err = c.call(ctx, "prefix-list-entries", false, func() error {
		c.listReads++
		out = slices.Clone(c.lists[id])
		return nil
	})
	return out, err
}

func (c *fakeCloud) Members(ctx context.Context, ids []vpc.SecurityGroupID) (map[vpc.SecurityGroupID][]netip.Prefix, error) {
	out := map[vpc.SecurityGroupID][]netip.Prefix{}
	err := c.call(ctx, "describe-members", false, func() error {
		for _, id := range ids {
			out[id] = slices.Clone(c.members[id])
		}
		return nil
	})
	return out, err
}

func (c *fakeCloud) Limits(ctx context.Context, t string) (vpc.InstanceLimits, error) {
	l, _ := vpc.LimitsOf(t)
	return l, nil
}

func (c *fakeCloud) AssignAddresses(ctx context.Context, id vpc.ENIID, n int) (out []netip.Addr, err error) {
	err = c.call(ctx, "assign", true, func() error {
		e := c.enis[id]
		if e == nil {
			return apiError("InvalidNetworkInterfaceID.NotFound")
		}
		l, _ := vpc.LimitsOf(c.typ)
		if 1+len(e.Secondary)+len(e.Prefixes)+n > l.IPv4PerENI {
			return apiError("PrivateIpAddressLimitExceeded")
		}
		for range n {
			out = append(out, c.take())
		}
		e.Secondary = append(e.Secondary, out...)
		return nil
	})
	return out, err
}

func (c *fakeCloud) AssignPrefixes(context.Context, vpc.ENIID, int) ([]netip.Prefix, error) {
	return nil, apiError("InsufficientCidrBlocks")
}

func (c *fakeCloud) Unassign(ctx context.Context, id vpc.ENIID, addrs []netip.Addr, prefixes []netip.Prefix) error {
	return c.call(ctx, "unassign", true, func() error {
		e := c.enis[id]
		for _, a := range addrs {
			e.Secondary = slices.DeleteFunc(e.Secondary, func(b netip.Addr) bool { return a == b })
			delete(c.used, a)
		}
		e.Prefixes = slices.DeleteFunc(e.Prefixes, func(p netip.Prefix) bool { return slices.Contains(prefixes, p) })
		return nil
	})
}

func (c *fakeCloud) CreateInterface(ctx context.Context, n ec2.NewInterface) (out vpc.ENI, err error) {
	err = c.call(ctx, "create", true, func() error {
		if id, ok := c.tokens[n.Token]; ok {
			out = copyENI(c.enis[id])
			return nil
		}
		e := c.make()
		c.tokens[n.Token] = e.ID
		e.Tags, e.Groups = n.Tags, n.Groups
		for range n.Addresses {
			e.Secondary = append(e.Secondary, c.take())
		}
		out = copyENI(e)
		return nil
	})
	return out, err
}

func (c *fakeCloud) AttachInterface(ctx context.Context, id vpc.ENIID, instance vpc.InstanceID, device int) (att vpc.AttachmentID, err error) {
	err = c.call(ctx, "attach", true, func() error {
		e := c.enis[id]
		if e == nil {
			return apiError("InvalidNetworkInterfaceID.NotFound")
		}
		e.Instance, e.DeviceIndex, e.Attachment, e.Attached = instance, device, vpc.AttachmentID("eni-attach-"+string(id)[4:]), true
		c.since[id] = time.Now().Add(c.attach)
		att = e.Attachment
		return nil
	})
	return att, err
}

func (c *fakeCloud) SetDeleteOnTermination(ctx context.Context, id vpc.ENIID, _ vpc.AttachmentID) error {
	return c.call(ctx, "set-delete-on-termination", true, func() error { c.enis[id].DeleteOnTermination = true; return nil })
}

func (c *fakeCloud) DeleteInterface(ctx context.Context, id vpc.ENIID, _ vpc.AttachmentID) error {
	return c.call(ctx, "delete", true, func() error {
		if e := c.enis[id]; e != nil {
			delete(c.used, e.Primary)
			for _, a := range e.Secondary {
				delete(c.used, a)
			}
			delete(c.enis, id)
		}
		return nil
	})
}

func (c *fakeCloud) Detached(ctx context.Context, tag, value string) (out []vpc.ENI, err error) {
	err = c.call(ctx, "describe-detached", false, func() error {
		for _, e := range c.enis {
			if e.Instance == "" && e.Tags[tag] == value {
				out = append(out, copyENI(e))
			}
		}
		return nil
	})
	return out, err
}

func (c *fakeCloud) Alive(ctx context.Context, ids []vpc.InstanceID) (map[vpc.InstanceID]bool, error) {
	alive := map[vpc.InstanceID]bool{}
	err := c.call(ctx, "describe-instances", false, func() error {
		for _, id := range ids {
			alive[id] = id == testInstance || id == "i-alive"
		}
		return nil
	})
	return alive, err
}

// fakeIMDS is the metadata side of a fakeCloud.
type fakeIMDS struct{ c *fakeCloud }

func (f fakeIMDS) Identity(context.Context) (imds.Identity, error) {
	f.c.mu.Lock()
	defer f.c.mu.Unlock()
	if f.c.noIMDS != nil {
		return imds.Identity{}, f.c.noIMDS
	}
	return imds.Identity{Instance: testInstance, Type: f.c.typ, AvailabilityZone: "us-east-1a", Region: "us-east-1", Subnet: testSubnet, SubnetCIDR: testCIDR,
		Addr: f.c.enis["eni-00000000000000001"].Primary, VPC: "vpc-0123456789abcdef0", VPCCIDRs: f.c.cidrs}, nil
}

func (c *fakeCloud) PeerCIDRs(context.Context, vpc.VPCID) ([]netip.Prefix, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.peers, c.noPeers
}

func (f fakeIMDS) VPCCIDRs(context.Context, string) ([]netip.Prefix, error) {
	f.c.mu.Lock()
	defer f.c.mu.Unlock()
	return f.c.cidrs, f.c.noIMDS
}

func (f fakeIMDS) Interfaces(context.Context) ([]imds.Interface, error) {
	f.c.mu.Lock()
	defer f.c.mu.Unlock()
	var out []imds.Interface
	for _, e := range f.c.enis {
		at, ok := f.c.since[e.ID]
		if !ok || time.Now().Before(at) {
			continue
		}
		i := imds.Interface{MAC: e.MAC, ID: e.ID, Device: e.DeviceIndex, Addresses: []netip.Addr{e.Primary}}
		for _, a := range e.Secondary {
			if time.Since(f.c.used[a]) >= f.c.lag {
				i.Addresses = append(i.Addresses, a)
			}
		}
		out = append(out, i)
	}
	return out, nil
}

// fakeDatapath is the kernel: its records outlive an agent.
type fakeDatapath struct {
	c       *fakeCloud
	mu      sync.Mutex
	records map[netip.Addr]datapath.Endpoint
	enis    []datapath.ENI
	addErr  error
	broken  map[string]error                               // by container: what Check says
	damage  chan struct{}                                  // told of, it is what Watch hears
	before  func(context.Context, datapath.Endpoint) error // nil: nobody
	index   int                                            // of the host's interface that was made last
	tables  map[int]policy.Tables                          // by that index
	puts    int                                            // calls of SetPolicy
	sets    int                                            // calls of SetENIs
	foreign []netip.Addr                                   // what others have configured
	vpc     []netip.Prefix
	peers   []netip.Prefix

	obstacle string
}

func newDatapath(c *fakeCloud) *fakeDatapath {
	return &fakeDatapath{c: c, records: map[netip.Addr]datapath.Endpoint{}, broken: map[string]error{}, damage: make(chan struct{}), tables: map[int]policy.Tables{}}
}

func (d *fakeDatapath) Status() (datapath.Status, error) {
	return datapath.Status{Hook: datapath.Clsact}, nil
}

func (d *fakeDatapath) SetVPC(_ context.Context, cidrs []netip.Prefix) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.vpc = slices.Clone(cidrs)
	return nil
}

func (d *fakeDatapath) SetPeers(_ context.Context, cidrs []netip.Prefix) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.peers = slices.Clone(cidrs)
	return nil
}

func (d *fakeDatapath) Obstacle() (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.obstacle, nil
}

func (d *fakeDatapath) Foreign() ([]netip.Addr, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.foreign, nil
}

func (d *fakeDatapath) Watch(ctx context.Context, changed func()) error {
	for {
		select {
		case <-d.damage:
			changed()
		case <-ctx.Done():
			return nil
		}
	}
}

func (d *fakeDatapath) SetENIs(_ context.Context, enis []datapath.ENI) error {
	d.c.mu.Lock()
	defer d.c.mu.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.enis = enis
	d.sets++
	var missing []vpc.ENIID
	for _, e := range enis {
		if at, ok := d.c.since[e.ID]; !ok || time.Now().Before(at) {
			missing = append(missing, e.ID)
		}
		if !e.Subnet.Contains(e.Primary) || e.Index < 1 {
			return fmt.Errorf("bad ENI %+v", e)
		}
	}
	if missing != nil {
		return errors.Join(&datapath.LinkMissingError{ENIs: missing})
	}
	return nil
}

func (d *fakeDatapath) SetPolicy(e datapath.Endpoint, t policy.Tables) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.puts++
	d.tables[e.HostIfIndex] = t
	return nil
}

func (d *fakeDatapath) Add(ctx context.Context, e datapath.Endpoint, f *os.File) (datapath.Endpoint, error) {
	d.mu.Lock()
	d.index++
	e.HostIfIndex = d.index
	before := d.before
	d.mu.Unlock()
	if before != nil {
		if err := before(ctx, e); err != nil {
			return e, err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.addErr != nil {
		return e, d.addErr
	}
	if old, ok := d.records[e.Addr]; ok {
		return e, &datapath.AddressInUseError{Endpoint: old}
	}
	for _, o := range d.records {
		if o.State == datapath.Live && o.ContainerID == e.ContainerID && o.IfName == e.IfName {
			return e, &datapath.ExistsError{Endpoint: o}
		}
	}
	e.State, e.Created, e.HostIfName, e.MTU = datapath.Live, time.Now(), "ul"+e.ContainerID, 9001
	e.MAC = net.HardwareAddr{2, 0, 1, 2, 3, 4}
	d.records[e.Addr] = e
	return e, nil
}

func (d *fakeDatapath) Delete(_ context.Context, containerID, ifName string) (datapath.Endpoint, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for a, e := range d.records {
		if e.ContainerID == containerID && e.IfName == ifName && e.State == datapath.Live {
			e.State, e.Released = datapath.Tombstone, time.Now()
			d.records[a] = e
			return e, nil
		}
	}
	return datapath.Endpoint{}, datapath.ErrNotFound
}

func (d *fakeDatapath) Forget(a netip.Addr) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.records[a].State == datapath.Live {
		return fmt.Errorf("forget %s: it is live", a)
	}
	delete(d.records, a)
	return nil
}

func (d *fakeDatapath) Check(_ context.Context, e datapath.Endpoint, _ *os.File) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.broken[e.ContainerID]
}

func (d *fakeDatapath) Endpoints() ([]datapath.Endpoint, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []datapath.Endpoint
	for _, e := range d.records {
		out = append(out, e)
	}
	return out, nil
}

func (d *fakeDatapath) Counters() (map[string]uint64, error) {
	return map[string]uint64{"source": 3}, nil
}

var (
	_ EC2      = (*fakeCloud)(nil)
	_ Metadata = fakeIMDS{}
	_ Datapath = (*fakeDatapath)(nil)
	_ Datapath = (*datapath.Datapath)(nil)
	_ EC2      = (*ec2.Client)(nil)
	_ Metadata = (*imds.Client)(nil)
	_          = ipam.Done
)
