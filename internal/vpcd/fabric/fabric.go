package fabric

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// layout is the version of everything pinned: of the maps' keys and values, of
// the numbers of drop reasons, of the names of links. Another version's pins
// are not adopted: Open removes them and Set makes every interface anew, at the
// price of a short interruption.
const layout = "v5"

// Options say which lab's fabric it is, and where its state is pinned.
type Options struct {
	Lab    string // names the namespaces: ul-LAB-fabric, ul-LAB-i-…, ul-LAB-svc-…
	BPFFS  string // a directory in a mounted bpffs; made if it is not there
	Logger *slog.Logger
	// Inferred holds from each Open on, for the flows that are there too.
	Inferred Inferred
	// LinkLocalPPS is how many packets per second an ENI may send to
	// link-local services (DNS, IMDS and NTP together): 0 is AWS's 1,024,
	// below 0 there is no bound.
	LinkLocalPPS int
	// Records is how many flow records an interval has room for, 0: 262,144.
	Records int
}

// Fabric is an open fabric.
type Fabric struct {
	names namespaces
	pins  string // Options.BPFFS and layout
	log   *slog.Logger
	lock  *os.File // the fabric's namespace, locked against other processes

	// life is held for reading by who uses objs without mu.
	life sync.RWMutex
	objs bpfgen.FabricObjects

	mu    sync.Mutex
	route *rtnetlink // in the fabric's namespace
	// seen is what the maps hold; nil when it must be read from them. Nobody
	// else writes to them, so it is read once and kept.
	seen *contents
	// Rules of security groups, by ifindex, and network ACLs, by subnet; those for
	// IPv6 apart.
	policies, policies6 ruleMaps[uint32]
	acls, acls6         ruleMaps[bpfgen.FabricSubnetKey]
	// taps are the pinned links, by ENI; those towards the internet are
	// internetName's.
	taps map[vpc.ENIID]*tap
	// translating are the NAT gateways' guests whose translation is in place as
	// this process wants it.
	translating map[string]string
	// nextIndex is the next fabric end's ifindex.
	nextIndex int

	listening listening
	intervals intervals
}

// tap is the pair of links that an ENI's programs hang on.
type tap struct{ in, out link.Link }

// NetnsPath returns the path of the network namespace called name.
func NetnsPath(name string) string { return nl.Path(name) }

// Open makes the lab's fabric or adopts the one that is there: its namespace,
// its pinned maps, and its programs, which it replaces one by one by those of
// this process without a packet lost. Linux 6.6 or later (TCX).
func Open(o Options) (*Fabric, error) {
	if err := checkOptions(o); err != nil {
		return nil, err
	}
	f := &Fabric{
		names: namespaces{o.Lab},
		pins:  filepath.Join(o.BPFFS, layout),
		log:   o.Logger,
		taps:  map[vpc.ENIID]*tap{},

		translating: map[string]string{},
	}
	if f.log == nil {
		f.log = slog.New(slog.DiscardHandler)
	}
	if err := f.open(o); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("open fabric of lab %s: %w", o.Lab, err)
	}
	return f, nil
}

func checkOptions(o Options) error {
	if err := checkLab(o.Lab); err != nil {
		return err
	}
	if o.BPFFS == "" {
		return errors.New("no directory for pins is set; name one in a mounted bpffs")
	}
	return nil
}

func (f *Fabric) open(o Options) error {
	if err := os.MkdirAll(filepath.Join(f.pins, "links"), 0o700); err != nil {
		return fmt.Errorf("make directory for pins: %w; mount a bpffs (mount -t bpf bpf DIR) and name a directory in it", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(f.pins, &st); err != nil {
		return fmt.Errorf("look at %s: %w", f.pins, err)
	}
	if st.Type != unix.BPF_FS_MAGIC {
		return fmt.Errorf("%s is in no bpffs; mount one there: mount -t bpf bpf %s", o.BPFFS, o.BPFFS)
	}
	if err := f.removeOtherLayouts(o.BPFFS); err != nil {
		return err
	}
	if err := f.openNamespace(); err != nil {
		return err
	}
	spec, err := loadSpec(o.Lab)
	if err != nil {
		return fmt.Errorf("read programs: %w", err)
	}
	if err := o.Inferred.apply(spec); err != nil {
		return err
	}
	if err := o.setLinkLocal(spec); err != nil {
		return err
	}
	opts := &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: f.pins}}
	if err := spec.LoadAndAssign(&f.objs, opts); err != nil {
		return fmt.Errorf("load programs: %w", err)
	}
	f.policies = ruleMaps[uint32]{
		what: "the rules of security groups", outer: f.objs.Policies, size: uint32(unsafe.Sizeof(bpfgen.FabricPolicy{})), kept: map[uint64]*ebpf.Map{},
		version: func(m *ebpf.Map) (uint64, error) {
			var p bpfgen.FabricPolicy
			err := m.Lookup(uint32(0), &p)
			return p.Version, err
		},
	}
	f.acls = ruleMaps[bpfgen.FabricSubnetKey]{
		what: "a network ACL", outer: f.objs.Acls, size: uint32(unsafe.Sizeof(bpfgen.FabricAcl{})), kept: map[uint64]*ebpf.Map{},
		version: func(m *ebpf.Map) (uint64, error) {
			var a bpfgen.FabricAcl
			err := m.Lookup(uint32(0), &a)
			return a.Version, err
		},
	}
	f.policies6 = ruleMaps[uint32]{
		what: "the rules of security groups for IPv6", outer: f.objs.Policies6, size: uint32(unsafe.Sizeof(bpfgen.FabricPolicy6{})), kept: map[uint64]*ebpf.Map{},
		version: func(m *ebpf.Map) (uint64, error) {
			var p bpfgen.FabricPolicy6
			err := m.Lookup(uint32(0), &p)
			return p.Version, err
		},
	}
	f.acls6 = ruleMaps[bpfgen.FabricSubnetKey]{
		what: "a network ACL for IPv6", outer: f.objs.Acls6, size: uint32(unsafe.Sizeof(bpfgen.FabricAcl6{})), kept: map[uint64]*ebpf.Map{},
		version: func(m *ebpf.Map) (uint64, error) {
			var a bpfgen.FabricAcl6
			err := m.Lookup(uint32(0), &a)
			return a.Version, err
		},
	}
	for i, p := range map[bpfgen.FabricGatewayProgram]*ebpf.Program{
		bpfgen.FabricGatewayProgramTO_INTERNET:   f.objs.ToInternet,
		bpfgen.FabricGatewayProgramFROM_INTERNET: f.objs.FromInternet,

		bpfgen.FabricGatewayProgramFROM_GUEST_IPV6: f.objs.FromGuestIpv6,
	} {
		if err := f.objs.Gateways.Put(uint32(i), p); err != nil {
			return fmt.Errorf("put the programs that others call in place: %w", err)
		}
	}
	// Key 0 counts what comes from no ENI.
	if err := addCounter(f.objs.Counts, 0); err != nil {
		return err
	}
	if err := f.objs.Judges.Put(uint32(0), f.objs.JudgeGuest); err != nil {
		return fmt.Errorf("put the program that judges in place: %w", err)
	}
	// These programs may judge otherwise than those before.
	if err := f.countGeneration(); err != nil {
		return err
	}
	if err := f.openIntervals(spec.Maps[bpfgen.FabricMapRecords].InnerMap, spec.Maps[bpfgen.FabricMapRecords6].InnerMap, o.Records); err != nil {
		return err
	}
	return f.adoptTaps()
}

// removeOtherLayouts removes pins that another version of this package left.
func (f *Fabric) removeOtherLayouts(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("read %s: %w", dir, err)
	}
	for _, e := range entries {
		if e.Name() == layout || !strings.HasPrefix(e.Name(), "v") {
			continue
		}
		f.log.Info("pins of another layout removed", "dir", filepath.Join(dir, e.Name()))
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("remove pins of another layout: %w", err)
		}
	}
	return nil
}

// openNamespace makes the fabric's namespace if there is none, and sets it up:
// services' addresses on lo, no forwarding, no IPv6, and no reverse-path filter,
// because a client's address is known to no route here.
func (f *Fabric) openNamespace() error {
	name := f.names.fabric()
	if err := nl.NewNamed(name); err == nil {
		f.log.Info("fabric made", "netns", name)
	} else if !errors.Is(err, fs.ErrExist) {
		return err
	}
	lock, err := lockNamespace(name)
	if err != nil {
		return err
	}
	f.lock = lock
	return nl.Do(nl.Path(name), func() error {
		for _, s := range []struct{ file, value string }{
			{"ipv4/ip_forward", "0"},
			{"ipv4/conf/all/rp_filter", "0"},
			{"ipv4/conf/default/rp_filter", "0"},
			{"ipv4/conf/all/log_martians", "0"},
			{"ipv6/conf/all/disable_ipv6", "1"},
			{"ipv6/conf/default/disable_ipv6", "1"},
		} {
			// What /proc/sys/net shows is the opening thread's namespace.
			err := writeSysctl("/proc/sys/net/"+s.file, s.value)
			if absent := errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(s.file, "ipv6/"); err != nil && !absent {
				return fmt.Errorf("set up namespace %s: %w", name, err)
			}
		}
		route, err := dialRoute()
		if err != nil {
			return err
		}
		f.route = route
		for _, a := range []netip.Addr{IMDSAddr, EndpointAddr, ResolverAddr, resolverAlias} {
			// lo is device 1 of every namespace.
			if err := route.addAddress(1, netip.PrefixFrom(a, 32), unix.RT_SCOPE_HOST); err != nil {
				return fmt.Errorf("set up namespace %s: %w", name, err)
			}
		}
		return nil
	})
}

// lockPatience is how long to wait for a process that is on its way out.
const lockPatience = 2 * time.Second

// lockNamespace takes the lock (flock) of who may write to a lab's fabric. It is
// on the namespace itself: it ends with the process, however that ends.
func lockNamespace(name string) (*os.File, error) {
	file, err := os.Open(nl.Path(name))
	if err != nil {
		return nil, fmt.Errorf("lock network namespace %s: %w", name, err)
	}
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for deadline := time.Now().Add(lockPatience); ; <-again.C {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return file, nil
		}
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EWOULDBLOCK) && time.Now().Before(deadline) {
			continue
		}
		file.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s is held by another process (vpcd?); stop it first: %w", name, err)
		}
		return nil, fmt.Errorf("lock network namespace %s: %w", name, err)
	}
}

func writeSysctl(path, value string) error {
	have, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if string(bytes.TrimSpace(have)) == value {
		return nil
	}
	return os.WriteFile(path, []byte(value), 0)
}

// adoptTaps opens the pinned links and makes each run this process's programs.
// A link that has lost its device is forgotten.
func (f *Fabric) adoptTaps() error {
	dir := filepath.Join(f.pins, "links")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("read pinned links: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		id, direction := e.Name(), ""
		if i := strings.LastIndexByte(id, '-'); i >= 0 {
			id, direction = id[:i], id[i+1:]
		}
		if (direction != "in" && direction != "out") || id != internetName && vpc.CheckID("eni", id) != nil {
			if err := os.Remove(path); err != nil {
				return fmt.Errorf("remove stray pin: %w", err)
			}
			continue
		}
		l, err := link.LoadPinnedLink(path, nil)
		if err != nil {
			return fmt.Errorf("open pinned link %s: %w", path, err)
		}
		program := f.objs.FromGuest
		switch {
		case id == internetName && direction == "in":
			program = f.objs.FromInternet
		case id == internetName:
			program = f.objs.CutForInternet
		case direction == "out":
			program = f.objs.ToGuest
		}
		// ENOLINK: the device is gone, and with it what the link hung on.
		if err := l.Update(program); errors.Is(err, unix.ENOLINK) || errors.Is(err, unix.ENODEV) {
			if err := errors.Join(l.Unpin(), l.Close()); err != nil {
				return fmt.Errorf("remove link without a device: %w", err)
			}
			continue
		} else if err != nil {
			_ = l.Close()
			return fmt.Errorf("replace program of %s: %w", path, err)
		}
		t := f.taps[vpc.ENIID(id)]
		if t == nil {
			t = &tap{}
			f.taps[vpc.ENIID(id)] = t
		}
		if direction == "in" {
			t.in = l
		} else {
			t.out = l
		}
	}
	if len(f.taps) > 0 {
		f.log.Info("fabric adopted", "enis", len(f.taps))
	}
	return nil
}

// Close lets go of the fabric, which stays: packets flow on. Listeners that
// ListenTCP returned are closed.
func (f *Fabric) Close() error {
	f.listening.closeAll()
	f.mu.Lock()
	defer f.mu.Unlock()
	var errs []error
	for _, t := range f.taps {
		errs = append(errs, t.close())
	}
	f.taps = nil
	errs = append(errs, f.policies.close(), f.policies6.close(), f.acls.close(), f.acls6.close(), f.intervals.close())
	if f.route != nil {
		f.route.Close()
		f.route = nil
	}
	f.life.Lock()
	defer f.life.Unlock()
	if f.objs.FromGuest != nil {
		errs = append(errs, f.objs.Close())
		f.objs = bpfgen.FabricObjects{}
	}
	if f.lock != nil {
		f.lock.Close() // a lock has nothing to lose
		f.lock = nil
	}
	return errors.Join(errs...)
}

func (t *tap) links() []link.Link {
	var out []link.Link
	for _, l := range []link.Link{t.in, t.out} {
		if l != nil {
			out = append(out, l)
		}
	}
	return out
}

func (t *tap) close() error {
	var errs []error
	for _, l := range t.links() {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// unpin takes the programs off their device.
func (t *tap) unpin() error {
	var errs []error
	for _, l := range t.links() {
		if err := l.Unpin(); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, t.close())...)
}

// on tells whether both programs are on the device.
func (t *tap) on(index int) bool {
	if t == nil || t.in == nil || t.out == nil {
		return false
	}
	for _, l := range t.links() {
		info, err := l.Info()
		if err != nil || info.TCX() == nil || int(info.TCX().Ifindex) != index {
			return false
		}
	}
	return true
}

// Destroy removes all of the lab's fabric: guests' namespaces, pairs, pins, and
// the fabric's namespace. Removing what is not there is no error, so that it
// can be repeated after an interruption. It refuses while a process has the lab's
// fabric open.
func Destroy(o Options) error {
	if err := checkOptions(o); err != nil {
		return err
	}
	n := namespaces{o.Lab}
	var errs []error
	// Devices first: a guest whose processes live on keeps its namespace, and
	// would keep its link.
	if nl.ExistsNamed(n.fabric()) {
		lock, err := lockNamespace(n.fabric())
		if err != nil {
			return fmt.Errorf("destroy fabric of lab %s: %w", o.Lab, err)
		}
		defer lock.Close()
		errs = append(errs, removeDevices(n))
	}
	guests, err := n.existing()
	errs = append(errs, err)
	for _, g := range append(guests, n.internet(), n.fabric()) {
		errs = append(errs, nl.DeleteNamed(g))
	}
	entries, err := os.ReadDir(o.BPFFS)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, fmt.Errorf("read pins: %w", err))
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "v") {
			errs = append(errs, os.RemoveAll(filepath.Join(o.BPFFS, e.Name())))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("destroy fabric of lab %s: %w", o.Lab, err)
	}
	return nil
}

func removeDevices(n namespaces) error {
	route, err := dialRouteAt(nl.Path(n.fabric()))
	if err != nil {
		return err
	}
	defer route.Close()
	devices, err := route.devices(false)
	if err != nil {
		return err
	}
	var indexes []int
	for _, d := range devices {
		indexes = append(indexes, d.index)
	}
	return route.remove(indexes...)
}

// existing lists the lab's guests that have a name under /run/netns, made whole
// or not.
func (n namespaces) existing() ([]string, error) {
	entries, err := os.ReadDir(nl.NetnsDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list network namespaces: %w", err)
	}
	var out []string
	for _, e := range entries {
		if n.guest(e.Name()) {
			out = append(out, e.Name())
		}
	}
	return out, nil
}
