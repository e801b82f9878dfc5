package datapath

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// ENI is one attached network interface of the node.
type ENI struct {
	ID      vpc.ENIID
	Index   int // 1..31, unique; the device index plus one. 1 is the primary ENI
	MAC     net.HardwareAddr
	Primary netip.Addr
	Subnet  netip.Prefix
	// Idle are the times after which its pods' flows are over; what is 0 is as
	// Options.Timeouts say.
	Idle vpc.IdleTimeouts
}

// LinkMissingError is ErrLinkMissing with the ENIs that have no device yet.
type LinkMissingError struct{ ENIs []vpc.ENIID }

func (e *LinkMissingError) Error() string {
	ids := make([]string, len(e.ENIs))
	for i, id := range e.ENIs {
		ids[i] = string(id)
	}
	return fmt.Sprintf("%s: %v (an attachment takes seconds; if it lasts, compare `ip link` with the ENI's MAC in EC2)", strings.Join(ids, ", "), ErrLinkMissing)
}
func (e *LinkMissingError) Unwrap() error { return ErrLinkMissing }

// SetENIs brings the node's ENIs to what enis says, whole: each device up, with
// its MTU and loose reverse-path filter, a secondary ENI's with its primary
// address, and for each a table with gateway and default route that packets of
// its mark take. Rules and tables of ENIs that are gone go. It changes only
// what bears our protocol number, and devices that enis names.
//
// It may be repeated at any time, and then changes nothing but what others
// damaged: routes, rules, the guard table in nftables, and the programs on the
// pods' devices too; and what others' address translation needs (see setReplies),
// if it came or went. What pods send to the internet gets its source address by
// the ENIs that are present, see SNAT. If an ENI has no device yet, the rest is applied and the
// error is a *LinkMissingError.
func (d *Datapath) SetENIs(ctx context.Context, enis []ENI) error {
	if err := checkENIs(enis); err != nil {
		return err
	}
	d.eniMu.Lock()
	defer d.eniMu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	links, err := d.conn.Links()
	if err != nil {
		return err
	}
	addrs, err := d.conn.Addrs()
	if err != nil {
		return err
	}
	present := map[int]ENI{}
	var missing []vpc.ENIID
	var errs []error
	for _, eni := range enis {
		l, ok := linkOf(links, eni.MAC)
		if !ok {
			missing = append(missing, eni.ID)
			continue
		}
		present[eni.Index] = eni
		if err := d.setENI(eni, l, addrs); err != nil {
			errs = append(errs, fmt.Errorf("set up %s (%s): %w", eni.ID, l.Name, err))
		}
	}
	d.present = present
	attached := d.attachENIs(ctx, present, links)
	missingGuard, err := repairGuard(d.netns)
	errs = append(errs, d.setRules(present), d.setPodRule(), err, d.setSNAT(), d.repairPrograms(ctx))
	if err := errors.Join(attached, d.releaseENIs(present, links)); err != nil {
		d.log.Warn("pods' packets take the stack where an ENI lacks its programs", "err", err)
	}
	if err := d.setReplies(slices.Collect(maps.Values(present))); err != nil {
		// What nobody translates goes on without.
		d.log.Warn("pods on secondary ENIs may not answer through ports of the node", "err", err)
	}
	if missingGuard {
		d.log.Warn("guard table was removed from nftables, installed again", "table", "inet "+guardTable.Name)
	}
	if len(missing) > 0 {
		errs = append(errs, &LinkMissingError{ENIs: missing})
	}
	return errors.Join(errs...)
}

func checkENIs(enis []ENI) error {
	seen := map[int]vpc.ENIID{}
	for _, e := range enis {
		switch other, taken := seen[e.Index]; {
		case e.Index < 1 || e.Index > MaxENIIndex:
			return fmt.Errorf("set ENIs: index %d of %s is not within 1..%d", e.Index, e.ID, MaxENIIndex)
		case taken:
			return fmt.Errorf("set ENIs: %s and %s both have index %d", other, e.ID, e.Index)
		case len(e.MAC) != 6 || !e.Primary.Is4() || !e.Subnet.IsValid() || !e.Subnet.Addr().Is4():
			return fmt.Errorf("set ENIs: %s lacks a MAC, a primary IPv4 address or a subnet: %v %v %v", e.ID, e.MAC, e.Primary, e.Subnet)
		}
		seen[e.Index] = e.ID
	}
	return nil
}

func linkOf(links []nl.Link, mac net.HardwareAddr) (nl.Link, bool) {
	for _, l := range links {
		if !ourGroup(l.Group) && l.MAC.String() == mac.String() {
			return l, true
		}
	}
	return nl.Link{}, false
}

// setENI sets one device up and fills its table.
func (d *Datapath) setENI(eni ENI, l nl.Link, addrs []nl.Addr) error {
	// Replies to a pod come back by the ENI that has its address, whatever
	// the main table says about the way there: strict filtering would drop
	// them. The larger of this and conf.all counts.
	if err := d.setSysctl("ipv4/conf/"+l.Name+"/rp_filter", "2"); err != nil {
		return err
	}
	var b nl.Batch
	if l.MTU != d.opts.MTU {
		b.LinkMTU(l.Index, d.opts.MTU)
	}
	if !l.Up {
		b.LinkUp(l.Index)
	}
	has := false
	for _, a := range addrs {
		has = has || a.Index == l.Index && a.Prefix.Addr() == eni.Primary
	}
	if eni.Index > 1 && !has {
		b.AddrAdd(l.Index, netip.PrefixFrom(eni.Primary, 32))
		b.Tolerate(unix.EEXIST)
	}
	if err := d.conn.Exec(&b); err != nil {
		return err
	}

	want := eniRoutes(eni, l.Index)
	have, err := d.conn.Routes(want[0].Table)
	if err != nil {
		return err
	}
	var routes nl.Batch
	for _, r := range want {
		if !slices.Contains(have, r) {
			routes.RouteSet(r)
		}
	}
	for _, r := range have {
		if r.Protocol == Protocol && r.Dst != want[0].Dst && r.Dst != want[1].Dst {
			routes.RouteDelete(r)
			routes.Tolerate(unix.ESRCH, unix.ENODEV)
		}
	}
	return d.conn.Exec(&routes)
}

// eniRoutes are the gateway, on the link, and the way to all else by it.
func eniRoutes(eni ENI, ifindex int) []nl.Route {
	table := uint32(ENITable + eni.Index)
	gateway := vpc.Router(eni.Subnet)
	return []nl.Route{
		{Dst: netip.PrefixFrom(gateway, 32), Index: ifindex, Table: table, Protocol: Protocol},
		{Dst: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Gateway: gateway, Index: ifindex, Table: table, Protocol: Protocol},
	}
}

// setRules leaves one rule per ENI that is there, and no table behind a rule
// that went.
func (d *Datapath) setRules(present map[int]ENI) error {
	have, err := d.conn.Rules()
	if err != nil {
		return err
	}
	want := map[nl.Rule]bool{}
	for i := range present {
		want[nl.Rule{Priority: uint32(ENIRulePriority + i), Table: uint32(ENITable + i), Mark: Mark(i), Mask: MarkMask, Protocol: Protocol}] = false
	}
	var b nl.Batch
	var errs []error
	for _, r := range have {
		if _, ok := want[r]; ok {
			want[r] = true
			continue
		}
		if r.Protocol != Protocol || r.Priority <= ENIRulePriority || r.Priority > ENIRulePriority+MaxENIIndex {
			continue
		}
		b.RuleDelete(r)
		b.Tolerate(unix.ENOENT)
		if _, ok := present[int(r.Table)-ENITable]; ok || r.Table <= ENITable || r.Table > ENITable+MaxENIIndex {
			continue
		}
		routes, err := d.conn.Routes(r.Table)
		errs = append(errs, err)
		for _, route := range routes {
			if route.Protocol == Protocol {
				b.RouteDelete(route)
				b.Tolerate(unix.ESRCH, unix.ENODEV)
			}
		}
	}
	for r, there := range want {
		if !there {
			b.RuleAdd(r)
			b.Tolerate(unix.EEXIST)
		}
	}
	errs = append(errs, d.conn.Exec(&b))
	return errors.Join(errs...)
}

// Foreign returns the addresses that somebody else uses in the node's namespace:
// those on its devices, and those with a route to a device of another's (as
// another CNI has for its pods). Sorted, each once.
func (d *Datapath) Foreign() ([]netip.Addr, error) {
	addrs, err := d.conn.Addrs()
	if err != nil {
		return nil, err
	}
	routes, err := d.conn.HostRoutes()
	if err != nil {
		return nil, err
	}
	var out []netip.Addr
	for _, a := range addrs {
		out = append(out, a.Prefix.Addr())
	}
	for _, r := range routes {
		if !ourTable(r.Table) {
			out = append(out, r.Dst.Addr())
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out), nil
}

// ourTable reports whether the datapath alone writes to the routing table.
func ourTable(table uint32) bool { return table >= PodTable && table <= ENITable+MaxENIIndex }

// Watch calls changed, from two goroutines, whenever in the node's namespace an
// IPv4 rule, a route of an ENI's table or a filter on a pod's or an ENI's device
// is deleted, an address comes or goes, or a host route does in a table that is
// not ours, until ctx ends: then SetENIs and Foreign have something to look at;
// and when in nftables somebody begins to translate addresses or to drop, or
// deletes our table. Its own changes count too. What else happens to nftables,
// and to sysctls, is not heard.
func (d *Datapath) Watch(ctx context.Context, changed func()) error {
	w, err := nl.WatchIn(d.netns)
	if err != nil {
		return fmt.Errorf("watch the node's routing: %w", err)
	}
	route := func(r nl.Route, gone bool) bool {
		if ourTable(r.Table) {
			return gone && r.Table != PodTable // a pod's comes and goes with the pod
		}
		return r.Dst.Bits() == 32
	}
	ours := func(index int) bool {
		return index >= firstIndex && index <= lastIndex && !d.isMoved(index) || d.isENILink(index)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return watchNAT(ctx, d.netns, changed) })
	g.Go(func() error {
		if err := w.Run(ctx, route, ours, changed); err != nil {
			return fmt.Errorf("watch the node's routing: %w", err)
		}
		return nil
	})
	return g.Wait()
}
