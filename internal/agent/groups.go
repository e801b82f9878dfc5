package agent

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/datapath"
	"github.com/underlay-cni/underlay/internal/ec2"
	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

const (
	// groupFor is how long a group that EC2 listed is not asked for again: a
	// name leads to another group only after somebody deleted one and made one.
	groupFor = time.Minute
	// noGroupFor is the same for one that EC2 did not list: a runtime tries
	// again every few seconds, with many pods at once.
	noGroupFor = time.Second
)

// groupBook knows security groups by ID and by name. One question to EC2 is
// asked at a time, so that many pods of one set cost one call.
type groupBook struct {
	turn chan struct{} // holds a value while somebody asks

	mu    sync.Mutex
	known map[string]knownGroup // by what was asked for
}

type knownGroup struct {
	group vpc.SecurityGroup // ID "": there is none
	until time.Time
}

func newGroupBook() *groupBook {
	return &groupBook{turn: make(chan struct{}, 1), known: map[string]knownGroup{}}
}

// isGroupID tells an ID from a name: EC2 allows no name that begins so.
func isGroupID(s string) bool { return strings.HasPrefix(s, "sg-") }

// lookup returns the groups that are known, and what EC2 has to be asked for.
func (b *groupBook) lookup(asked []string) (groups []vpc.SecurityGroup, missing []string) {
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range asked {
		k, ok := b.known[s]
		if !ok || now.After(k.until) {
			missing = append(missing, s)
			continue
		}
		groups = append(groups, k.group)
	}
	return groups, missing
}

// learn keeps what EC2 said.
func (b *groupBook) learn(asked []string, found []vpc.SecurityGroup) {
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	for s, k := range b.known {
		if now.After(k.until) {
			delete(b.known, s)
		}
	}
	for _, s := range asked {
		k := knownGroup{until: now.Add(noGroupFor)}
		for _, g := range found {
			if isGroupID(s) && string(g.ID) == s || !isGroupID(s) && g.Name == s {
				k = knownGroup{group: g, until: now.Add(groupFor)}
			}
		}
		b.known[s] = k
	}
}

// groupSet returns the set of the security groups that a pod asks for by ID or
// name, "" for none. It asks EC2 for those it does not know, as often as it
// takes until the deadline.
func (a *Agent) groupSet(ctx context.Context, asked []string, deadline time.Time) (vpc.GroupSet, error) {
	if len(asked) == 0 {
		return "", nil
	}
	a.mu.Lock()
	client, home := a.client, a.identity.VPC
	a.mu.Unlock()
	groups, err := a.groupsOf(ctx, client, home, asked, deadline)
	if err != nil {
		return "", err
	}
	ids := make([]vpc.SecurityGroupID, len(groups))
	for i, g := range groups {
		switch {
		case g.ID == "":
			return "", groupsError("EC2 knows no security group %s in %s; check the name or ID the pod asks for: aws ec2 describe-security-groups --filters Name=vpc-id,Values=%s", asked[i], home, home)
		case g.VPC != home:
			return "", groupsError("security group %s belongs to %s, and the node is in %s; name a group of the node's VPC", asked[i], g.VPC, home)
		}
		ids[i] = g.ID
	}
	set := vpc.NewGroupSet(ids)
	if n := len(set.Groups()); n > vpc.MaxGroups {
		return "", groupsError("%d security groups are asked for (%s), and a network interface carries at most %d; name fewer, or join their rules in one group", n, strings.Join(asked, ","), vpc.MaxGroups)
	}
	return set, nil
}

// lateReason is why EC2 did not answer in time, by the class of its last answer.
func lateReason(class ipam.Class) string {
	if class == ipam.ClassThrottled {
		return reasons[ipam.KindThrottled]
	}
	return reasons[ipam.KindUnavailable]
}

func groupsError(format string, args ...any) error {
	return &reasonError{agentapi.Errorf(agentapi.CodeGroups, format, args...), reasonGroups}
}

// groupsOf returns the groups in the order of asked.
func (a *Agent) groupsOf(ctx context.Context, client EC2, home vpc.VPCID, asked []string, deadline time.Time) ([]vpc.SecurityGroup, error) {
	b := a.groups
	groups, missing := b.lookup(asked)
	if len(missing) == 0 {
		return groups, nil
	}
	// Those who wait for another's question have the answer with it.
	select {
	case b.turn <- struct{}{}:
		defer func() { <-b.turn }()
	case <-ctx.Done():
		return nil, errGone
	}
	for delay := 200 * time.Millisecond; ; delay = min(2*delay, 5*time.Second) {
		if groups, missing = b.lookup(asked); len(missing) == 0 {
			return groups, nil
		}
		var ids []vpc.SecurityGroupID
		var names []string
		for _, s := range missing {
			if isGroupID(s) {
				ids = append(ids, vpc.SecurityGroupID(s))
			} else {
				names = append(names, s)
			}
		}
		found, err := client.SecurityGroups(ctx, home, ids, names)
		a.metrics.call("describe-security-groups", err)
		if err == nil {
			b.learn(missing, found)
			continue
		}
		_, class := ec2.Outcome(err)
		if class == ipam.ClassDenied {
			return nil, &reasonError{agentapi.Errorf(agentapi.CodeDenied, "EC2 denies the node to look up security groups %s (%s); attach the documented IAM policy to the node's role", strings.Join(missing, ","), cause(err)), reasons[ipam.KindDenied]}
		}
		if !time.Now().Add(delay).Before(deadline) {
			return nil, &reasonError{agentapi.Errorf(agentapi.CodeTryAgain, "EC2 did not say in time what security groups %s are (%s); the next try may succeed", strings.Join(missing, ","), cause(err)), lateReason(class)}
		}
		t := time.NewTimer(delay)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil, errGone
		}
	}
}

// inGroups reports whether an endpoint that is there has the groups that a
// repeated ADD asks for, judged by whom it says.
func (a *Agent) inGroups(ctx context.Context, ep datapath.Endpoint, set vpc.GroupSet, here bool) (has vpc.GroupSet, same bool, err error) {
	if ep.GroupsHere || here {
		return ep.Groups, ep.GroupsHere == here && ep.Groups == set, nil
	}
	eni := ep.ENI
	same = true // of an interface that we have lost sight of
	err = a.ask(ctx, func(o *owner) {
		if e := o.state.ENI(eni); e != nil {
			has, same = e.Pool.Groups, e.Pool.Groups == set
		}
	})
	return has, same, err
}

// sets is what people see of the node's sets of security groups.
func sets(s *ipam.State) []agentapi.GroupSet {
	out := []agentapi.GroupSet{}
	for _, u := range s.Sets() {
		g := agentapi.GroupSet{Groups: groupIDs(u.Groups), Node: u.Groups == "", ENIs: u.ENIs, InUse: u.Pods, Free: u.Free, Coming: u.Coming, Cooling: u.Cooling, Waiting: u.Waiting, Drifted: u.Drifted}
		if own := s.Primary(); g.Node && own != nil {
			g.Groups = groupIDs(own.Groups)
		}
		if !u.Until.IsZero() && !g.Node {
			until := u.Until
			g.Until = &until
		}
		out = append(out, g)
	}
	return out
}

func groupIDs(set vpc.GroupSet) []string {
	out := []string{}
	for _, g := range set.Groups() {
		out = append(out, string(g))
	}
	return slices.Clip(out)
}

// describe says what a set is, for people.
func describeSet(set vpc.GroupSet) string {
	if set == "" {
		return "the node's own security groups"
	}
	return fmt.Sprintf("security groups %s", set)
}
