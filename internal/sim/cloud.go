package sim

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// code is how EC2 answers a call.
type code uint8

const (
	ok code = iota
	throttled
	subnetFull // InsufficientFreeAddressesInSubnet
	noPrefix   // InsufficientCidrBlocks
	eniFull    // PrivateIpAddressLimitExceeded
	slotsFull  // AttachmentLimitExceeded
	notFound   // InvalidNetworkInterfaceID.NotFound
	inUse      // InvalidNetworkInterface.InUse
)

func (c code) String() string {
	return [...]string{"ok", "RequestLimitExceeded", "InsufficientFreeAddressesInSubnet", "InsufficientCidrBlocks", "PrivateIpAddressLimitExceeded",
		"AttachmentLimitExceeded", "InvalidNetworkInterfaceID.NotFound", "InvalidNetworkInterface.InUse"}[c]
}

// cloud is EC2: subnets, interfaces and instances, behind the account's token
// buckets and the latency of its API.
type cloud struct {
	cfg  *Config
	clk  *clock
	rng  *rand.Rand
	acct *account

	subnets []*subnet
	enis    map[vpc.ENIID]*iface // looked up, never ranged over
	loose   []*iface             // attached nowhere, in order of creation
	seq     int

	held     int // addresses that interfaces take from the subnets
	prefixes int // how many of them came as /28s, in prefixes

	heldPeak, eniPeak, nauPeak int // of the scenario
}

// iface is one interface as EC2 keeps it. Attached means that EC2 said so; the
// device and what IMDS tells of it come later.
type iface struct {
	id       vpc.ENIID
	subnet   *subnet
	host     *host // made for it
	primary  netip.Addr
	mac      string
	attached bool
	device   int
	attach   vpc.AttachmentID
	dot      bool // goes with the instance
	created  time.Duration
	changed  time.Duration // attached or detached last
	deviceAt time.Duration // the device is there
	gone     bool
	grants   []grant // what it holds
	past     []grant // what it held a short while ago: a late read shows it
}

// grant is what one call assigned.
type grant struct {
	at, until time.Duration // assigned; given back, if in past
	lag       time.Duration // from assignment (or attachment) until IMDS lists it
	addrs     []netip.Addr
	prefixes  []netip.Prefix
}

func (e *iface) slots() int {
	n := 1
	for i := range e.grants {
		n += len(e.grants[i].addrs) + len(e.grants[i].prefixes)
	}
	return n
}

// spread returns d, longer or shorter by the configured jitter.
func (c *cloud) spread(d time.Duration) time.Duration {
	j := time.Duration(float64(d) * c.cfg.Jitter)
	if j <= 0 {
		return d
	}
	return d - j + time.Duration(c.rng.Int64N(int64(2*j)+1))
}

// call sends a request. It arrives after half its latency; there it takes a
// token and takes effect. The answer comes after the other half.
func (c *cloud) call(a action, apply func() code, done func(code)) {
	half := c.spread(c.cfg.Call) / 2
	c.clk.after(half, func() {
		res := throttled
		if c.acct.take(a, c.clk.now) {
			res = apply()
		}
		c.clk.after(half, func() { done(res) })
	})
}

func (c *cloud) newID(prefix string) string {
	c.seq++
	return fmt.Sprintf("%s-%017x", prefix, c.seq)
}

// make makes an interface for h.
func (c *cloud) make(h *host) (*iface, code) {
	primary, there := h.subnet.take()
	if !there {
		return nil, subnetFull
	}
	e := &iface{id: vpc.ENIID(c.newID("eni")), subnet: h.subnet, host: h, primary: primary, created: c.clk.now, changed: c.clk.now}
	e.mac = fmt.Sprintf("02:00:%02x:%02x:%02x:%02x", byte(c.seq>>24), byte(c.seq>>16), byte(c.seq>>8), byte(c.seq))
	c.enis[e.id] = e
	c.held++
	c.grew()
	return e, ok
}

// launch makes the instance's own interface: EC2 does that, at no call of ours.
func (c *cloud) launch(h *host) code {
	e, res := c.make(h)
	if res != ok {
		return res
	}
	e.attached, e.dot, e.attach, e.deviceAt = true, true, vpc.AttachmentID("eni-attach-"+string(e.id)[4:]), c.clk.now
	h.enis = append(h.enis, e)
	return ok
}

// create makes an interface with n secondary addresses or prefixes.
func (c *cloud) create(h *host, n int, prefixes bool) (*iface, code) {
	if !prefixes && h.subnet.free < n+1 {
		return nil, subnetFull
	}
	e, res := c.make(h)
	if res != ok {
		return nil, res
	}
	if n > 0 {
		if prefixes {
			_, res = c.assignPrefixes(e, n)
		} else {
			_, res = c.assign(e, n)
		}
	}
	if res != ok {
		c.drop(e)
		return nil, res
	}
	h.enis = append(h.enis, e)
	c.loose = append(c.loose, e)
	return e, ok
}

// assign adds n secondary addresses, all or none.
func (c *cloud) assign(e *iface, n int) ([]netip.Addr, code) {
	switch {
	case e.gone:
		return nil, notFound
	case e.slots()+n > c.cfg.limits.IPv4PerENI:
		return nil, eniFull
	case e.subnet.free < n:
		return nil, subnetFull
	}
	g := grant{at: c.clk.now, lag: c.spread(c.cfg.IMDSLag), addrs: make([]netip.Addr, n)}
	for i := range g.addrs {
		g.addrs[i], _ = e.subnet.take()
	}
	e.grants = append(e.grants, g)
	c.held += n
	c.grew()
	return g.addrs, ok
}

// assignPrefixes adds up to n prefixes, as many as the subnet has.
func (c *cloud) assignPrefixes(e *iface, n int) ([]netip.Prefix, code) {
	switch {
	case e.gone:
		return nil, notFound
	case e.slots()+n > c.cfg.limits.IPv4PerENI:
		return nil, eniFull
	}
	g := grant{at: c.clk.now, lag: c.spread(c.cfg.IMDSLag)}
	for range n {
		p, there := e.subnet.takePrefix()
		if !there {
			break
		}
		g.prefixes = append(g.prefixes, p)
	}
	if len(g.prefixes) == 0 {
		return nil, noPrefix
	}
	e.grants = append(e.grants, g)
	c.held += len(g.prefixes) * prefixSize
	c.prefixes += len(g.prefixes)
	c.grew()
	return g.prefixes, ok
}

// unassign gives addresses and prefixes of an interface back.
func (c *cloud) unassign(e *iface, addrs []netip.Addr, prefixes []netip.Prefix) code {
	if e.gone {
		return notFound
	}
	now := c.clk.now
	e.past = slices.DeleteFunc(e.past, func(g grant) bool { return now-g.until > c.cfg.ReadLag })
	kept := e.grants[:0]
	for _, g := range e.grants {
		gone := grant{at: g.at, until: now}
		g.addrs = slices.DeleteFunc(slices.Clone(g.addrs), func(a netip.Addr) bool {
			if !slices.Contains(addrs, a) {
				return false
			}
			gone.addrs = append(gone.addrs, a)
			e.subnet.release(a)
			c.held--
			return true
		})
		g.prefixes = slices.DeleteFunc(slices.Clone(g.prefixes), func(p netip.Prefix) bool {
			if !slices.Contains(prefixes, p) {
				return false
			}
			gone.prefixes = append(gone.prefixes, p)
			e.subnet.releasePrefix(p)
			c.held -= prefixSize
			c.prefixes--
			return true
		})
		if len(gone.addrs)+len(gone.prefixes) > 0 {
			e.past = append(e.past, gone)
		}
		if len(g.addrs)+len(g.prefixes) > 0 {
			kept = append(kept, g)
		}
	}
	e.grants = kept
	return ok
}

// attach attaches an interface. EC2 answers at once; the device comes later.
func (c *cloud) attach(e *iface, device int) code {
	switch {
	case e.gone:
		return notFound
	case e.attached || !e.host.alive:
		return inUse
	}
	n := 0
	for _, o := range e.host.enis {
		if o.attached {
			n++
			if o.device == device {
				return inUse
			}
		}
	}
	if n >= c.cfg.maxENIs() {
		return slotsFull
	}
	e.attached, e.device, e.changed = true, device, c.clk.now
	e.attach = vpc.AttachmentID("eni-attach-" + string(e.id)[4:])
	e.deviceAt = c.clk.now + c.spread(c.cfg.Attach)
	c.loose = slices.DeleteFunc(c.loose, func(o *iface) bool { return o == e })
	return ok
}

func (c *cloud) setDeleteOnTermination(e *iface) code {
	if e.gone || !e.attached {
		return notFound
	}
	e.dot = true
	return ok
}

// detach begins to detach an interface, which takes as long as to attach it.
func (c *cloud) detach(e *iface) code {
	if e.gone || !e.attached || e.device == 0 {
		return notFound
	}
	e.attached, e.dot, e.changed = false, false, c.clk.now
	e.deviceAt = c.clk.now + c.spread(c.cfg.Attach) // and may be deleted from then on
	c.loose = append(c.loose, e)
	return ok
}

// available reports whether an interface is attached nowhere, not even on its
// way off an instance.
func (c *cloud) available(e *iface) bool { return !e.gone && !e.attached && c.clk.now >= e.deviceAt }

func (c *cloud) delete(e *iface) code {
	switch {
	case e.gone:
		return notFound
	case !c.available(e):
		return inUse
	}
	c.loose = slices.DeleteFunc(c.loose, func(o *iface) bool { return o == e })
	c.drop(e)
	return ok
}

// drop ends an interface and frees what it held.
func (c *cloud) drop(e *iface) {
	for i := range e.grants {
		g := &e.grants[i]
		for _, a := range g.addrs {
			e.subnet.release(a)
		}
		for _, p := range g.prefixes {
			e.subnet.releasePrefix(p)
		}
		c.held -= len(g.addrs) + prefixSize*len(g.prefixes)
		c.prefixes -= len(g.prefixes)
	}
	e.subnet.release(e.primary)
	c.held--
	e.grants, e.gone = nil, true
	delete(c.enis, e.id)
	e.host.enis = slices.DeleteFunc(e.host.enis, func(o *iface) bool { return o == e })
}

// terminated ends an instance: its interfaces go with it, except for those
// that were not told to.
func (c *cloud) terminated(h *host) {
	for _, e := range slices.Clone(h.enis) {
		switch {
		case e.attached && e.dot:
			c.drop(e)
		case e.attached:
			e.attached, e.changed, e.deviceAt = false, c.clk.now, c.clk.now
			c.loose = append(c.loose, e)
		}
	}
}

// describe returns the interfaces of an instance as a read shows them: without
// the changes of the last moments, how many differs from read to read.
func (c *cloud) describe(h *host) []vpc.ENI {
	asOf := c.clk.now
	if c.cfg.ReadLag > 0 {
		asOf -= time.Duration(c.rng.Int64N(int64(c.cfg.ReadLag) + 1))
	}
	out := make([]vpc.ENI, 0, len(h.enis))
	for _, e := range h.enis {
		own := e.attached && e.device == 0
		if e.created > asOf && !own {
			continue
		}
		v := vpc.ENI{ID: e.id, Subnet: e.subnet.id, MAC: e.mac, Primary: e.primary, Groups: nodeGroups, Tags: h.tags}
		if e.attached && e.changed <= asOf || !e.attached && e.changed > asOf && e.attach != "" || own {
			v.Instance, v.Attachment, v.DeviceIndex, v.Attached, v.DeleteOnTermination = h.id, e.attach, e.device, true, e.dot
		}
		for i := range e.grants {
			if g := &e.grants[i]; g.at <= asOf {
				v.Secondary, v.Prefixes = append(v.Secondary, g.addrs...), append(v.Prefixes, g.prefixes...)
			}
		}
		for i := range e.past {
			if g := &e.past[i]; g.at <= asOf && g.until > asOf {
				v.Secondary, v.Prefixes = append(v.Secondary, g.addrs...), append(v.Prefixes, g.prefixes...)
			}
		}
		out = append(out, v)
	}
	return out
}

var nodeGroups = []vpc.SecurityGroupID{"sg-node"}

// listed reports whether IMDS lists a grant: some time after it was made, and
// after the device came.
func (c *cloud) listed(e *iface, g *grant) bool {
	return e.attached && max(g.at, e.deviceAt)+g.lag <= c.clk.now
}
