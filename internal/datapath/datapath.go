package datapath

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
	"github.com/underlay-cni/underlay/internal/nl"
)

// DefaultMTU is that of a VPC's wires.
const DefaultMTU = 9001

// ProcSysNet is where the kernel's network settings are.
const ProcSysNet = "/proc/sys/net"

// Options configure a Datapath.
type Options struct {
	// BPFFS is a directory in a mounted BPF file system that outlives the
	// process; it is made if it is missing. One agent owns it at a time.
	BPFFS string
	// AllowIMDS lets pods reach the instance metadata at 169.254.169.254.
	AllowIMDS bool
	// MTU of ENIs, host veths and, unless the endpoint says otherwise, pods;
	// 0: DefaultMTU.
	MTU int
	// BeforeReady, if set, is called by Add when the endpoint is there but
	// passes no packet yet: the place to put its policy into the kernel. Its
	// error undoes the endpoint. It may be called for several endpoints at
	// once.
	BeforeReady func(context.Context, Endpoint) error
	// Hook is where the programs stand; "": Auto. Open exchanges the kind that an
	// agent before used; towards Clsact, a pod loses what it is sent within some
	// 0.2 ms.
	Hook Hook
	// SNAT is by which address pods speak to networks outside of the VPC, once
	// SetVPC has said what that is; "": SNATNone.
	SNAT SNAT
	// SNATExclude are ranges that are joined to the VPC although their addresses
	// are public: pods speak to them under their own.
	SNATExclude []netip.Prefix
	// ProcSysNet is where /proc/sys/net can be written; "": /proc/sys/net. The
	// files are those of the network namespace of who opens them, wherever
	// they are mounted; in a container without privileges /proc/sys is
	// read-only.
	ProcSysNet string
	// Direct lets flows within the VPC bypass the kernel's stack (D6).
	Direct bool
	// StackNetworks are within the VPC's ranges and yet not for direct
	// forwarding: addresses that somebody on the node translates, as those of
	// Kubernetes' services, if they are of such a range.
	StackNetworks []netip.Prefix
	// Timeouts of idle connections; what is 0 is AWS's default.
	Timeouts Timeouts
	// Ended, if set, is called for each connection that is over, with its last
	// counts; not for several at once.
	Ended func(Connection)
	// Logger; nil: slog.Default().
	Logger *slog.Logger

	// loader, for tests, loads maps and programs in the place of LoadAndAssign.
	loader func(spec *ebpf.CollectionSpec, to any, opts *ebpf.CollectionOptions) error

	reached func(step string) error // for tests, see Datapath.reach
	settled time.Duration           // for tests, instead of moveSettled
	// For tests: entries of the table of connections, and how many of them pods
	// share; 0: as the programs have it.
	maxConns, maxShared uint32
}

// Datapath is the node's datapath. All methods are safe for concurrent use,
// from any network namespace: it remembers the one in which it was opened.
type Datapath struct {
	opts  Options
	log   *slog.Logger
	clock clock
	mono  mono
	lock  *os.File // of the directory, flock
	netns *os.File // the node's
	// conn is for what takes microseconds; slow for deleting links, which
	// keeps the kernel (and this socket) for some 20 ms each.
	conn, slow  *nl.Conn
	netnsCookie uint64
	objs        bpfgen.NodeObjects
	programIDs  sync.Map // *ebpf.Program to uint32: those of objs, once asked
	hooks       hooking  // of host veths
	eniHooks    hooking

	// work bounds the Adds that are in the kernel at once: they queue for the
	// same lock there, and fifty that contend are slower than two.
	work chan struct{}

	// The reaper removes what is in doomed; see reap.go. wake and urgent are of
	// size 1.
	wake, urgent chan struct{}
	stopReaper   func() // waits until it has ended; nil: it was not started
	stopSweeper  func() // the same; see conn.go
	stopMover    func() // the same; see move.go
	closed       atomic.Bool
	changed      atomic.Int64 // when the latest Add or Delete began or ended, CLOCK_MONOTONIC

	// eniMu is held while the ENIs or the VPC's ranges are set, and guards what
	// they were set to; present is nil before.
	eniMu   sync.Mutex
	present map[int]ENI
	vpc     []netip.Prefix // sorted
	peers   []netip.Prefix // sorted

	policies policies

	monitored sync.Mutex // held by who reads the events
	endMu     sync.Mutex // held while Options.Ended is called
	ends      *ends      // nil: nobody wants to know

	// mu guards the fields below, which are read from the maps by Open and
	// follow them.
	mu       sync.Mutex
	claimed  map[key]chan struct{} // closed when the owner is done
	byKey    map[key]netip.Addr    // Adding and Live
	tombs    map[key]netip.Addr    // the latest tombstone
	indexes  map[int]key           // host ifindexes in use
	next     int                   // the ifindex to try next
	slots    map[int]uint32        // by ifindex, see slot.go
	eniLinks map[int]device        // by ENI index: where eniPrograms stand
	moved    map[int]bool          // host veths whose programs are on TCX, see move.go; by ifindex
	nextSlot uint32
	fill     connFill   // as the latest sweep saw it
	doomed   []*remains // until they are removed
}

// Ifindexes of host veths are ours to choose, so that the maps can be filled
// before the device exists. The range is far above the kernel's own choices,
// which count up from 1 (net/core/dev.c, dev_index_reserve). The peer gets the
// same number in its namespace.
const (
	firstIndex = 1 << 20
	lastIndex  = 1<<24 - 1
)

// Open takes the node's datapath over in the calling thread's network
// namespace: it loads the programs, makes the maps or adopts those that are
// pinned, puts the new programs in the place of the old without a packet lost,
// undoes or finishes what a crash left half-done, installs the guard table in
// nftables, turns forwarding on and adds the rule of the pods' table.
//
// It refuses a kernel that lacks the hooks, which it probes, and a directory
// whose maps are of a later layout than it knows, or that another process has
// open.
func Open(opts Options) (*Datapath, error) {
	if opts.Logger == nil {
		opts.Logger = slog.Default()
	}
	if opts.MTU == 0 {
		opts.MTU = DefaultMTU
	}
	if opts.ProcSysNet == "" {
		opts.ProcSysNet = ProcSysNet
	}
	d := &Datapath{
		opts:     opts,
		log:      opts.Logger,
		clock:    newClock(),
		mono:     newMono(),
		work:     make(chan struct{}, 2),
		wake:     make(chan struct{}, 1),
		urgent:   make(chan struct{}, 1),
		claimed:  map[key]chan struct{}{},
		byKey:    map[key]netip.Addr{},
		tombs:    map[key]netip.Addr{},
		indexes:  map[int]key{},
		slots:    map[int]uint32{},
		eniLinks: map[int]device{},
		moved:    map[int]bool{},
	}
	if err := checkSNAT(opts.SNAT, opts.SNATExclude); err != nil {
		return nil, err
	}
	if err := d.open(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func (d *Datapath) open() (err error) {
	if d.netns, err = os.Open("/proc/thread-self/ns/net"); err != nil {
		return fmt.Errorf("open own network namespace: %w", err)
	}
	if d.conn, err = nl.DialIn(d.netns); err != nil {
		return err
	}
	if d.slow, err = nl.DialIn(d.netns); err != nil {
		return err
	}
	if d.netnsCookie, err = d.conn.NetnsCookie(); err != nil {
		return err
	}
	if d.lock, err = lockPins(d.opts.BPFFS); err != nil {
		return err
	}
	if err := d.load(); err != nil {
		return err
	}
	if err := d.readGeneration(); err != nil {
		return err
	}
	if err := d.setHooks(); err != nil {
		return err
	}
	// The guard first: from here on, nothing passes that a program of ours
	// has not marked, whatever else goes wrong.
	if err := installGuard(d.netns); err != nil {
		return err
	}
	d.startReaper()
	if err := d.recover(); err != nil {
		return err
	}
	if err := d.startSweeper(); err != nil {
		return err
	}
	d.startMover()
	if err := d.setSysctl("ipv4/ip_forward", "1"); err != nil {
		return err
	}
	return d.setPodRule()
}

// setPodRule has the pods' table looked up before the main one.
func (d *Datapath) setPodRule() error {
	var b nl.Batch
	b.RuleAdd(nl.Rule{Priority: PodRulePriority, Table: PodTable, Protocol: Protocol})
	b.Tolerate(unix.EEXIST)
	return d.conn.Exec(&b)
}

// in runs fn on a thread in the node's network namespace.
func (d *Datapath) in(fn func() error) error { return nl.Do(nl.FilePath(d.netns), fn) }

// spec returns the BPF object as the options and the maps that are there have it.
func (d *Datapath) spec() (*ebpf.CollectionSpec, error) {
	spec, err := bpfgen.LoadNode()
	if err != nil {
		return nil, fmt.Errorf("read the embedded BPF object: %w", err)
	}
	constants := d.opts.Timeouts.constants()
	if d.opts.AllowIMDS {
		constants[bpfgen.NodeVarImdsAllowed] = 1
	}
	if d.opts.Direct {
		constants[bpfgen.NodeVarDirectEnabled] = 1
	}
	if d.opts.Ended != nil {
		constants[bpfgen.NodeVarEndsWanted] = 1
	}
	if d.opts.maxShared != 0 {
		constants[bpfgen.NodeVarShareOf] = d.opts.maxShared
	}
	for name, value := range constants {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, fmt.Errorf("set %s in the BPF object: %w", name, err)
		}
	}
	if d.opts.maxConns != 0 {
		err = resizeConns(spec, d.opts.maxConns)
	} else {
		err = sizeSets(spec, mapDir(d.opts.BPFFS))
	}
	if err != nil {
		return nil, fmt.Errorf("set the size of the table of connections: %w", err)
	}
	if err := sizeCPUs(spec); err != nil {
		return nil, err
	}
	return spec, d.setSeed(spec)
}

// load makes or adopts the maps and loads the programs.
func (d *Datapath) load() error {
	spec, err := d.spec()
	if err != nil {
		return err
	}
	if err := prepareLayout(d.opts.BPFFS, spec, migrations); err != nil {
		return err
	}
	loader := (*ebpf.CollectionSpec).LoadAndAssign
	if d.opts.loader != nil {
		loader = d.opts.loader
	}
	err = loader(spec, &d.objs, &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: mapDir(d.opts.BPFFS)}})
	var verifier *ebpf.VerifierError
	switch {
	case errors.As(err, &verifier):
		return fmt.Errorf("load the BPF programs: the verifier of Linux %s refuses: %w (report it with `%%+v` of this error)", kernelRelease(), err)
	case errors.Is(err, ebpf.ErrMapIncompatible):
		return fmt.Errorf("adopt the maps in %s: %w (they say layout %d but differ from it: drain the node, then remove the directory)", mapDir(d.opts.BPFFS), err, layoutVersion)
	case err != nil:
		return fmt.Errorf("load the BPF programs and maps: %w", err)
	}
	return d.keepSeed(spec)
}

// Close gives the directory and all file descriptors back, once what was deleted
// is gone. All else stays in the kernel and goes on working. To close it again is no
// error, and does nothing.
func (d *Datapath) Close() error {
	if d.closed.Swap(true) {
		return nil // the numbers of its file descriptors may be another's
	}
	for _, stop := range []func(){d.stopMover, d.stopReaper, d.stopSweeper} {
		if stop != nil {
			stop()
		}
	}
	errs := []error{d.objs.Close()}
	for _, c := range []*nl.Conn{d.conn, d.slow} {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	for _, f := range []*os.File{d.netns, d.lock} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

// claim makes the caller the only one at work on k, until release is called.
func (d *Datapath) claim(ctx context.Context, k key) (release func(), err error) {
	for {
		d.mu.Lock()
		busy, ok := d.claimed[k]
		if !ok {
			done := make(chan struct{})
			d.claimed[k] = done
			d.mu.Unlock()
			return func() {
				d.mu.Lock()
				delete(d.claimed, k)
				d.mu.Unlock()
				close(done)
			}, nil
		}
		d.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for another operation on %s of container %s: %w", k.ifName, k.containerID, ctx.Err())
		}
	}
}

// reserveIndex takes a host ifindex that no endpoint has.
func (d *Datapath) reserveIndex(k key) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	for {
		i := d.next
		d.next++
		if d.next > lastIndex {
			d.next = firstIndex
		}
		if _, taken := d.indexes[i]; !taken {
			d.indexes[i] = k
			return i
		}
	}
}

func (d *Datapath) releaseIndex(i int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.indexes, i)
	delete(d.moved, i)
	d.leaveSlot(i)
}

// Endpoints returns all endpoints: live ones, tombstones and those that are
// being added, in no order.
func (d *Datapath) Endpoints() ([]Endpoint, error) {
	all, err := d.readRecords()
	if err != nil {
		return nil, err
	}
	out := make([]Endpoint, 0, len(all))
	for e := range maps.Values(all) {
		out = append(out, e)
	}
	return out, nil
}

// readRecords reads the map of endpoints. A record that is replaced meanwhile
// may be seen twice by the kernel's iteration; the later one counts.
func (d *Datapath) readRecords() (map[netip.Addr]Endpoint, error) {
	out := map[netip.Addr]Endpoint{}
	var k bpfgen.NodeAddr
	var r bpfgen.NodeEndpoint
	it := d.objs.Endpoints.Iterate()
	for it.Next(&k, &r) {
		e, err := d.clock.decode(k, &r)
		if err != nil {
			return nil, err
		}
		out[e.Addr] = e
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read the map of endpoints: %w", err)
	}
	return out, nil
}

// record returns the endpoint with that address. The error wraps
// ebpf.ErrKeyNotExist if there is none.
func (d *Datapath) record(addr netip.Addr) (Endpoint, error) {
	k := addrKey(addr)
	var r bpfgen.NodeEndpoint
	if err := d.objs.Endpoints.Lookup(&k, &r); err != nil {
		return Endpoint{}, fmt.Errorf("look up the record of %s: %w", addr, err)
	}
	return d.clock.decode(k, &r)
}

// commit writes e's record: a new one if how is ebpf.UpdateNoExist.
func (d *Datapath) commit(e *Endpoint, how ebpf.MapUpdateFlags) error {
	r, err := d.clock.encode(e)
	if err != nil {
		return err
	}
	k := addrKey(e.Addr)
	if err := nl.AwaitMemory(func() error { return d.objs.Endpoints.Update(&k, r, how) }); err != nil {
		return fmt.Errorf("record %s as %s: %w", e.Addr, e.State, err)
	}
	return nil
}

// setSysctl writes a value below /proc/sys/net, of the node's namespace, unless
// it is there: the tree may be mounted read-only, and all set beforehand.
func (d *Datapath) setSysctl(name, value string) error {
	path := filepath.Join(d.opts.ProcSysNet, name)
	return d.in(func() error {
		if old, err := os.ReadFile(path); err == nil && string(old) == value+"\n" {
			return nil
		}
		err := os.WriteFile(path, []byte(value), 0o644)
		if errors.Is(err, unix.EROFS) {
			return fmt.Errorf("set sysctl net/%s to %s: %w (mount the host's /proc/sys/net writable somewhere in the container and name it with --proc-sys-net, or set it beforehand)", name, value, err)
		}
		if err != nil {
			return fmt.Errorf("set sysctl net/%s to %s: %w", name, value, err)
		}
		return nil
	})
}
