package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
	"github.com/underlay-cni/underlay/internal/nl"
)

// InUseError says that pods still have their network from the datapath.
type InUseError struct{ Endpoints []Endpoint }

func (e *InUseError) Error() string {
	names := make([]string, len(e.Endpoints))
	for i, ep := range e.Endpoints {
		names[i] = ep.String() + " (" + ep.Addr.String() + ")"
	}
	slices.Sort(names)
	return fmt.Sprintf("%d endpoints are in use: %s", len(names), strings.Join(names, ", "))
}

// Removal is what Remove took away, in numbers.
type Removal struct {
	Links  int // host veths
	Rules  int
	Routes int
	Table  bool // inet underlay, in nftables
	Pins   int  // maps and links in the BPF file system
	// Filters are those on ENIs' clsact qdiscs; the qdisc stays, for to remove
	// it costs packets.
	Filters int
}

// Any reports whether there was anything.
func (r Removal) Any() bool { return r != Removal{} }

// InUse returns the endpoints that pods have: live by their record, with a
// device (one whose network namespace went has lost it), and not among released:
// those that the runtime gave up while no agent listened. released may be nil.
func InUse(bpffs string, released func(containerID, ifName string) bool) ([]Endpoint, error) {
	conn, err := nl.Dial()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	records, err := pinnedRecords(bpffs)
	if err != nil {
		return nil, err
	}
	links, err := conn.Links()
	if err != nil {
		return nil, err
	}
	var out []Endpoint
	for _, e := range records {
		has := slices.ContainsFunc(links, func(l nl.Link) bool {
			return l.Name == e.HostIfName && l.Index == e.HostIfIndex && ourGroup(l.Group)
		})
		if e.State == Live && has && (released == nil || !released(e.ContainerID, e.IfName)) {
			out = append(out, e)
		}
	}
	return out, nil
}

// Remove takes the datapath away from the calling thread's network namespace and
// from its directory in the BPF file system: host veths, and with them the pods'
// ends and the programs; rules and routes that bear our protocol number; the
// guard table in nftables; all pins. It needs no datapath that is whole, and may
// be repeated. Nothing else is changed: devices of ENIs stay up with their
// addresses, and sysctls stay as they are, since nobody knows what they were.
//
// While a pod has an endpoint, as InUse has it, it changes nothing and returns an
// *InUseError, unless force is set: that cuts those pods off. It refuses a
// directory that another process has open.
func Remove(bpffs string, released func(containerID, ifName string) bool, force bool) (Removal, error) {
	var r Removal
	if _, err := os.Stat(bpffs); err == nil {
		lock, err := lockPins(bpffs)
		if err != nil {
			return r, err
		}
		defer lock.Close()
	} else if !errors.Is(err, fs.ErrNotExist) {
		return r, fmt.Errorf("look at %s: %w", bpffs, err)
	}
	used, err := InUse(bpffs, released)
	if err != nil && !force {
		return r, fmt.Errorf("look which pods have endpoints: %w", err)
	}
	if len(used) > 0 && !force {
		return r, &InUseError{Endpoints: used}
	}
	conn, err := nl.Dial()
	if err != nil {
		return r, err
	}
	defer conn.Close()
	netns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return r, fmt.Errorf("open own network namespace: %w", err)
	}
	defer netns.Close()

	// Devices before the guard: what is in between passes nothing.
	errs := []error{r.removeLinks(conn), r.removeFilters(conn), r.removeRouting(conn), r.removeGuard(netns), r.removePins(bpffs)}
	return r, errors.Join(errs...)
}

// pinnedRecords reads the endpoints' records as they are pinned; none if there
// are no pins.
func pinnedRecords(bpffs string) ([]Endpoint, error) {
	path := filepath.Join(mapDir(bpffs), bpfgen.NodeMapEndpoints)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	m, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return nil, fmt.Errorf("open map %s: %w", path, err)
	}
	defer m.Close()
	c := newClock()
	var out []Endpoint
	var k bpfgen.NodeAddr
	var v bpfgen.NodeEndpoint
	it := m.Iterate()
	for it.Next(&k, &v) {
		e, err := c.decode(k, &v)
		if err != nil {
			return nil, err
		}
		out = append(out, e)
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read map %s: %w", path, err)
	}
	return out, nil
}

func (r *Removal) removeLinks(conn *nl.Conn) error {
	links, err := conn.Links()
	if err != nil {
		return err
	}
	var b nl.Batch
	for _, l := range links {
		if ourGroup(l.Group) && l.Kind == "veth" && strings.HasPrefix(l.Name, "ul") {
			b.LinkGroupIndex(l.Index, dyingGroup)
			b.Tolerate(unix.ENODEV)
			r.Links++
		}
	}
	if r.Links == 0 {
		return nil
	}
	b.LinkDeleteGroup(dyingGroup)
	b.Tolerate(unix.ENODEV)
	return conn.Exec(&b)
}

// removeFilters takes our programs off the devices of ENIs, which stay.
func (r *Removal) removeFilters(conn *nl.Conn) error {
	links, err := conn.Links()
	if err != nil {
		return err
	}
	var b nl.Batch
	for _, l := range links {
		for _, p := range eniPrograms {
			have, err := conn.Filters(l.Index, p.direction)
			if err != nil {
				return err
			}
			want := p.filter(device{l.Name, l.Index, eniPrograms})
			for _, f := range have {
				if f.Handle == want.Handle && f.Priority == want.Priority && f.Name == want.Name {
					b.FilterDelete(want)
					b.Tolerate(unix.ENOENT, unix.ENODEV)
					r.Filters++
				}
			}
		}
	}
	if r.Filters == 0 {
		return nil
	}
	return conn.Exec(&b)
}

func (r *Removal) removeRouting(conn *nl.Conn) error {
	rules, err := conn.Rules()
	if err != nil {
		return err
	}
	var b nl.Batch
	for _, rule := range rules {
		if rule.Protocol == Protocol && rule.Priority >= PodRulePriority && rule.Priority <= ENIRulePriority+MaxENIIndex {
			b.RuleDelete(rule)
			b.Tolerate(unix.ENOENT)
			r.Rules++
		}
	}
	for table := uint32(PodTable); table <= ENITable+MaxENIIndex; table++ {
		routes, err := conn.Routes(table)
		if err != nil {
			return err
		}
		for _, route := range routes {
			if route.Protocol == Protocol {
				b.RouteDelete(route)
				b.Tolerate(unix.ESRCH, unix.ENODEV)
				r.Routes++
			}
		}
	}
	if r.Rules+r.Routes == 0 {
		return nil
	}
	return conn.Exec(&b)
}

func (r *Removal) removeGuard(netns *os.File) error {
	c, err := guardConn(netns)
	if err != nil {
		return err
	}
	tables, err := c.ListTablesOfFamily(guardTable.Family)
	if err != nil {
		return fmt.Errorf("list nftables tables: %w", err)
	}
	for _, t := range tables {
		if t.Name == guardTable.Name {
			c.DelTable(guardTable)
			if err := c.Flush(); err != nil {
				return fmt.Errorf("delete nftables table inet %s: %w", guardTable.Name, err)
			}
			r.Table = true
		}
	}
	return nil
}

// removePins removes what we pinned, and the directories if nothing of others'
// is in them.
func (r *Removal) removePins(bpffs string) error {
	var errs []error
	for _, dir := range []string{linkDir(bpffs), mapDir(bpffs)} {
		entries, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		errs = append(errs, err)
		for _, e := range entries {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				errs = append(errs, fmt.Errorf("remove pin: %w", err))
				continue
			}
			r.Pins++
		}
		errs = append(errs, os.Remove(dir))
	}
	if err := os.Remove(bpffs); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
		errs = append(errs, fmt.Errorf("remove the directory of pins: %w", err))
	}
	return errors.Join(errs...)
}
