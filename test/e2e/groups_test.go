package e2e

import (
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/test/lab"
)

const tierPort = 8080

// tiers are pods of three tiers on a lab of small nodes.
type tiers struct {
	t      *testing.T
	l      *lab.Lab
	netns  map[string]string // of pods
	at     map[string]netip.AddrPort
	groups map[string]string // IDs by name
}

// group makes a security group with the AWS CLI.
func (w *tiers) group(name string) string {
	w.t.Helper()
	var out struct{ GroupId string }
	w.l.AWS(&out, "ec2", "create-security-group", "--group-name", name, "--description", "a tier", "--vpc-id", w.l.VPCID)
	w.groups[name] = out.GroupId
	return out.GroupId
}

// allow lets a group's members in, or no longer, with the AWS CLI.
func (w *tiers) allow(verb, group, from, ports string) {
	w.t.Helper()
	var out struct{ Return bool }
	w.l.AWS(&out, "ec2", verb+"-security-group-ingress", "--group-id", group, "--protocol", "tcp", "--port", ports, "--source-group", from)
	if !out.Return {
		w.t.Fatalf("%s %s from %s: not done", verb, group, from)
	}
}

func (w *tiers) pod(name, node string, groups ...string) {
	w.t.Helper()
	if len(groups) > 0 {
		w.podWith(name, node, "--security-groups", strings.Join(groups, ","))
		return
	}
	w.podWith(name, node)
}

func (w *tiers) podWith(name, node string, flags ...string) {
	w.t.Helper()
	p := w.l.Run(name, append([]string{"--node", node}, flags...)...)
	w.netns[name], w.at[name] = p.Netns, netip.AddrPortFrom(p.IP, tierPort)
	lab.ServeTCP(w.t, p.Netns, w.at[name])
}

// connect tries a connection within a time.
func (w *tiers) connect(from, to string, limit time.Duration) error {
	return lab.Try(w.netns[from], func() error {
		c, err := net.DialTimeout("tcp4", w.at[to].String(), limit)
		if err == nil {
			c.Close()
		}
		return err
	})
}

// expect tries each pair: who may reaches the other, and nobody else does.
func (w *tiers) expect(allowed ...string) {
	w.t.Helper()
	for from := range w.netns {
		for to := range w.at {
			if from == to {
				continue
			}
			pair := from + " " + to
			if slices.Contains(allowed, pair) {
				if err := w.connect(from, to, 5*time.Second); err != nil {
					w.t.Errorf("%s: %v, want it to work", pair, err)
				}
				continue
			}
			err := w.connect(from, to, 150*time.Millisecond)
			var late net.Error
			switch {
			case err == nil:
				w.t.Errorf("%s works, and is forbidden", pair)
			case !errors.As(err, &late) || !late.Timeout(): // a security group is silent
				w.t.Errorf("%s: %v, want silence", pair, err)
			}
		}
	}
}

func (w *tiers) dropped(node lab.Node) uint64 {
	w.t.Helper()
	return w.l.Inspect(node).Counters.Drops["policy_groups"]
}

// tierPorts are those of the tiers' servers, and of what is held.
const tierPorts = "8080-8081"

// Three tiers on nodes that have no trunk interfaces, and a database outside of
// the cluster that lets one tier in: what is allowed works, and nothing else,
// between pods of one node by the node's programs and everywhere else by the
// VPC. With the permissions that the documented policy gives, and no more.
func TestTiersWithSecurityGroups(t *testing.T) {
	l := lab.Up(t, "--nodes", "2", "--instance-type", "t3.medium", "--iam-policy", nodePolicy,
		"--agent-arg=--security-groups-linger=1s", "--agent-env=IP_COOLDOWN_PERIOD=1")
	w := &tiers{t: t, l: l, netns: map[string]string{}, at: map[string]netip.AddrPort{}, groups: map[string]string{}}
	web, app := w.group("web"), w.group("app")
	w.allow("authorize", app, web, tierPorts)
	db := netip.AddrPortFrom(l.OutsideIP("db-1"), 5432)
	dbGroups := groupsOf(t, l, db.Addr())
	w.allow("revoke", dbGroups[0], groupsOf(t, l, l.Nodes[0].IP)[0], "5432")
	w.allow("authorize", dbGroups[0], app, "5432")

	one, two := l.Nodes[0], l.Nodes[1]
	w.pod("web-1", one.Name, "web")
	w.pod("app-1", one.Name, app)
	w.pod("app-2", two.Name, "app")
	w.pod("web-2", two.Name, web)
	w.pod("plain-1", one.Name)
	w.at["db"] = db
	// The node's own groups let all of the VPC in, and the tiers' let them out.
	open := []string{"web-1 plain-1", "web-2 plain-1", "app-1 plain-1", "app-2 plain-1"}
	allowed := append([]string{"web-1 app-1", "web-1 app-2", "web-2 app-1", "web-2 app-2", "app-1 db", "app-2 db"}, open...)
	before := w.dropped(one)
	w.expect(allowed...)
	// On node-1 that is app-1 to web-1, and plain-1 to both, of which each sends a
	// SYN at least.
	if n := w.dropped(one) - before; n < 3 {
		t.Errorf("node-1 dropped %d packets for security groups", n)
	}
	for _, n := range l.Nodes {
		in := l.Inspect(n)
		if in.Policy == nil || in.Policy.Mode != "vpc" || in.Policy.Judged == 0 || in.Policy.Error != "" || in.SetsLeft != 0 || len(in.Sets) != 3 {
			t.Errorf("%s: %+v, %d sets left of %+v", n.Name, in.Policy, in.SetsLeft, in.Sets)
		}
	}

	// A rule is revoked: new connections are refused, on one node and across, and
	// those that are tracked go on, as in a VPC.
	held := map[string]*lab.Held{}
	for _, to := range []string{"app-1", "app-2"} {
		at := netip.AddrPortFrom(w.at[to].Addr(), tierPort+1)
		held["web-1 "+to] = lab.Hold(t, "web-1 "+to, w.netns["web-1"], at, lab.Listen(t, w.netns[to], at))
	}
	w.allow("revoke", app, web, tierPorts)
	lab.Eventually(t, 10*time.Second, "the revoked rule has its effect on node-1", func() error {
		if w.connect("web-1", "app-1", 250*time.Millisecond) == nil {
			return errors.New("web-1 reaches app-1")
		}
		return nil
	})
	w.expect(append([]string{"app-1 db", "app-2 db"}, open...)...)
	for pair, h := range held {
		h.More(10)
		if err := h.Check(); err != nil {
			t.Errorf("%s: %v", pair, err)
		}
	}
	w.allow("authorize", app, web, tierPorts)
	lab.Eventually(t, 10*time.Second, "the new rule has its effect on node-1", func() error { return w.connect("web-1", "app-1", time.Second) })

	// The agent dies: the programs judge on, and the next one finds everything.
	l.Underlay("node", "restart-agent", one.Name)
	w.expect(allowed...)
	if in := l.Inspect(one); len(in.Sets) != 3 || in.SetsLeft != 0 {
		t.Errorf("after a restart: %d sets left of %+v", in.SetsLeft, in.Sets)
	}

	// A third set has no interface on node-1: its pod waits, and has the one that
	// a set without pods gives back.
	w.group("batch")
	type ran struct {
		out, err string
		code     int
	}
	done := make(chan ran, 1)
	go func() {
		out, err, code := l.Try("run", "batch-1", "--node", one.Name, "--security-groups", "batch", "-o", "json")
		done <- ran{out, err, code}
	}()
	lab.Eventually(t, 10*time.Second, "the third set's pod waits", func() error {
		for _, s := range l.Inspect(one).Sets {
			if slices.Equal(s.Groups, []string{w.groups["batch"]}) && s.Waiting == 1 {
				return nil
			}
		}
		return errors.New("it does not")
	})
	l.Underlay("rm", "web-1")
	r := <-done
	var batch lab.Pod
	if err := json.Unmarshal([]byte(r.out), &batch); r.code != 0 || err != nil {
		t.Fatalf("the third set's pod: exit %d, %v\n%s%s", r.code, err, r.out, r.err)
	}
	if groups := groupsOf(t, l, batch.IP); !slices.Equal(groups, []string{w.groups["batch"]}) {
		t.Errorf("batch-1 is on an interface of %v", groups)
	}
}

// groupsOf returns the security groups of the interface that has an address.
func groupsOf(t *testing.T, l *lab.Lab, addr netip.Addr) []string {
	t.Helper()
	var out struct {
		NetworkInterfaces []struct{ Groups []struct{ GroupId string } }
	}
	l.AWS(&out, "ec2", "describe-network-interfaces", "--filters", "Name=addresses.private-ip-address,Values="+addr.String())
	if len(out.NetworkInterfaces) != 1 {
		t.Fatalf("%d interfaces have %s", len(out.NetworkInterfaces), addr)
	}
	var groups []string
	for _, g := range out.NetworkInterfaces[0].Groups {
		groups = append(groups, g.GroupId)
	}
	return groups
}

// What cannot be is refused before anything is made.
func TestGroupsThatAreRefused(t *testing.T) {
	l := lab.Up(t, "--nodes", "1")
	writes := l.Writes()
	for groups, says := range map[string]string{
		"nobody":                  "EC2 knows no security group nobody in " + l.VPCID,
		"sg-0123456789abcdef0":    "EC2 knows no security group sg-0123456789abcdef0",
		"a;b":                     "by its ID",
		"default,a,b,c,d,e,f,g,h": "EC2 knows no security group a in",
	} {
		_, errOut, code := l.Try("run", "p", "--security-groups", groups)
		if code == 0 || !strings.Contains(errOut, says) {
			t.Errorf("%s: exit %d, %s", groups, code, errOut)
		}
	}
	if n := l.Writes() - writes; n != 0 {
		t.Errorf("%d calls that change something", n)
	}
	if len(l.Pods()) != 0 {
		t.Errorf("pods are left: %v", l.Pods())
	}
}

// In mode host the node alone judges by a pod's groups, whoever is at the other
// end; to the VPC the pod has the node's. Status says so.
func TestGroupsJudgedByTheHostAlone(t *testing.T) {
	l := lab.Up(t, "--nodes", "2", "--iam-policy", nodePolicy)
	w := &tiers{t: t, l: l, netns: map[string]string{}, at: map[string]netip.AddrPort{}, groups: map[string]string{}}
	caged := w.group("caged")
	w.allow("authorize", caged, groupsOf(t, l, l.OutsideIP("vm-1"))[0], tierPorts)
	one, two := l.Nodes[0], l.Nodes[1]
	p := l.Run("cage", "--node", one.Name, "--security-groups", "caged", "--security-groups-mode", "host")
	w.at["cage"] = netip.AddrPortFrom(p.IP, tierPort)
	lab.ServeTCP(t, p.Netns, w.at["cage"])
	for _, o := range l.Outside {
		if o.Name == "vm-1" {
			w.netns["vm-1"] = o.Netns
		}
	}
	w.pod("near", one.Name)
	w.pod("far", two.Name)
	before := w.dropped(one)
	w.expect("vm-1 cage", "vm-1 near", "vm-1 far", "near far", "far near")
	if n := w.dropped(one) - before; n < 2 {
		t.Errorf("the node dropped %d packets for security groups", n)
	}
	if groups := groupsOf(t, l, p.IP); slices.Contains(groups, caged) {
		t.Errorf("to the VPC the pod has %v", groups)
	}
	in := l.Inspect(one)
	if in.Policy.Host != 1 || in.SetsLeft != 2 {
		t.Errorf("status %+v, %d sets left", in.Policy, in.SetsLeft)
	}
	out := l.Underlay("status")
	if !strings.Contains(out, caged+" (host)") || !strings.Contains(out, "judged by the node alone (host)") {
		t.Errorf("status is silent about it:\n%s", out)
	}
	l.Underlay("node", "restart-agent", one.Name)
	w.expect("vm-1 cage", "vm-1 near", "vm-1 far", "near far", "far near")
}
