package ipam

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/underlay-cni/underlay/internal/ipam/planted"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// Config is what does not change while an agent runs.
type Config struct {
	Instance vpc.InstanceID
	Cluster  string // ENIs tagged for it are ours
	Limits   vpc.InstanceLimits
	MaxENIs  int  // fewer than the type's limit; 0: the limit
	Prefixes bool // delegate /28 prefixes where possible

	Floor      int           // free addresses to keep ready in the default pool
	Minimum    int           // addresses to hold there in all, those in use included; 0: as many as Floor asks
	Cooldown   time.Duration // between release and the next use of an address
	UsableWait time.Duration // after which an address counts as live even if IMDS does not list it
	Linger     time.Duration // how long surplus is kept before it goes back
	SetLinger  time.Duration // how long the interface of a set of security groups is kept without a pod
	Settle     time.Duration // how long a backlog may grow before it costs a further ENI
	Reconcile  time.Duration // between reads of EC2 when all is quiet
	Confirm    time.Duration // between a read that lacks something and the one that confirms it
	ReadLag    time.Duration // how long after a call a read may still not show it
	Seed       uint64        // spreads the nodes' back-offs
}

// Default is the policy of a node unless it is told otherwise.
func Default() Config {
	return Config{
		Floor:      1,
		Cooldown:   30 * time.Second, // as long as kube-proxy's and others' stale views may last
		UsableWait: 10 * time.Second,
		Linger:     4 * time.Minute,       // with the cooldown before it, all is back within five
		SetLinger:  10 * time.Minute,      // longer than a deployment takes to replace a set's pods
		Settle:     50 * time.Millisecond, // an attachment takes seconds
		Reconcile:  10 * time.Minute,      // 2,000 nodes: 3.3 reads/s of the account's 20
		Confirm:    5 * time.Second,
		ReadLag:    30 * time.Second,
	}
}

// ENIs returns how many interfaces the node may have for pods, its own included:
// on network card 0, where the datapath has marks for them.
func (c *Config) ENIs() int {
	n := c.Limits.PodENIs()
	if m := c.MaxENIs; m > 0 && m < n {
		n = m
	}
	return min(n, maxDevice+1)
}

// PerSlot returns the addresses that one of an ENI's slots can hold: a whole
// prefix's where they are delegated, or one.
func (c *Config) PerSlot() int {
	if c.Prefixes && c.Limits.Nitro() {
		return PrefixAddresses
	}
	return 1
}

// Capacity returns how many addresses for pods the node can hold.
func (c *Config) Capacity() int { return c.ENIs() * max(0, c.Limits.IPv4PerENI-1) * c.PerSlot() }

// maxDevice is the highest device index in use: the datapath has marks 1..31
// and gives device d the mark d+1.
const maxDevice = 30

// PrefixAddresses is the number of addresses in a delegated prefix, all usable.
const PrefixAddresses = 1 << (32 - vpc.PrefixBits)

// AddressState is where an address stands in its life.
type AddressState uint8

// The states; see the package documentation.
const (
	Assigned AddressState = iota
	Free
	Bound
	Cooling
	Returning
)

func (s AddressState) String() string {
	return [...]string{"assigned", "free", "bound", "cooling", "returning"}[s]
}

// Address is one address of a pool. A primary address is never one.
type Address struct {
	Addr     netip.Addr
	Prefix   netip.Prefix // the delegated prefix it belongs to; zero for a single address
	State    AddressState
	Owner    string    // who asked, when Bound
	Since    time.Time // of State
	Until    time.Time // end of the cooldown, when Cooling
	Assigned time.Time // when EC2 said so; for the read lag
	Live     bool      // IMDS listed it
	Hearsay  bool      // a read alone tells of it, perhaps an old one: only IMDS makes it usable

	Missing  time.Time // start of the first EC2 read that did not list it; zero: listed
	Reported bool      // its loss was confirmed and reported

	Elastic bool // an Elastic IP leads to it
	Host    bool // the node itself or another CNI has configured it
}

// Foreign reports whether somebody other than a pod of ours uses the address,
// or is about to: it is neither handed out nor given back.
func (a *Address) Foreign() bool { return (a.Elastic || a.Host) && a.State != Bound }

// Phase is where an ENI stands.
type Phase uint8

// The phases: Detached before its attachment, Attached with it, Retiring on
// its way to deletion.
const (
	Detached Phase = iota
	Attached
	Retiring
)

func (p Phase) String() string { return [...]string{"detached", "attached", "retiring"}[p] }

// Pool names the ENIs that serve the same requests: those of one subnet that
// carry one set of security groups. The zero Pool is the node's own subnet and
// groups.
type Pool struct {
	Subnet vpc.SubnetID // "": that of the primary ENI
	Groups vpc.GroupSet // "": those of the primary ENI
}

func (p Pool) compare(q Pool) int {
	return cmp.Or(cmp.Compare(p.Subnet, q.Subnet), cmp.Compare(p.Groups, q.Groups))
}

// ENI is one interface of the node.
type ENI struct {
	ID         vpc.ENIID
	MAC        string
	Subnet     vpc.SubnetID
	Primary    netip.Addr
	Groups     vpc.GroupSet // what it carries
	Pool       Pool         // the pool it serves
	Managed    bool         // false: takes a device index, nothing more
	Device     int          // -1 when none is reserved yet
	Phase      Phase
	Attachment vpc.AttachmentID
	Idle       vpc.IdleTimeouts
	Keep       bool // EC2 would keep it when the instance ends (no DeleteOnTermination)
	Link       bool // the datapath has configured its link
	Since      time.Time
	Prefixes   []netip.Prefix
	Addrs      []*Address // sorted

	Call    CallID    // the mutation in flight, 0 when none
	Touched time.Time // end of the last mutation
	Unsure  bool      // a mutation ended unknown: read EC2 before the next
	Full    bool      // EC2 said so, whatever we count; until the next read
	Retry   backoff
	Missing time.Time // start of the first EC2 read that did not list it
	NoNeed  time.Time // since when nothing on it is used
}

// ready reports whether traffic can use the ENI.
func (e *ENI) ready() bool {
	return e.Managed && e.Phase == Attached && (e.Link || planted.Bug == planted.LinkIgnored) && (!e.Keep || planted.Bug == planted.KeepIgnored)
}

// slots returns how many of the type's addresses per ENI are taken.
func (e *ENI) slots() int {
	n := 1 + len(e.Prefixes)
	for _, a := range e.Addrs {
		if !a.Prefix.IsValid() {
			n++
		}
	}
	return n
}

// doubted returns how many of its slots e has by an older read alone: the last
// one did not list what is in them.
func (e *ENI) doubted() int {
	n := 0
	prefixes := map[netip.Prefix]bool{}
	for _, a := range e.Addrs {
		switch {
		case a.Missing.IsZero():
		case a.Prefix.IsValid():
			prefixes[a.Prefix] = true
		default:
			n++
		}
	}
	return n + len(prefixes)
}

func (e *ENI) count(s AddressState) int {
	n := 0
	for _, a := range e.Addrs {
		if a.State == s {
			n++
		}
	}
	return n
}

func (e *ENI) find(addr netip.Addr) *Address {
	i, ok := slices.BinarySearchFunc(e.Addrs, addr, func(a *Address, t netip.Addr) int { return a.Addr.Compare(t) })
	if !ok {
		return nil
	}
	return e.Addrs[i]
}

func (e *ENI) insert(a *Address) {
	i, ok := slices.BinarySearchFunc(e.Addrs, a.Addr, func(a *Address, t netip.Addr) int { return a.Addr.Compare(t) })
	if ok {
		return
	}
	e.Addrs = slices.Insert(e.Addrs, i, a)
}

// RequestID names a request that waits; the caller chooses it.
type RequestID uint64

// Request is an ADD that waits for an address.
type Request struct {
	ID       RequestID
	Owner    string
	Pool     Pool
	Since    time.Time
	Deadline time.Time
}

// CallID names a mutation in flight.
type CallID uint64

// CallKind is what a call does.
type CallKind uint8

// The kinds of calls.
const (
	CallAssign CallKind = iota
	CallUnassign
	CallCreate
	CallAttach
	CallKeep
	CallDelete
	callKinds = 6
)

func (k CallKind) String() string {
	return [...]string{"assign", "unassign", "create", "attach", "set-delete-on-termination", "delete"}[k]
}

// Call is a mutation in flight, or one whose end is not known.
type Call struct {
	ID     CallID
	Kind   CallKind
	ENI    vpc.ENIID // "" for CallCreate
	Pool   Pool
	Subnet vpc.SubnetID
	Groups vpc.GroupSet
	Device int
	N      int  // addresses on their way
	Prefix bool // N came as prefixes
	Token  string
	Began  time.Time
	Retry  bool // CallCreate ended unknown: repeat it, same token, when the back-off is over
}

// State is everything the plan rests on. Its fields are for reading; Step
// alone changes them.
type State struct {
	Config  Config
	Now     time.Time // of the last event
	Started bool
	Known   bool      // EC2 was read at least once
	ENIs    []*ENI    // by device index, those without one last
	Waiting []Request // in order of arrival
	Calls   map[CallID]*Call
	NextID  CallID

	// Lost are bound addresses whose ENI EC2 never listed to this agent.
	Lost []*Address

	Reads   [sources]read
	Mutate  backoff                       // after denial and unknown ends
	Pace    [callKinds]pace               // after throttling
	Subnets map[vpc.SubnetID]*subnetState // trouble with subnets
	Trouble map[Pool]*Error               // why a pool does not grow, until it does
	Gone    map[netip.Addr]time.Time      // given back by us: a stale read may still show them
	GoneENI map[vpc.ENIID]time.Time

	home     vpc.SubnetID       // that of the primary ENI
	overflow map[Pool]time.Time // since when a pool wants a further ENI
	slotsOut time.Time          // until when EC2 refuses further ENIs
	slotsWhy *Error             // and why
	timer    time.Time          // what the last SetTimer said
}

type subnetState struct {
	full     backoff // not even one address
	chunk    int     // largest request worth trying; 0: any
	noPrefix backoff // no aligned /28
}

type read struct {
	wanted   time.Time // zero: not wanted
	inFlight bool
	began    time.Time // of the read in flight
	retry    backoff
	polls    int // consecutive polls, to slow them down
}

// Clone returns a copy that shares nothing with s.
func (s State) Clone() State {
	c := s
	c.ENIs = make([]*ENI, len(s.ENIs))
	for i, e := range s.ENIs {
		d := *e
		d.Prefixes = slices.Clone(e.Prefixes)
		d.Addrs = cloneAddrs(e.Addrs)
		c.ENIs[i] = &d
	}
	c.Lost = cloneAddrs(s.Lost)
	c.Waiting = slices.Clone(s.Waiting)
	c.Calls = make(map[CallID]*Call, len(s.Calls))
	for k, v := range s.Calls {
		d := *v
		c.Calls[k] = &d
	}
	c.Subnets = make(map[vpc.SubnetID]*subnetState, len(s.Subnets))
	for k, v := range s.Subnets {
		d := *v
		c.Subnets[k] = &d
	}
	c.Trouble = maps.Clone(s.Trouble)
	c.Gone = maps.Clone(s.Gone)
	c.GoneENI = maps.Clone(s.GoneENI)
	c.overflow = maps.Clone(s.overflow)
	return c
}

func cloneAddrs(in []*Address) []*Address {
	out := make([]*Address, len(in))
	for i, a := range in {
		d := *a
		out[i] = &d
	}
	return out
}

// ENI returns the interface with this ID, or nil.
func (s *State) ENI(id vpc.ENIID) *ENI {
	for _, e := range s.ENIs {
		if e.ID == id {
			return e
		}
	}
	return nil
}

// Primary returns the node's own interface, nil before EC2 was read.
func (s *State) Primary() *ENI {
	for _, e := range s.ENIs {
		if e.Device == 0 {
			return e
		}
	}
	return nil
}

// Lookup returns an address and the interface it is on (nil for a lost one).
func (s *State) Lookup(addr netip.Addr) (*Address, *ENI) {
	for _, e := range s.ENIs {
		if a := e.find(addr); a != nil {
			return a, e
		}
	}
	for _, a := range s.Lost {
		if a.Addr == addr {
			return a, nil
		}
	}
	return nil, nil
}

// Held returns how many addresses of the VPC the node's managed ENIs take,
// primaries included.
func (s *State) Held() int {
	n := 0
	for _, e := range s.ENIs {
		if e.Managed {
			n += 1 + len(e.Addrs)
		}
	}
	return n
}

// Capacity returns how many addresses for pods this node can hold: what its
// configuration allows, less what interfaces of others take.
func (s *State) Capacity() int {
	n := s.Config.Capacity()
	for _, e := range s.ENIs {
		if !e.Managed && e.Device >= 0 {
			n -= max(0, s.Config.Limits.IPv4PerENI-1) * s.Config.PerSlot()
		}
	}
	return max(0, n)
}

// Waits returns why the pool of a request that waits does not grow; nil while it
// does, or nothing is known. Attaching tells whether an interface is on its way
// to it. ok is false when the request does not wait (any more).
func (s *State) Waits(id RequestID) (trouble *Error, attaching, ok bool) {
	i := slices.IndexFunc(s.Waiting, func(r Request) bool { return r.ID == id })
	if i < 0 {
		return nil, false, false
	}
	r := &s.Waiting[i]
	for _, c := range s.Calls {
		attaching = attaching || c.Pool == r.Pool && (c.Kind == CallCreate || c.Kind == CallAttach)
	}
	for _, e := range s.ENIs {
		attaching = attaching || e.Pool == r.Pool && e.Managed && e.Phase != Retiring && !e.ready()
	}
	if t := s.Trouble[r.Pool]; t != nil {
		e := *t
		e.Waited = s.Now.Sub(r.Since).Round(time.Second)
		trouble = &e
	}
	return trouble, attaching, true
}

// Exhausted returns the subnets that lack a free address, and those that lack
// a free prefix, as far as EC2 said so lately: what nobody asks for any more is
// not known.
func (s *State) Exhausted(now time.Time) (addresses, prefixes []vpc.SubnetID) {
	lately := func(b *backoff) bool { return b.steps > 0 && now.Sub(b.until) < retryTakes }
	for _, id := range slices.Sorted(maps.Keys(s.Subnets)) {
		if lately(&s.Subnets[id].full) {
			addresses = append(addresses, id)
		}
		if lately(&s.Subnets[id].noPrefix) {
			prefixes = append(prefixes, id)
		}
	}
	return addresses, prefixes
}

// retryTakes is how long after the end of a back-off the call that it held back
// may take, where somebody needs it.
const retryTakes = 15 * time.Second

// Verify returns an error when the state contradicts itself. It holds after
// every Step.
func (s *State) Verify() error {
	owner := map[netip.Addr]string{}
	primary := map[netip.Addr]bool{}
	owners := map[string]netip.Addr{}
	device := map[int]vpc.ENIID{}
	for _, e := range s.ENIs {
		if e.Primary.IsValid() {
			primary[e.Primary] = true
		}
	}
	check := func(a *Address, where string) error {
		if w, dup := owner[a.Addr]; dup {
			return fmt.Errorf("%s is on %s and on %s", a.Addr, w, where)
		}
		owner[a.Addr] = where
		if primary[a.Addr] {
			return fmt.Errorf("%s is a primary address and in a pool", a.Addr)
		}
		if (a.State == Bound) != (a.Owner != "") {
			return fmt.Errorf("%s is %s with owner %q", a.Addr, a.State, a.Owner)
		}
		if a.Owner != "" {
			if other, dup := owners[a.Owner]; dup {
				return fmt.Errorf("%s owns %s and %s", a.Owner, other, a.Addr)
			}
			owners[a.Owner] = a.Addr
		}
		return nil
	}
	for _, e := range s.ENIs {
		for _, a := range e.Addrs {
			if err := check(a, string(e.ID)); err != nil {
				return err
			}
			if a.Prefix.IsValid() && !slices.Contains(e.Prefixes, a.Prefix) {
				return fmt.Errorf("%s belongs to %s, which %s does not have", a.Addr, a.Prefix, e.ID)
			}
		}
		if e.Device >= 0 {
			if other, dup := device[e.Device]; dup {
				return fmt.Errorf("device index %d: %s and %s", e.Device, other, e.ID)
			}
			device[e.Device] = e.ID
		}
		if e.Call != 0 {
			if c := s.Calls[e.Call]; c == nil || c.ENI != e.ID {
				return fmt.Errorf("%s says call %d is in flight, which is not its own", e.ID, e.Call)
			}
		}
		if limit := s.Config.Limits.IPv4PerENI; e.Managed && limit > 0 && e.slots()-e.doubted()+s.asked(e) > limit {
			return fmt.Errorf("%s takes %d addresses with %d asked for, the type holds %d", e.ID, e.slots(), s.asked(e), limit)
		}
	}
	for _, a := range s.Lost {
		if err := check(a, "no interface"); err != nil {
			return err
		}
	}
	busy := map[vpc.ENIID]CallID{}
	for id, c := range s.Calls {
		if c.Kind == CallCreate {
			if other, dup := device[c.Device]; dup {
				return fmt.Errorf("device index %d: %s and call %d", c.Device, other, id)
			}
			device[c.Device] = vpc.ENIID(fmt.Sprintf("call %d", id))
			continue
		}
		if other, dup := busy[c.ENI]; dup {
			return fmt.Errorf("%s has calls %d and %d in flight", c.ENI, other, id)
		}
		busy[c.ENI] = id
	}
	seen := map[RequestID]bool{}
	for _, r := range s.Waiting {
		if seen[r.ID] {
			return fmt.Errorf("request %d waits twice", r.ID)
		}
		seen[r.ID] = true
		if !r.Deadline.After(s.Now) {
			return fmt.Errorf("request %d waits past its deadline", r.ID)
		}
		if _, dup := owners[r.Owner]; dup {
			return fmt.Errorf("request %d waits, and %s has an address", r.ID, r.Owner)
		}
	}
	return nil
}

// asked returns the slots that an Assign in flight will take on e.
func (s *State) asked(e *ENI) int {
	c := s.Calls[e.Call]
	if c == nil || c.Kind != CallAssign {
		return 0
	}
	if c.Prefix {
		return c.N / PrefixAddresses
	}
	return c.N
}
