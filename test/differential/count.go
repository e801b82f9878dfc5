package differential

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/underlay-cni/underlay/test/vpcmodel"
)

// Counts are packets by kind of rule and verdict.
type Counts map[string]struct{ Pass, Drop int }

func (c Counts) add(kind string, pass bool) {
	n := c[kind]
	if pass {
		n.Pass++
	} else {
		n.Drop++
	}
	c[kind] = n
}

// Add counts a verdict under the kinds of rule that let the packet pass, or the
// kind that dropped it.
func (c Counts) Add(v vpcmodel.Verdict) {
	family := ""
	if v.IPv6 {
		family = "v6 "
	}
	for _, r := range v.Rules {
		for _, kind := range kinds(r) {
			c.add(family+kind, true)
		}
	}
	if !v.Delivered() {
		for _, kind := range kinds(v.Rule) {
			c.add(family+kind, false)
		}
	}
}

// kinds splits the name of a rule: "in group cidr tcp" counts as "in group cidr"
// and as "in group tcp", "in acl allow tcp" as "in acl tcp".
func kinds(rule string) []string {
	words := strings.Fields(rule)
	switch {
	case len(words) == 4 && words[1] == "group":
		return []string{words[0] + " group " + words[2], words[0] + " group " + words[3]}
	case len(words) == 4 && words[1] == "acl":
		return []string{words[0] + " acl " + words[3]}
	case len(words) == 2 && words[1] == "cut":
		return []string{"cut"}
	default:
		return []string{rule}
	}
}

// wanted are the kinds of rule that a run must have tried in the verdicts that they
// can have: "+" pass, "-" drop.
func wanted(f Features) map[string]string {
	w := wantedOfFamily(f)
	if f.IPv6 {
		f.Internet, f.NAT = false, false // neither carries IPv6
		for kind, verdicts := range wantedOfFamily(f) {
			w["v6 "+kind] = verdicts
		}
		w["v6 neighbour discovery"] = "-"
		delete(w, "v6 service") // none is run
	}
	return w
}

func wantedOfFamily(f Features) map[string]string {
	w := map[string]string{
		"route local": "+-", "route same subnet": "+-", "route direct": "+-", "route none": "-",
		"source check": "-", "destination check": "-",
	}
	if !f.Tables {
		delete(w, "destination check") // only a route or a foreign MAC leads there
	}
	if f.Groups {
		for _, d := range []string{"in", "out"} {
			for _, kind := range []string{"cidr", "reference", "tcp", "udp", "icmp", "protocol", "all"} {
				w[d+" group "+kind] = "+-"
			}
			if f.Lists {
				w[d+" group list"] = "+-"
			}
			w[d+" flow"] = "+"
			w[d+" related"] = "+"
			w[d+" untracked"] = "+"
		}
		w["in group forwarded"] = "-"
		w["cut"] = "-"
	}
	if f.ACLs {
		for _, d := range []string{"in", "out"} {
			for _, kind := range []string{"tcp", "udp", "icmp", "protocol", "all"} {
				w[d+" acl "+kind] = "+-"
			}
			w[d+" acl *"] = "-"
		}
	}
	if f.Tables {
		for _, kind := range []string{"eni", "eni within local", "eni instead of local"} {
			w["route "+kind] = "+"
		}
		w["route link-local"] = "-"
	}
	if f.Tables && f.Peerings {
		w["route peering"] = "+-"
		w["route peering transit"] = "-"
	}
	if f.Internet {
		for _, kind := range []string{"igw out", "igw in", "route edge local", "route edge eni"} {
			w[kind] = "+"
		}
		for _, kind := range []string{"igw source", "igw destination", "igw nobody", "igw private source", "mtu igw"} {
			w[kind] = "-"
		}
		w["route igw"] = "+"
	}
	if f.Internet && f.NAT {
		w["nat out"], w["nat in"], w["route nat"] = "+", "+", "+-"
		w["nat unasked"], w["nat protocol"] = "-", "-"
	}
	if f.Fragments {
		w["fragment"] = "-"
	}
	if f.Exempt {
		w["service"] = "-"
	}
	return w
}

// Lacking lists the kinds of rule of which fewer than least packets had a verdict
// that they can have.
func (c Counts) Lacking(f Features, least int) (out []string) {
	for kind, verdicts := range wanted(f) {
		n := c[kind]
		if strings.Contains(verdicts, "+") && n.Pass < least {
			out = append(out, fmt.Sprintf("%s: %d passed", kind, n.Pass))
		}
		if strings.Contains(verdicts, "-") && n.Drop < least {
			out = append(out, fmt.Sprintf("%s: %d dropped", kind, n.Drop))
		}
	}
	return sorted(out)
}

// String is a table for people.
func (c Counts) String() string {
	var b strings.Builder
	for _, kind := range slices.Sorted(maps.Keys(c)) {
		fmt.Fprintf(&b, "%-34s %7d passed %7d dropped\n", kind, c[kind].Pass, c[kind].Drop)
	}
	return b.String()
}
