package agent

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/datapath"
	"github.com/underlay-cni/underlay/internal/ec2"
	"github.com/underlay-cni/underlay/internal/groups"
	"github.com/underlay-cni/underlay/internal/imds"
	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/policy"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// Datapath is what the agent needs of the kernel; see package datapath.
type Datapath interface {
	SetENIs(context.Context, []datapath.ENI) error
	SetVPC(context.Context, []netip.Prefix) error
	SetPeers(context.Context, []netip.Prefix) error
	Status() (datapath.Status, error)
	Obstacle() (string, error)
	Foreign() ([]netip.Addr, error)
	Watch(ctx context.Context, changed func()) error
	Add(context.Context, datapath.Endpoint, *os.File) (datapath.Endpoint, error)
	Delete(ctx context.Context, containerID, ifName string) (datapath.Endpoint, error)
	Forget(netip.Addr) error
	Check(context.Context, datapath.Endpoint, *os.File) error
	Endpoints() ([]datapath.Endpoint, error)
	Counters() (map[string]uint64, error)
}

// EC2 is what the agent needs of EC2; see package ec2. Errors are classified
// by ec2.Outcome.
type EC2 interface {
	groups.Reader
	Interfaces(ctx context.Context, instance vpc.InstanceID, tag string) ([]vpc.ENI, error)
	Subnet(context.Context, vpc.SubnetID) (vpc.Subnet, error)
	PeerCIDRs(context.Context, vpc.VPCID) ([]netip.Prefix, error)
	SecurityGroups(ctx context.Context, in vpc.VPCID, ids []vpc.SecurityGroupID, names []string) ([]vpc.SecurityGroup, error)
	Limits(ctx context.Context, instanceType string) (vpc.InstanceLimits, error)
	AssignAddresses(ctx context.Context, id vpc.ENIID, n int) ([]netip.Addr, error)
	AssignPrefixes(ctx context.Context, id vpc.ENIID, n int) ([]netip.Prefix, error)
	Unassign(ctx context.Context, id vpc.ENIID, addrs []netip.Addr, prefixes []netip.Prefix) error
	CreateInterface(context.Context, ec2.NewInterface) (vpc.ENI, error)
	AttachInterface(ctx context.Context, id vpc.ENIID, instance vpc.InstanceID, device int) (vpc.AttachmentID, error)
	SetDeleteOnTermination(context.Context, vpc.ENIID, vpc.AttachmentID) error
	DeleteInterface(context.Context, vpc.ENIID, vpc.AttachmentID) error
	Detached(ctx context.Context, tag, value string) ([]vpc.ENI, error)
	Alive(context.Context, []vpc.InstanceID) (map[vpc.InstanceID]bool, error)
}

// Metadata is what the agent needs of IMDS; see package imds.
type Metadata interface {
	Identity(context.Context) (imds.Identity, error)
	Interfaces(context.Context) ([]imds.Interface, error)
	VPCCIDRs(ctx context.Context, mac string) ([]netip.Prefix, error)
}

// DefaultAddTimeout is how long an ADD waits for its address: below the two
// minutes after which container runtimes give up, and long enough for an ENI
// to be made and attached on a slow day.
const DefaultAddTimeout = 50 * time.Second

// startTimeout is how long an ADD waits for an agent that is starting.
const startTimeout = 10 * time.Second

// Options configure an Agent.
type Options struct {
	Version    string
	Cluster    string
	Socket     string // the spool lies beside it
	Datapath   Datapath
	Metadata   Metadata
	ConnectEC2 func(ctx context.Context, region string) (EC2, error)
	Logger     *slog.Logger
	AddTimeout time.Duration                // 0: DefaultAddTimeout
	Tune       func(*ipam.Config)           // changes the policy's defaults; may be nil
	Sweep      time.Duration                // between deletions of what the cluster's dead nodes left; 0: never
	Rival      func(context.Context) string // where another agent hands out the node's addresses, see AWSNode; may be nil

	// SetPolicy puts an endpoint's tables into the kernel, before BeforeReady of
	// the datapath returns or later. nil: the datapath judges nothing.
	SetPolicy func(datapath.Endpoint, policy.Tables) error

	// GroupsMode is who judges by pods' security groups unless they say so:
	// agentapi.GroupsVPC or GroupsHost; "": GroupsVPC.
	GroupsMode string

	// GroupsPoller is the unix socket of a poller of security groups that the agent
	// follows (package groups); "": it polls itself.
	GroupsPoller string

	Verdicts     Verdicts     // what underlay monitor shows; may be nil
	Orchestrator Orchestrator // nil: there is none
	// Serving, if set, is called once, when the first ADD can be served, and
	// may take its time; ctx ends with the agent.
	Serving func(ctx context.Context)
}

// Agent runs one node. Make it with New, then call Run; its methods are safe
// for concurrent use, before, during and after Run.
type Agent struct {
	opts    Options
	log     *slog.Logger
	started time.Time
	metrics *metrics
	groups  *groupBook
	gate    *gatekeeper // nil: the datapath judges nothing
	monitor *monitor    // nil: the datapath tells no verdicts
	locks   keyLocks
	spoolMu sync.Mutex // one drain of the spool at a time

	post  chan func(*owner) // to the owner
	ready chan struct{}     // closed when the first ADD can be served
	done  chan struct{}     // closed when the owner has ended

	mu        sync.Mutex
	waitsFor  string // what the start waits for, and the next step; "" when ready
	refuses   bool   // what it waits for does not pass by itself: nobody need wait with us
	identity  imds.Identity
	client    EC2                 // nil before the node is identified
	config    ipam.Config         // the zero value before the node is identified
	incidents []agentapi.Incident // the latest first
	endpoints map[key]datapath.Endpoint
	nextReq   ipam.RequestID
	subnets   map[vpc.SubnetID]netip.Prefix
	usable    map[vpc.SubnetID]bool // those that pods asked for, of our VPC and zone
	flows     *Flows                // nil: none are recorded
}

// key names an endpoint as the runtime does.
type key struct{ containerID, ifName string }

func (k key) String() string { return k.containerID + "/" + k.ifName }

// New returns an agent that is not ready: it answers every request, most with
// what it waits for.
func New(opts Options) *Agent {
	if opts.AddTimeout == 0 {
		opts.AddTimeout = DefaultAddTimeout
	}
	if opts.GroupsMode == "" {
		opts.GroupsMode = agentapi.GroupsVPC
	}
	a := &Agent{
		opts: opts, log: opts.Logger, started: time.Now(),
		groups: newGroupBook(), post: make(chan func(*owner)), ready: make(chan struct{}), done: make(chan struct{}),
		waitsFor: "the agent is starting; ask again in a second", endpoints: map[key]datapath.Endpoint{}, subnets: map[vpc.SubnetID]netip.Prefix{}, usable: map[vpc.SubnetID]bool{},
	}
	a.metrics = newMetrics(a)
	if opts.SetPolicy != nil {
		a.gate = newGatekeeper(a, opts.SetPolicy)
	}
	if opts.Verdicts != nil {
		a.monitor = newMonitor(a, opts.Verdicts)
	}
	return a
}

// Run brings the node up and runs it until ctx ends. It waits for IMDS and EC2
// as long as it takes; requests are answered meanwhile.
func (a *Agent) Run(ctx context.Context) error {
	ctx, stop := context.WithCancelCause(ctx)
	cancel := func() { stop(nil) }
	o := &owner{a: a, ctx: ctx, timer: time.NewTimer(time.Hour), waiters: map[ipam.RequestID]chan answer{}}
	defer o.wait() // after cancel: what runs beside the owner ends with ctx
	defer cancel()
	defer close(a.done)

	if err := a.recover(); err != nil {
		return err
	}
	o.spawn(func() {
		if err := a.awaitAlone(ctx); err != nil {
			return // ctx has ended
		}
		cfg, err := a.identify(ctx, o)
		if err != nil {
			return // likewise
		}
		client := o.ec2 // before the owner has it
		a.tell(ctx, func(o *owner) { o.start(cfg) })
		if a.gate != nil {
			o.spawn(func() { a.gate.book.Run(ctx, client) })
			o.spawn(func() { a.keepGate(ctx) })
		}
		o.spawn(func() { a.followPeers(ctx, client) })
		if a.opts.Sweep > 0 {
			o.spawn(func() { a.sweep(ctx, client, cfg.Instance) })
		}
	})
	o.spawn(func() { a.watchSpool(ctx) })
	if a.opts.Orchestrator != nil {
		o.spawn(func() { a.publish(ctx) })
	}
	if a.opts.Serving != nil {
		o.spawn(func() {
			select {
			case <-a.ready:
				a.opts.Serving(ctx)
			case <-ctx.Done():
			}
		})
	}
	o.spawn(func() {
		if err := a.repair(ctx, o); err != nil {
			stop(err)
		}
	})
	if err := o.run(); err != nil {
		return err
	}
	if err := context.Cause(ctx); errors.Is(err, errRival) {
		return err
	}
	return nil
}

// recover reads the commit records back.
func (a *Agent) recover() error {
	eps, err := a.opts.Datapath.Endpoints()
	if err != nil {
		return fmt.Errorf("read the endpoints back: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, ep := range eps {
		if ep.State == datapath.Live {
			a.endpoints[key{ep.ContainerID, ep.IfName}] = ep
		}
	}
	return nil
}

// identify asks IMDS who the node is and EC2 what it may hold, as often as it
// takes.
func (a *Agent) identify(ctx context.Context, o *owner) (ipam.Config, error) {
	cfg := ipam.Default()
	var id imds.Identity
	err := a.insist(ctx, "imds", "check that the node reaches 169.254.169.254 (curl -X PUT http://169.254.169.254/latest/api/token -H 'X-aws-ec2-metadata-token-ttl-seconds: 60') and that its metadata options allow IMDSv2", func() (err error) {
		id, err = a.opts.Metadata.Identity(ctx)
		return err
	})
	if err != nil {
		return cfg, err
	}
	err = a.insist(ctx, "ec2", "check the node's credentials, its route to the EC2 endpoint and AWS_ENDPOINT_URL_EC2", func() error {
		client, err := a.opts.ConnectEC2(ctx, id.Region)
		if err != nil {
			return err
		}
		limits, err := client.Limits(ctx, id.Type)
		if err != nil {
			return err
		}
		if limits.ENIs < 1 || limits.IPv4PerENI < 1 {
			return fmt.Errorf("the limits of instance type %s are not known", id.Type)
		}
		o.ec2, cfg.Limits = client, limits
		return nil
	})
	if err != nil {
		return cfg, err
	}
	if err := a.opts.Datapath.SetVPC(ctx, id.VPCCIDRs); err != nil {
		a.incident("vpc", err.Error())
	}
	h := fnv.New64a()
	h.Write([]byte(id.Instance))
	cfg.Instance, cfg.Cluster, cfg.Seed = id.Instance, a.opts.Cluster, h.Sum64()
	if a.opts.Tune != nil {
		a.opts.Tune(&cfg)
	}
	a.mu.Lock()
	a.identity, a.config, a.client = id, cfg, o.ec2
	a.subnets[id.Subnet] = id.SubnetCIDR
	a.waitsFor = "waiting for EC2 to list the node's interfaces; ask again in a second"
	a.mu.Unlock()
	a.log.Info("node identified", "node", id.Instance, "type", id.Type, "az", id.AvailabilityZone, "subnet", id.Subnet, "ip", id.Addr)
	return cfg, nil
}

// insist calls fn until it succeeds or ctx ends, with growing delays, and says
// what it waits for.
func (a *Agent) insist(ctx context.Context, op, next string, fn func() error) error {
	for delay := 250 * time.Millisecond; ; delay = min(2*delay, 15*time.Second) {
		err := fn()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		a.setWaitsFor(fmt.Sprintf("not ready: %s: %v; %s", op, err, next))
		a.incident(op, err.Error()+"; "+next)
		t := time.NewTimer(delay)
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
	}
}

func (a *Agent) setWaitsFor(s string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.waitsFor = s
}

// unready returns what the agent waits for, "" when it is ready.
func (a *Agent) unready() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.waitsFor
}

// tell has fn run by the owner, and reports whether the owner took it.
func (a *Agent) tell(ctx context.Context, fn func(*owner)) bool {
	select {
	case a.post <- fn:
		return true
	case <-a.done:
		return false
	case <-ctx.Done():
		return false
	}
}

// errStopping answers requests that the end of the agent overtook.
var errStopping = agentapi.Errorf(agentapi.CodeTryAgain, "the agent is stopping; try again when it is back")

// ask has fn run by the owner and waits until it has.
func (a *Agent) ask(ctx context.Context, fn func(*owner)) error {
	ran := make(chan struct{})
	if !a.tell(ctx, func(o *owner) { fn(o); close(ran) }) {
		return errStopping
	}
	<-ran // the owner never waits for us
	return nil
}

// maxIncidents bounds what is kept of the errors that were lived through.
const maxIncidents = 16

// incident remembers an error, and logs it when it is new.
func (a *Agent) incident(op, msg string) {
	now := time.Now()
	a.mu.Lock()
	for i, in := range a.incidents {
		if in.Op == op && in.Message == msg {
			in.Count++
			in.Time = now
			copy(a.incidents[1:i+1], a.incidents[:i])
			a.incidents[0] = in
			a.mu.Unlock()
			return
		}
	}
	a.incidents = append([]agentapi.Incident{{Time: now, Op: op, Message: msg, Count: 1}}, a.incidents...)
	if len(a.incidents) > maxIncidents {
		a.incidents = a.incidents[:maxIncidents]
	}
	a.mu.Unlock()
	a.log.Warn("operation did not succeed", "op", op, "err", msg)
}

// poolSubnet is the subnet that a pod asks for as ipam names it, "" for the node's
// own. Its interface must be one that the node can have.
func (a *Agent) poolSubnet(ctx context.Context, asked string) (vpc.SubnetID, error) {
	id := vpc.SubnetID(asked)
	a.mu.Lock()
	client, own, known := a.client, a.identity, a.usable[id]
	a.mu.Unlock()
	if id == "" || id == own.Subnet {
		return "", nil
	}
	if known {
		return id, nil
	}
	s, err := client.Subnet(ctx, id)
	a.metrics.call("describe-subnets", err)
	switch {
	case err != nil:
		return "", agentapi.Errorf(agentapi.CodeInvalidConfig, "ask EC2 for the subnet %s that the pod is to be in: %v", id, err)
	case s.VPC != own.VPC || s.AvailabilityZone != own.AvailabilityZone:
		return "", agentapi.Errorf(agentapi.CodeInvalidConfig, "%s is in %s, %s, and the node in %s, %s; name a subnet of the node's VPC and zone", id, s.VPC, s.AvailabilityZone, own.VPC, own.AvailabilityZone)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.subnets[id], a.usable[id] = s.CIDR, true
	return id, nil
}

// subnetCIDR returns the range of a subnet, asked of EC2 once.
func (a *Agent) subnetCIDR(ctx context.Context, client EC2, id vpc.SubnetID) (netip.Prefix, error) {
	a.mu.Lock()
	p, ok := a.subnets[id]
	a.mu.Unlock()
	if ok {
		return p, nil
	}
	s, err := client.Subnet(ctx, id)
	if err != nil {
		return netip.Prefix{}, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.subnets[id] = s.CIDR
	return s.CIDR, nil
}

// keyLocks gives each key a lock of its own.
type keyLocks struct {
	mu   sync.Mutex
	held map[key]*keyLock
}

type keyLock struct {
	token chan struct{} // holds one value while locked
	users int
}

// lock waits for the key's lock and returns how to give it back.
func (l *keyLocks) lock(ctx context.Context, k key) (func(), error) {
	l.mu.Lock()
	if l.held == nil {
		l.held = map[key]*keyLock{}
	}
	kl := l.held[k]
	if kl == nil {
		kl = &keyLock{token: make(chan struct{}, 1)}
		l.held[k] = kl
	}
	kl.users++
	l.mu.Unlock()
	leave := func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if kl.users--; kl.users == 0 {
			delete(l.held, k)
		}
	}
	select {
	case kl.token <- struct{}{}:
		return func() { <-kl.token; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, errors.Join(errGone, ctx.Err())
	}
}

// errGone says that the peer hung up; nobody reads it.
var errGone = agentapi.Errorf(agentapi.CodeTryAgain, "the request was withdrawn; try again")
