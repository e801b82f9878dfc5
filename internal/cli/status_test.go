package cli

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/agentapi"
)

func aStatus(t *testing.T) *status {
	_, f := aLab(t)
	now := aDay.Add(3*time.Minute + 12*time.Second)
	return &status{
		Lab: f.Lab, Created: aDay, InstanceType: "m5.large", VPCD: serviceStatus{Healthy: true, PID: 100},
		NodeStatus: []nodeStatus{{
			Name: "node-1", Zone: "us-east-1a", Agent: serviceStatus{Healthy: true, PID: 200}, Addresses: addressCounts{InUse: 2, Free: 1, Cooling: 1},
			Inspect: &agentapi.Inspection{
				Limits:     agentapi.Limits{ENIs: 3, IPv4PerENI: 10, Addresses: 27, MaxPods: 29},
				ENIs:       []agentapi.ENI{{ID: "eni-00000000000000001", IfName: "eth0"}},
				Endpoints:  []agentapi.Endpoint{{State: "live"}, {State: "live"}, {State: tombstone}},
				Counters:   agentapi.Counters{Drops: map[string]uint64{"spoofed_source": 3, "no_mark": 0}},
				LastErrors: []agentapi.Incident{{Time: now.Add(-30 * time.Second), Op: "assign", Message: "InsufficientFreeAddressesInSubnet: the subnet is full", Count: 4}},
			},
		}, {
			Name: "node-2", Zone: "us-east-1b", Agent: serviceStatus{Error: "the agent does not answer: dial unix …: connection refused"},
		}},
		Interfaces: []interfaceStatus{
			{ID: "eni-00000000000000003", Machine: "db-1", MAC: "02:00:00:00:00:03", Primary: "10.0.16.11", Attached: true},
			{ID: "eni-00000000000000001", Machine: "node-1", IfName: "eth0", MAC: "02:00:00:00:00:01", Primary: "10.0.0.10", Secondary: []string{"10.0.0.20", "10.0.0.21", "10.0.0.22", "10.0.0.23"}, Prefixes: []string{"10.0.1.0/28"}, Attached: true},
			{ID: "eni-00000000000000004", Machine: "node-1", Device: 1, MAC: "02:00:00:00:00:04", Primary: "10.0.0.12"},
		},
		Pods: []podStatus{
			{Name: "web-1", Node: "node-1", IP: "10.0.0.20", ENI: "eni-00000000000000001", MAC: "02:00:00:00:00:20", State: "live", Since: now.Add(-65 * time.Second)},
			{Name: "web-2", Node: "node-1", IP: "10.0.0.21", ENI: "eni-00000000000000001", MAC: "02:00:00:00:00:21", State: "adding", Since: now, Problem: "EC2 no longer lists the address"},
		},
	}
}

func TestStatusTable(t *testing.T) {
	s := aStatus(t)
	now := aDay.Add(3*time.Minute + 12*time.Second)
	var b strings.Builder
	s.write(&b, false, now)
	golden(t, "status.txt", b.String())

	b.Reset()
	s.write(&b, true, now)
	if !strings.Contains(b.String(), "\x1b[32mwell\x1b[0m") || !strings.Contains(b.String(), "\x1b[31mill\x1b[0m") {
		t.Error("no colour where it is welcome")
	}
	if got := s.ill(); len(got) != 1 || got[0] != "the agent of node-2" {
		t.Errorf("ill = %q", got)
	}
}

func TestStatusOfAnEmptyLab(t *testing.T) {
	_, f := aLab(t)
	s := &status{Lab: f.Lab, Created: aDay, VPCD: serviceStatus{Error: "connection refused"}, NodeStatus: []nodeStatus{{Name: "node-1"}, {Name: "node-2"}}}
	var b strings.Builder
	s.write(&b, false, aDay)
	golden(t, "status-empty.txt", b.String())
}

func TestTableLeavesOutEmptyColumns(t *testing.T) {
	var tab table
	tab.head = []string{"A", "EMPTY", "NUMBER", "TEXT"}
	tab.row(text("é"), cell{}, number(7), text("x"))
	tab.row(text("long"), cell{}, number(1234), cell{})
	var b strings.Builder
	tab.write(&b, "  ", false)
	want := "  A     NUMBER  TEXT\n  é          7  x\n  long    1234\n"
	if b.String() != want {
		t.Errorf("got:\n%s\nwant:\n%s", b.String(), want)
	}
}

func TestRuleSource(t *testing.T) {
	read := aDay.Add(-400 * time.Millisecond)
	for want, p := range map[string]agentapi.GroupPolicy{
		"7 rules of 3 security groups, from the poller, as EC2 had them 0.4 s ago":          {Groups: 3, Rules: 7, Source: agentapi.SourcePoller, Read: &read},
		"7 rules of 3 security groups, read by the agent itself, as EC2 had them 0.4 s ago": {Groups: 3, Rules: 7, Source: agentapi.SourceOwn, Read: &read},
		"0 rules of 1 security groups, from the poller, not read yet":                       {Groups: 1, Source: agentapi.SourcePoller},
	} {
		if got := ruleSource(&p, aDay); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestAge(t *testing.T) {
	for d, want := range map[time.Duration]string{0: "0s", 59 * time.Second: "59s", 61 * time.Second: "1m01s", 3*time.Hour + 5*time.Minute: "3h05m", 72 * time.Hour: "3d"} {
		if got := age(d); got != want {
			t.Errorf("age(%v) = %s, want %s", d, got, want)
		}
	}
}

func TestNotEncapsulated(t *testing.T) {
	a, b := netip.MustParseAddr("10.0.0.21"), netip.MustParseAddr("10.0.16.21")
	const request = "12:00:00.000001 02:00:00:00:00:01 > 02:00:00:00:00:02, ethertype IPv4 (0x0800), length 98: 10.0.0.21 > 10.0.16.21: ICMP echo request, id 1, seq 1, length 64\n"
	const reply = "12:00:00.000002 02:00:00:00:00:02 > 02:00:00:00:00:01, ethertype IPv4 (0x0800), length 98: 10.0.16.21 > 10.0.0.21: ICMP echo reply, id 1, seq 1, length 64\n"
	const vxlan = "12:00:00.000003 02:00:00:00:00:02 > 02:00:00:00:00:01, ethertype IPv4 (0x0800), length 148: 10.0.0.10.4000 > 10.0.16.10.8472: OTV, flags [I] (0x08), overlay 0, instance 1\n"
	for name, c := range map[string]struct {
		out string
		ok  bool
	}{
		"plain":      {request + reply, true},
		"one way":    {request, false},
		"nothing":    {"", false},
		"tunnel":     {request + reply + vxlan, false},
		"node's own": {strings.ReplaceAll(request+reply, "10.0.0.21", "10.0.0.10"), false},
		"tagged":     {strings.Replace(request, "IPv4 (0x0800)", "802.1Q (0x8100)", 1) + reply, false},
	} {
		if why := notEncapsulated(a, b)(c.out); (why == "") != c.ok {
			t.Errorf("%s: %q", name, why)
		}
	}
}
