package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/test/lab"
)

// One poller reads security groups for the nodes of a lab: what EC2 shows is in
// the kernel within a second; without it nodes keep what they know and then read
// themselves; with a new one they follow again.
func TestOnePollerForTheLab(t *testing.T) {
	l := lab.Up(t, "--nodes", "2", "--instance-type", "t3.medium", "--iam-policy", nodePolicy)
	w := &tiers{t: t, l: l, netns: map[string]string{}, at: map[string]netip.AddrPort{}, groups: map[string]string{}}
	web, app := w.group("web"), w.group("app")
	one := l.Nodes[0]
	w.pod("web-1", one.Name, "web")
	w.pod("app-1", one.Name, "app")
	w.pod("app-2", l.Nodes[1].Name, "app")

	source := func(want string) {
		t.Helper()
		lab.Eventually(t, 30*time.Second, "both nodes have their rules from "+want, func() error {
			for _, n := range l.Nodes {
				p := l.Inspect(n).Policy
				if p == nil || p.Source != want || p.Groups == 0 || p.Rules == 0 || p.Read == nil || (p.PollerError == "") != (want == agentapi.SourcePoller) {
					return fmt.Errorf("%s: %+v", n.Name, p)
				}
			}
			return nil
		})
	}
	// change lets web in, or no longer, and waits until the node does as EC2 says.
	change := func(verb string) {
		t.Helper()
		began := time.Now()
		if err := l.Call(verb+"SecurityGroupIngress", map[string]string{"GroupId": app, "IpPermissions.1.IpProtocol": "tcp", "IpPermissions.1.FromPort": "8080", "IpPermissions.1.ToPort": "8081", "IpPermissions.1.Groups.1.GroupId": web}, new(struct{})); err != nil {
			t.Fatal(err)
		}
		shown := time.Now() // by then at the latest
		lab.Eventually(t, 10*time.Second, verb+" has its effect on node-1", func() error {
			if err := w.connect("web-1", "app-1", 100*time.Millisecond); (err == nil) != (verb == "Authorize") {
				return fmt.Errorf("web-1 to app-1: %w", err)
			}
			return nil
		})
		t.Logf("%s: in the kernel %s after it was asked for, %s after EC2 said so", verb, time.Since(began).Round(10*time.Millisecond), time.Since(shown).Round(10*time.Millisecond))
	}
	source(agentapi.SourcePoller)
	for range 3 {
		change("Authorize")
		change("Revoke")
	}
	if out := l.Underlay("status"); !strings.Contains(out, "security groups, from the poller, as EC2 had them") {
		t.Errorf("status:\n%s", out)
	}

	// It dies. Nobody forgets anything, and a change comes by the agents' own reads.
	l.Kill("underlay-poller", "--listen")
	if p := l.Inspect(one).Policy; p.Rules == 0 {
		t.Errorf("a moment after: %+v", p)
	}
	source(agentapi.SourceOwn)
	change("Authorize")
	out, errOut, code := l.Try("status")
	if code == 0 || !strings.Contains(out, "underlay poller restart") || !strings.Contains(errOut, "the poller") || !strings.Contains(out, "read by the agent itself") {
		t.Errorf("status: exit %d\n%s%s", code, out, errOut)
	}
	l.Underlay("poller", "restart")
	source(agentapi.SourcePoller)
	change("Revoke")

	// The next agent follows, too, and its pod's first packet is judged.
	l.Underlay("node", "restart-agent", one.Name)
	w.pod("web-2", one.Name, "web")
	if w.connect("web-2", "app-1", 150*time.Millisecond) == nil {
		t.Error("web-2 reaches app-1")
	}
	source(agentapi.SourcePoller)

	// EC2 throttles: the nodes stay with the poller, and know why nothing is new.
	l.Underlay("vpcd", "chaos", "set", "--", "--fail", "DescribeSecurityGroupRules=RequestLimitExceeded:1000000")
	lab.Eventually(t, 20*time.Second, "the nodes are told of the throttling", func() error {
		for _, n := range l.Nodes {
			if p := l.Inspect(n).Policy; p.Source != agentapi.SourcePoller || !strings.Contains(p.Error, "RequestLimitExceeded") || p.Rules == 0 {
				return fmt.Errorf("%s: %+v", n.Name, p)
			}
		}
		return nil
	})
	l.Underlay("vpcd", "chaos", "reset")
	lab.Eventually(t, 60*time.Second, "it is over", func() error {
		if p := l.Inspect(one).Policy; p.Error != "" {
			return errors.New(p.Error)
		}
		return nil
	})
}
