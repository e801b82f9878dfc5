package cli

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/agentapi"
)

// ownGroups returns the security groups of a pod that has others than its node.
func ownGroups(in *agentapi.Inspection, e agentapi.Endpoint) []string {
	if e.GroupsMode == agentapi.GroupsHost {
		return append(slices.Clone(e.Groups), "("+agentapi.GroupsHost+")")
	}
	for _, set := range in.Sets {
		if !set.Node && slices.Equal(set.Groups, e.Groups) {
			return e.Groups
		}
	}
	return nil
}

// ruleSource says where a node has the rules of security groups from, and how old
// they are.
func ruleSource(p *agentapi.GroupPolicy, now time.Time) string {
	from := "read by the agent itself"
	if p.Source == agentapi.SourcePoller {
		from = "from the poller"
	}
	old := "not read yet"
	if p.Read != nil {
		old = fmt.Sprintf("as EC2 had them %.1f s ago", max(0, now.Sub(*p.Read).Seconds()))
	}
	return fmt.Sprintf("%d rules of %d security groups, %s, %s", p.Rules, p.Groups, from, old)
}

// setTable shows the nodes' sets of security groups, if there is one beside the
// nodes' own.
func (s *status) setTable(w io.Writer, color bool, now time.Time) {
	for _, n := range s.NodeStatus {
		if n.Inspect == nil || n.Inspect.Policy == nil {
			continue
		}
		p := n.Inspect.Policy
		if p.Host > 0 {
			fmt.Fprintf(w, "\n%s: security groups of %d pods are judged by the node alone (host): to the VPC they have the node's groups\n", n.Name, p.Host)
		}
		if p.Groups > 0 {
			fmt.Fprintf(w, "\n%s: %s\n", n.Name, ruleSource(p, now))
		}
		if p.PollerError != "" && p.Groups > 0 {
			fmt.Fprintf(w, "\n%s: %s\n", n.Name, paint(p.PollerError, bad, color))
		}
		if p.Error != "" {
			fmt.Fprintf(w, "\n%s: %s\n", n.Name, paint("the rules of security groups cannot be read: "+p.Error, bad, color))
		}
	}
	t := table{head: []string{"SECURITY GROUPS", "NODE", "ENIS", "PODS", "FREE", "COOLING", "WAITING", ""}}
	any := false
	for _, n := range s.NodeStatus {
		if n.Inspect == nil {
			continue
		}
		for _, set := range n.Inspect.Sets {
			what := cell{text: strings.Join(set.Groups, " "), tone: strong}
			if set.Node {
				what = text("the node's own")
			}
			any = any || !set.Node
			note, waiting := cell{}, cell{}
			switch {
			case set.Drifted > 0:
				note = cell{text: fmt.Sprintf("somebody changed the groups of %d", set.Drifted), tone: bad}
			case set.Until != nil && set.InUse == 0:
				note = textf("idle, goes back in %s", age(max(0, set.Until.Sub(now))))
			}
			if set.Waiting > 0 {
				waiting = cell{text: fmt.Sprint(set.Waiting), tone: bad, right: true}
			}
			t.row(what, text(n.Name), number(set.ENIs), number(set.InUse), number(set.Free), number(set.Cooling), waiting, note)
		}
		t.row(cell{text: "room for further sets", tone: dim}, text(n.Name), number(n.Inspect.SetsLeft))
	}
	if any {
		fmt.Fprintln(w)
		t.write(w, "", color)
	}
}
