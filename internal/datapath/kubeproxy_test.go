package datapath

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// service is a Service with one endpoint, as kube-proxy has it on a node.
type service struct {
	name     string
	proto    string // tcp or udp
	vip      netip.AddrPort
	nodePort int // 0: none
	endpoint netip.AddrPort
}

// proxy writes services into a node's netfilter as kube-proxy does in one of
// its modes, with --cluster-cidr of the pods' addresses.
type proxy struct {
	mode string
	set  func(f *fleet, node string, nodeIPs []netip.Addr, services []service)
}

var proxies = []proxy{{"iptables", iptablesProxy}, {"nftables", nftablesProxy}}

// iptablesProxy: nat with KUBE-SERVICES at PREROUTING and OUTPUT, a chain per
// Service, endpoint and outside; the mark 0x4000 asks KUBE-POSTROUTING to
// masquerade. The filter table drops what conntrack takes for invalid.
func iptablesProxy(f *fleet, node string, _ []netip.Addr, services []service) {
	f.t.Helper()
	var chains, rules strings.Builder
	chain := func(names ...string) {
		for _, n := range names {
			fmt.Fprintf(&chains, ":%s - [0:0]\n", n)
		}
	}
	rule := func(format string, args ...any) { fmt.Fprintf(&rules, "-A "+format+"\n", args...) }
	chain("KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ")
	rule("PREROUTING -j KUBE-SERVICES")
	rule("OUTPUT -j KUBE-SERVICES")
	rule("POSTROUTING -j KUBE-POSTROUTING")
	rule("KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN")
	rule("KUBE-POSTROUTING -j MARK --xor-mark 0x4000")
	rule("KUBE-POSTROUTING -j MASQUERADE --random-fully")
	rule("KUBE-MARK-MASQ -j MARK --or-mark 0x4000")
	for _, s := range services {
		svc, sep, ext := "KUBE-SVC-"+s.name, "KUBE-SEP-"+s.name, "KUBE-EXT-"+s.name
		chain(svc, sep)
		rule("KUBE-SERVICES -d %s/32 -p %s -m %s --dport %d -j %s", s.vip.Addr(), s.proto, s.proto, s.vip.Port(), svc)
		rule("%s ! -s %s -d %s/32 -p %s -m %s --dport %d -j KUBE-MARK-MASQ", svc, fleetVPC, s.vip.Addr(), s.proto, s.proto, s.vip.Port())
		rule("%s -j %s", svc, sep)
		rule("%s -s %s/32 -j KUBE-MARK-MASQ", sep, s.endpoint.Addr()) // hairpin
		rule("%s -p %s -m %s -j DNAT --to-destination %s", sep, s.proto, s.proto, s.endpoint)
		if s.nodePort != 0 {
			chain(ext)
			rule("KUBE-NODEPORTS -p %s -m %s --dport %d -j %s", s.proto, s.proto, s.nodePort, ext)
			rule("%s -j KUBE-MARK-MASQ", ext)
			rule("%s -j %s", ext, svc)
		}
	}
	rule("KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS")
	f.load(node, "*nat\n"+chains.String()+rules.String()+"COMMIT\n"+
		"*filter\n:KUBE-FORWARD - [0:0]\n-A FORWARD -j KUBE-FORWARD\n"+
		"-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n"+
		"-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n"+
		"-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\nCOMMIT\n", "iptables-restore")
}

// nftablesProxy: a table of its own, Services and ports of the node in verdict
// maps, the node's addresses in a set.
func nftablesProxy(f *fleet, node string, nodeIPs []netip.Addr, services []service) {
	f.t.Helper()
	var chains strings.Builder
	var vips, ports, ips []string
	for _, ip := range nodeIPs {
		ips = append(ips, ip.String())
	}
	for _, s := range services {
		fmt.Fprintf(&chains, "chain endpoint-%s { ip saddr %s jump mark-for-masquerade; meta l4proto %s dnat to %s; }\n", s.name, s.endpoint.Addr(), s.proto, s.endpoint)
		fmt.Fprintf(&chains, "chain service-%s { ip daddr %s %s dport %d ip saddr != %s jump mark-for-masquerade; numgen random mod 1 vmap { 0 : goto endpoint-%s }; }\n",
			s.name, s.vip.Addr(), s.proto, s.vip.Port(), fleetVPC, s.name)
		vips = append(vips, fmt.Sprintf("%s . %s . %d : goto service-%s", s.vip.Addr(), s.proto, s.vip.Port(), s.name))
		if s.nodePort != 0 {
			fmt.Fprintf(&chains, "chain external-%s { jump mark-for-masquerade; goto service-%s; }\n", s.name, s.name)
			ports = append(ports, fmt.Sprintf("%s . %d : goto external-%s", s.proto, s.nodePort, s.name))
		}
	}
	f.nft(node, fmt.Sprintf(`table ip kube-proxy {
	set nodeport-ips { type ipv4_addr; elements = { %s }; }
	chain mark-for-masquerade { meta mark set meta mark or 0x4000; }
	chain masquerading { meta mark and 0x4000 == 0 return; meta mark set meta mark xor 0x4000; masquerade fully-random; }
	%s
	map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; elements = { %s }; }
	map service-nodeports { type inet_proto . inet_service : verdict; elements = { %s }; }
	chain services {
		ip daddr . meta l4proto . th dport vmap @service-ips
		ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
	}
	chain filter-forward { type filter hook forward priority -110; ct state invalid drop; }
	chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
	chain nat-output { type nat hook output priority -100; jump services; }
	chain nat-postrouting { type nat hook postrouting priority srcnat; jump masquerading; }
}`, strings.Join(ips, ", "), chains.String(), strings.Join(vips, ", "), strings.Join(ports, ", ")))
}

// eachWay runs a test for each way that pods' packets may go and each mode of
// kube-proxy, two at a time: much of it is waiting for refusals.
func eachWay(t *testing.T, run func(t *testing.T, w way, p proxy)) {
	for _, w := range ways {
		for _, p := range proxies {
			t.Run(w.name+"/kube-proxy "+p.mode, func(t *testing.T) {
				t.Parallel()
				run(t, w, p)
			})
		}
	}
}
