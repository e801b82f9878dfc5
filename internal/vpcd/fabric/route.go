package fabric

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// RouteTable is a route table. The longest route that matches wins.
type RouteTable struct {
	ID     vpc.RouteTableID
	Routes []Route // with those to the VPC's own blocks
}

// Route is one route. What is within the sender's own subnet follows none.
type Route struct {
	CIDR netip.Prefix
	// One of these, or none. Local delivers to whatever interface holds the
	// address, Peer does in the VPC of that number. Internet leads to the VPC's
	// internet gateway, which carries no IPv6 (nor does an egress-only one,
	// which is Internet too: both drop it under a reason of its own). ENI leads to an interface, whose address that of the
	// packet need not be. A route with none of them, or to an interface that is
	// not attached, drops what follows it.
	Local    bool
	Internet bool
	Peer     uint32
	ENI      vpc.ENIID
}

// targets is how many targets the route has.
func (r Route) targets() (n int) {
	for _, is := range []bool{r.Local, r.Internet, r.Peer != 0, r.ENI != ""} {
		if is {
			n++
		}
	}
	return n
}

// tableNumber is by which the programs know a route table: the last 16
// hexadecimal digits of its ID. check refuses two tables with one number.
func tableNumber(id vpc.RouteTableID) (uint64, error) {
	if err := vpc.CheckID("rtb", string(id)); err != nil {
		return 0, err
	}
	digits := strings.TrimPrefix(string(id), "rtb-")
	n, err := strconv.ParseUint(digits[max(0, len(digits)-16):], 16, 64)
	if err != nil {
		return 0, fmt.Errorf("read number of %s: %w", id, err)
	}
	if n == 0 {
		return 0, fmt.Errorf("route table %s has number 0, which means none", id)
	}
	return n, nil
}

// checkTables returns the routes of the tables that are valid, by number.
func checkTables(tables []RouteTable) (numbers map[vpc.RouteTableID]uint64, routes map[uint64][]Route, errs []error) {
	numbers, routes = map[vpc.RouteTableID]uint64{}, map[uint64][]Route{}
	for _, t := range tables {
		n, err := tableNumber(t.ID)
		if _, ok := routes[n]; err == nil && ok {
			err = errors.New("occurs twice, or has the same last 16 digits as another")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("route table %s: %w", t.ID, err))
			continue
		}
		numbers[t.ID], routes[n] = n, nil
		seen := map[netip.Prefix]bool{}
		for _, r := range t.Routes {
			switch {
			case !r.CIDR.IsValid():
				err = errors.New("is to nowhere")
			case seen[r.CIDR.Masked()]:
				err = errors.New("is to where another is")
			case r.targets() > 1:
				err = errors.New("has more than one target")
			default:
				seen[r.CIDR.Masked()] = true
				r.CIDR = r.CIDR.Masked()
				routes[n] = append(routes[n], r)
				continue
			}
			// Without it, a shorter route might be followed: nothing is.
			errs = append(errs, fmt.Errorf("route table %s: route %+v %w; the table is left out", t.ID, r, err))
			routes[n] = nil
			break
		}
	}
	return numbers, routes, errs
}

// routeKey is where a route stands in map routes, or routes6.
func routeKey(table uint64, to netip.Prefix) bpfgen.FabricRouteKey {
	bits := 64 + to.Bits() // 64 of table
	if to.Addr().Is4() {
		bits += 96 // of the mapping prefix ::ffff:0:0
	}
	return bpfgen.FabricRouteKey{Prefixlen: uint32(bits), Table: [2]uint32{uint32(table), uint32(table >> 32)}, Addr: to.Addr().As16()}
}
