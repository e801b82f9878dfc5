package cli

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// What demos ask of flow records, in AWS's own format.
const (
	flowFields = "${interface-id} ${flow-direction} ${pkt-srcaddr} ${pkt-dstaddr} ${protocol} ${dstport} ${action}"
	ingress    = "ingress"
	egress     = "egress"
)

// flowLine is a line of that format.
type flowLine struct {
	eni, direction string
	src            netip.Addr
	dst            netip.AddrPort
	proto          int // of IANA
	action         string
}

func parseFlowLine(s string) (l flowLine, ok bool) {
	f := strings.Fields(s)
	if len(f) != 7 {
		return l, false
	}
	l.eni, l.direction, l.action = f[0], f[1], f[6]
	src, err1 := netip.ParseAddr(f[2])
	dst, err2 := netip.ParseAddr(f[3])
	proto, err3 := strconv.Atoi(f[4])
	port, err4 := strconv.ParseUint(f[5], 10, 16)
	l.src, l.dst, l.proto = src, netip.AddrPortFrom(dst, uint16(port)), proto
	return l, err1 == nil && err2 == nil && err3 == nil && err4 == nil
}

// flowFact shows flow records, each with the names of what is in it, and holds
// them against check.
func (d *demo) flowFact(ctx context.Context, fact, flags string, check func([]flowLine) string) {
	names, err := d.addressNames(ctx)
	if !d.step(ctx, "learn who has which interface", func() error { return err }) {
		return
	}
	d.comment = func(line string) string {
		l, ok := parseFlowLine(line)
		if !ok {
			return ""
		}
		return fmt.Sprintf("# at %s: %s to %s", names[l.eni], names[l.src.String()], names[l.dst.Addr().String()])
	}
	defer func() { d.comment = nil }()
	d.fact(ctx, fact, fmt.Sprintf("underlay flows%s --by vpc %s -o aws --format \\\n '%s' | sort -u", d.a.labFlag(), flags, flowFields), func(out string) string {
		var lines []flowLine
		for s := range strings.Lines(out) {
			l, ok := parseFlowLine(s)
			if !ok {
				return "not a flow record: " + strings.TrimSpace(s)
			}
			lines = append(lines, l)
		}
		return check(lines)
	})
}

// addressNames are the names of a lab's interfaces and addresses.
func (d *demo) addressNames(ctx context.Context) (map[string]string, error) {
	f, err := d.a.home().loadUp()
	if err != nil {
		return nil, err
	}
	names := map[string]string{}
	for a, name := range labNames(d.a.home(), f) {
		names[a.String()] = name
	}
	enis, err := labAPI(f).Interfaces(ctx, vpc.VPCID(f.Lab.VPCID))
	if err != nil {
		return nil, err
	}
	node := map[vpc.InstanceID]string{}
	for _, n := range f.Lab.Nodes {
		node[vpc.InstanceID(n.InstanceID)] = n.Name
	}
	for _, e := range enis {
		name := names[e.Primary.String()]
		if n := node[e.Instance]; n != "" {
			name = fmt.Sprintf("%s's eth%d", n, e.DeviceIndex)
		}
		names[string(e.ID)] = name
	}
	return names, nil
}

// since is the flag for records from a moment on.
func since(t time.Time) string { return "--since " + t.UTC().Format("2006-01-02T15:04:05.000Z07:00") }

// attempt is a connection that somebody tried, and where it is to be recorded.
type attempt struct {
	src       netip.Addr
	dst       netip.AddrPort
	eni       string
	direction string
	action    string
}

// recorded wants each attempt in the records, once at the interface that it
// names; and what is refused at no other.
func recorded(all ...attempt) func([]flowLine) string {
	return func(lines []flowLine) string {
		for _, a := range all {
			here := false
			for _, l := range lines {
				if l.src != a.src || l.dst != a.dst || l.action != a.action || l.proto != 6 {
					continue
				}
				if l.eni == a.eni && l.direction == a.direction {
					here = true
				} else if a.action == "REJECT" {
					return fmt.Sprintf("%s to %s was refused at %s, as %s", a.src, a.dst, l.eni, l.direction)
				}
			}
			if !here {
				return fmt.Sprintf("no %s of %s to %s at %s, %s", a.action, a.src, a.dst, a.eni, a.direction)
			}
		}
		return ""
	}
}

// bothLogs is the command that shows what the VPC and then the nodes count of each
// connection with an address at an interface, over all intervals.
func bothLogs(flag, eni string, with netip.Addr) string {
	return fmt.Sprintf("for by in vpc nodes; do echo \"by $by:\"; underlay flows%s --by $by --eni %s --address %s -o aws --format \\\n"+
		" '${pkt-srcaddr} ${pkt-dstaddr} ${srcport} ${dstport} ${packets} ${bytes}' |\n"+
		" awk '{k = $1 \" \" $2 \" \" $3 \" \" $4; p[k] += $5; b[k] += $6} END {for (k in p) print k, p[k], b[k]}' | sort; done", flag, eni, with)
}

// sameCounts wants both to have the same lines, and connections to each of these
// among them.
func sameCounts(to ...netip.AddrPort) func(string) string {
	return func(out string) string {
		vpc, nodes, ok := strings.Cut(strings.TrimPrefix(out, "by vpc:\n"), "by nodes:\n")
		vpc, nodes = strings.TrimSpace(vpc), strings.TrimSpace(nodes)
		if !ok || vpc != nodes {
			return "the two logs differ"
		}
		for _, a := range to {
			if !slices.ContainsFunc(strings.Split(vpc, "\n"), func(line string) bool {
				f := strings.Fields(line)
				return len(f) == 6 && f[1] == a.Addr().String() && f[3] == strconv.Itoa(int(a.Port()))
			}) {
				return fmt.Sprintf("no connection to %s is in them", a)
			}
		}
		return ""
	}
}

// tunnelOnly wants that two nodes talk VXLAN, both ways, and that there is no
// other record.
func tunnelOnly(a, b netip.Addr) func([]flowLine) string {
	return func(lines []flowLine) string {
		ways := map[netip.Addr]bool{}
		for _, l := range lines {
			ends := []netip.Addr{l.src, l.dst.Addr()}
			if l.proto != 17 || int(l.dst.Port()) != vxlanPort || !slices.Contains(ends, a) || !slices.Contains(ends, b) || l.action != "ACCEPT" {
				return fmt.Sprintf("more than the tunnel: %s to %s, protocol %d, %s", l.src, l.dst, l.proto, l.action)
			}
			ways[l.src] = true
		}
		if len(ways) != 2 {
			return "the tunnel is not there, both ways"
		}
		return ""
	}
}
