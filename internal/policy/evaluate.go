package policy

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
)

// Judgement is what Evaluate says of one gate: a Verdict with the rule's name.
type Judgement struct {
	Allow, Audit, Untracked bool
	Rule                    string
}

// Evaluate judges the first packet of a flow at one endpoint, by both gates: the
// reference that everything faster is compared with. It goes over the input as
// it stands, and is slow.
func Evaluate(in *Input, ep *Endpoint, dir Direction, f Flow) (out [Gates]Judgement) {
	f.Src, f.Dst = f.Src.Unmap(), f.Dst.Unmap()
	if f.FromHost && dir == Ingress {
		j := Judgement{Allow: true, Rule: "the node itself"}
		return [Gates]Judgement{j, j}
	}
	if f.Src == f.Dst {
		j := Judgement{Allow: true, Rule: "the pod itself"}
		return [Gates]Judgement{j, j}
	}
	remote := f.Src
	if dir == Egress {
		remote = f.Dst
	}
	out[Groups] = evaluateGroups(in, ep, dir, f, remote)
	out[Policies] = evaluatePolicies(in, ep, dir, f, remote)
	return out
}

func evaluateGroups(in *Input, ep *Endpoint, dir Direction, f Flow, remote netip.Addr) Judgement {
	if ep.Groups == "" {
		return Judgement{Allow: true, Rule: "no policy"}
	}
	result := Judgement{Allow: ep.AuditGroups, Audit: ep.AuditGroups, Rule: string(ep.Groups) + " " + dir.String() + ": no rule allows it"}
	open := false // by a rule for everybody
	found := false
	for _, e := range in.Exempt {
		if !found && e.Prefix.Contains(remote) {
			found = true
			result = Judgement{Allow: true, Rule: "exempt: " + e.Name}
		}
	}
	for _, id := range ep.Groups.Groups() {
		group := in.Groups[id]
		for _, r := range sortedRules(group, dir) {
			if !ruleIsAbout(r, f) {
				continue
			}
			if slices.ContainsFunc(rulePeers(in, r), func(p netip.Prefix) bool { return p.Contains(remote) }) {
				if !found {
					found = true
					result = Judgement{Allow: true, Rule: string(id) + " " + dir.String() + " " + r.ID}
				}
				if r.CIDR.IsValid() && r.CIDR.Bits() == 0 {
					open = true
				}
			}
		}
	}
	if open && (f.Protocol == TCP || f.Protocol == UDP) {
		// The other direction must let all ports of the protocol to everybody.
		for _, id := range ep.Groups.Groups() {
			for _, r := range sortedRules(in.Groups[id], 1-dir) {
				everybody := r.CIDR.IsValid() && r.CIDR.Bits() == 0 && r.CIDR.Addr().Is4() == remote.Is4()
				whole := r.Protocol == AnyProtocol ||
					Protocol(r.Protocol) == f.Protocol && (r.FromPort == AnyPort || r.FromPort == 0 && r.ToPort == 65535)
				if everybody && whole {
					result.Untracked = true
				}
			}
		}
	}
	return result
}

// sortedRules returns a direction's rules by ID: the first that matches is named.
func sortedRules(g SecurityGroup, dir Direction) []GroupRule {
	rules := g.Ingress
	if dir == Egress {
		rules = g.Egress
	}
	rules = slices.Clone(rules)
	slices.SortStableFunc(rules, func(a, b GroupRule) int { return cmp.Compare(a.ID, b.ID) })
	return rules
}

func ruleIsAbout(r GroupRule, f Flow) bool {
	if r.Protocol == AnyProtocol {
		return true
	}
	if r.Protocol != int(f.Protocol) {
		return false
	}
	switch f.Protocol {
	case TCP, UDP:
		return r.FromPort == AnyPort || int(f.DstPort) >= r.FromPort && int(f.DstPort) <= r.ToPort
	case ICMP, ICMPv6:
		return r.FromPort == AnyPort || int(f.ICMPType) == r.FromPort && (r.ToPort == AnyPort || int(f.ICMPCode) == r.ToPort)
	}
	return true
}

func rulePeers(in *Input, r GroupRule) []netip.Prefix {
	switch {
	case r.Group != "":
		return in.Members[r.Group]
	case r.PrefixList != "":
		return in.PrefixLists[r.PrefixList]
	}
	return []netip.Prefix{r.CIDR}
}

func evaluatePolicies(in *Input, ep *Endpoint, dir Direction, f Flow, remote netip.Addr) Judgement {
	var enforced, audited []NetworkPolicy
	for _, p := range in.Policies {
		if p.Namespace != ep.Namespace || !p.PodSelector.selects(ep.Labels) {
			continue
		}
		isolates := slices.Contains(p.Types, dir)
		if len(p.Types) == 0 {
			isolates = dir == Ingress || len(p.Egress) > 0
		}
		switch {
		case !isolates:
		case p.Audit:
			audited = append(audited, p)
		default:
			enforced = append(enforced, p)
		}
	}
	policies, audit := enforced, false
	if len(enforced) == 0 {
		policies, audit = audited, true
	}
	if len(policies) == 0 {
		return Judgement{Allow: true, Rule: "no policy"}
	}
	slices.SortStableFunc(policies, func(a, b NetworkPolicy) int { return cmp.Compare(a.Name, b.Name) })
	for _, p := range policies {
		rules := p.Ingress
		if dir == Egress {
			rules = p.Egress
		}
		for i, r := range rules {
			if peersInclude(in, p, r.Peers, remote) && portsInclude(in, ep, dir, r.Ports, f) {
				return Judgement{Allow: true, Rule: p.Namespace + "/" + p.Name + " " + dir.String() + "[" + itoa(i) + "]"}
			}
		}
	}
	names := make([]string, len(policies))
	for i, p := range policies {
		names[i] = p.Namespace + "/" + p.Name
	}
	return Judgement{Allow: audit, Audit: audit, Rule: strings.Join(names, ",") + " " + dir.String() + ": no rule allows it"}
}

func itoa(n int) string {
	if n < 10 {
		return string(rune('0' + n))
	}
	return itoa(n/10) + itoa(n%10)
}

func peersInclude(in *Input, p NetworkPolicy, peers []Peer, remote netip.Addr) bool {
	if len(peers) == 0 {
		return true
	}
	for _, peer := range peers {
		if b := peer.Block; b != nil {
			excepted := slices.ContainsFunc(b.Except, func(e netip.Prefix) bool { return e.Contains(remote) })
			if b.CIDR.Contains(remote) && !excepted {
				return true
			}
			continue
		}
		for _, pod := range in.Pods {
			if pod.HostNetwork || !slices.Contains(pod.Addrs, remote) {
				continue
			}
			there := pod.Namespace == p.Namespace
			if s := peer.NamespaceSelector; s != nil {
				labels, known := in.Namespaces[pod.Namespace]
				there = known && s.selects(labels)
			}
			if there && (peer.PodSelector == nil || peer.PodSelector.selects(pod.Labels)) {
				return true
			}
		}
	}
	return false
}

func portsInclude(in *Input, ep *Endpoint, dir Direction, ports []Port, f Flow) bool {
	if len(ports) == 0 {
		return true
	}
	for _, p := range ports {
		protocol := p.Protocol
		if protocol == 0 {
			protocol = TCP
		}
		if f.Protocol != protocol {
			continue
		}
		switch {
		case p.Name != "":
			receivers := []Pod{ep.Pod}
			if dir == Egress {
				receivers = slices.DeleteFunc(slices.Clone(in.Pods), func(pod Pod) bool {
					return pod.HostNetwork || !slices.Contains(pod.Addrs, f.Dst)
				})
			}
			for _, pod := range receivers {
				for _, n := range pod.Ports {
					if n.Name == p.Name && n.Protocol == protocol && n.Port == f.DstPort {
						return true
					}
				}
			}
		case p.Port == 0:
			return true
		case p.End == 0 && f.DstPort == p.Port:
			return true
		case p.End != 0 && f.DstPort >= p.Port && f.DstPort <= p.End:
			return true
		}
	}
	return false
}

func (s Selector) selects(labels map[string]string) bool {
	for k, v := range s.MatchLabels {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	for _, r := range s.Expressions {
		have, ok := labels[r.Key]
		switch r.Operator {
		case In:
			if !ok || !slices.Contains(r.Values, have) {
				return false
			}
		case NotIn:
			if ok && slices.Contains(r.Values, have) {
				return false
			}
		case Exists:
			if !ok {
				return false
			}
		case DoesNotExist:
			if ok {
				return false
			}
		default: // unknown to us: it cannot be said that it holds
			return false
		}
	}
	return true
}
