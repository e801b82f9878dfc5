package fabric

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// InternetMTU is the largest IP length that an internet gateway carries (VPC
// user guide, "Network maximum transmission unit").
const InternetMTU = 1500

// InternetAddrs are the addresses of the internet: of its one namespace,
// ul-LAB-internet, which stands for everybody out there. They are of a block for
// documentation (TEST-NET-3, RFC 5737).
var InternetAddrs = []netip.Prefix{
	netip.MustParsePrefix("203.0.113.10/24"),
	netip.MustParsePrefix("203.0.113.20/24"),
}

// internetMAC is the MAC of the internet's end. As RouterMAC, no ENI has it.
var internetMAC = net.HardwareAddr{0x02, 0x00, 0x5e, 0x00, 0x00, 0x02}

// internetName is the name of the device that leads to the internet, and of the
// pins of its programs.
const internetName = "internet"

// Public is a public address that leads to a private one, in both directions,
// through an internet gateway.
type Public struct {
	Addr    netip.Addr
	VNI     uint32 // of the VPC that the gateway is attached to
	Private netip.Addr
	// Table is the gateway's own route table, by which what comes in finds its
	// way; "" is none: to whatever interface holds Private.
	Table vpc.RouteTableID
}

// checkPublics turns public addresses into the contents of both maps.
func checkPublics(all []Public, tables map[vpc.RouteTableID]uint64) (map[uint32]bpfgen.FabricPublic, map[bpfgen.FabricAddress]uint32, []error) {
	var errs []error
	publics, elastics := map[uint32]bpfgen.FabricPublic{}, map[bpfgen.FabricAddress]uint32{}
	for _, p := range all {
		if !p.Addr.Is4() || !p.Private.Is4() || p.VNI == 0 {
			errs = append(errs, fmt.Errorf("public address %s of %s in VPC %d: want two IPv4 addresses and a VPC", p.Addr, p.Private, p.VNI))
			continue
		}
		public, private := be32(p.Addr), bpfgen.FabricAddress{Vni: p.VNI, Addr: p.Private.As16()}
		_, twice := publics[public]
		_, both := elastics[private]
		switch {
		case twice || both:
			errs = append(errs, fmt.Errorf("public address %s of %s: one of them occurs twice", p.Addr, p.Private))
			continue
		case p.Table != "" && tables[p.Table] == 0:
			errs = append(errs, fmt.Errorf("public address %s: the gateway's route table %q is not there or not valid", p.Addr, p.Table))
			continue
		}
		publics[public] = bpfgen.FabricPublic{Vni: p.VNI, Private: be32(p.Private), Table: tables[p.Table]}
		elastics[private] = public
	}
	return publics, elastics, errs
}

// makeInternet makes the internet's namespace and the pair that leads to it, if
// it is wanted and not there. It stays until the lab is destroyed: without a
// public address nothing leads to it.
func (f *Fabric) makeInternet(want desired, devices []deviceInfo) error {
	if !want.internet {
		return nil
	}
	i := slices.IndexFunc(devices, func(d deviceInfo) bool { return d.name == internetName })
	name := f.names.internet()
	if i >= 0 && f.seen.internet.Ifindex == uint32(devices[i].index) && f.taps[internetName].on(devices[i].index) && nl.ExistsNamed(name) {
		return nil
	}
	if i >= 0 {
		if err := f.route.remove(devices[i].index); err != nil {
			return err
		}
	}
	if t := f.taps[internetName]; t != nil {
		delete(f.taps, internetName)
		if err := t.unpin(); err != nil {
			return fmt.Errorf("unpin programs of the internet: %w", err)
		}
	}
	if !nl.ExistsNamed(name) {
		if err := nl.NewNamed(name); err != nil {
			return err
		}
	}
	index := f.nextIndex
	f.nextIndex++
	// Programs are attached to an ifindex of the thread's namespace.
	err := nl.Do(nl.Path(f.names.fabric()), func() error {
		ns, err := os.Open(nl.Path(name))
		if err != nil {
			return fmt.Errorf("open the internet: %w", err)
		}
		defer ns.Close()
		v := veth{name: internetName, index: index, peerName: "eth0", peerMAC: internetMAC, peerMTU: InternetMTU, peerNS: ns}
		if err := f.route.add(v); err != nil {
			return err
		}
		if err := f.attach(internetName, index, f.objs.FromInternet, f.objs.CutForInternet); err != nil {
			return err
		}
		return f.route.enable(index, internetName)
	})
	if err == nil {
		err = nl.Do(nl.Path(name), configureInternet)
	}
	if err != nil {
		return fmt.Errorf("make the internet: %w", err)
	}
	// Last: by it the next Set knows that it is whole.
	to := bpfgen.FabricTarget{Ifindex: uint32(index), Mac: [6]byte(internetMAC), Mtu: InternetMTU}
	if err := f.objs.Internet.Put(uint32(0), to); err != nil {
		return fmt.Errorf("make the internet: %w", err)
	}
	f.seen.internet = to
	f.log.Info("internet made", "netns", name)
	return nil
}

// configureInternet gives the internet's end its addresses. It asks nobody for a
// MAC: what it sends is routed by public address.
func configureInternet() error {
	// There is no IPv6 out there.
	if err := writeSysctl("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	route, err := dialRoute()
	if err != nil {
		return err
	}
	defer route.Close()
	devices, err := route.devices(false)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(devices, func(d deviceInfo) bool { return d.name == "eth0" })
	if i < 0 {
		return errors.New("configure eth0: it is not there any more")
	}
	index := devices[i].index
	errs := []error{route.up(index, unix.IFF_NOARP)}
	for _, a := range InternetAddrs {
		errs = append(errs, route.addAddress(index, a, unix.RT_SCOPE_UNIVERSE))
	}
	return errors.Join(append(errs, route.addDefault(index, netip.Addr{}, InternetAddrs[0].Addr()))...)
}

// Internet runs fn in the internet's namespace: what it listens on there,
// instances reach through their internet gateway. See nl.Do for what fn may do.
func (f *Fabric) Internet(fn func() error) error {
	return nl.Do(nl.Path(f.names.internet()), fn)
}
