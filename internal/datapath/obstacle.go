package datapath

import (
	"bytes"
	"fmt"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
)

// hostIfPrefix begins the name of every host veth, see hostIfName.
const hostIfPrefix = "ul"

// forwardAccept are the rules that let pods' packets through a filter of
// somebody else's that forwards nothing unless it is told to.
var forwardAccept = []string{
	"iptables -I FORWARD -i " + hostIfPrefix + "+ -j ACCEPT",
	"iptables -I FORWARD -o " + hostIfPrefix + "+ -j ACCEPT",
}

// Obstacle looks for what others on the node have that keeps pods' packets from
// being forwarded, and returns it with the next step; "" if there is nothing.
// It is a chain at the hook forward with the policy drop, as Docker and
// firewalls set it, in whose table no rule accepts what comes from and goes to
// pods' devices. Rules of others are never changed: a policy is somebody's
// decision, and an accept in a table of ours would not overrule it. What
// iptables from before nftables filters is not looked at.
func (d *Datapath) Obstacle() (string, error) {
	c, err := guardConn(d.netns)
	if err != nil {
		return "", err
	}
	var found []string
	for _, family := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyINet} {
		chains, err := c.ListChainsOfTableFamily(family)
		if err != nil {
			return "", fmt.Errorf("list nftables chains: %w", err)
		}
		for _, ch := range chains {
			if ch.Hooknum == nil || *ch.Hooknum != *nftables.ChainHookForward || ch.Policy == nil || *ch.Policy != nftables.ChainPolicyDrop {
				continue
			}
			if in, out := letsPods(c, ch.Table, chains); in && out {
				continue
			}
			name := "ip"
			if family == nftables.TableFamilyINet {
				name = "inet"
			}
			found = append(found, fmt.Sprintf("chain %s of nftables table %s %s", ch.Name, name, ch.Table.Name))
		}
	}
	if found == nil {
		return "", nil
	}
	return fmt.Sprintf("%s drops what is forwarded unless a rule accepts it, and none accepts what comes from and goes to pods (devices %s*); add one for each direction, with iptables: %s",
		strings.Join(found, " and "), hostIfPrefix, strings.Join(forwardAccept, "; ")), nil
}

// letsPods tells whether rules of a table accept, or hand on, what comes in by
// pods' devices, and what goes out by them.
func letsPods(c *nftables.Conn, table *nftables.Table, chains []*nftables.Chain) (in, out bool) {
	for _, ch := range chains {
		if ch.Table.Name != table.Name || ch.Type == nftables.ChainTypeNAT {
			continue
		}
		rules, err := c.GetRules(table, ch)
		if err != nil {
			continue // gone meanwhile, or with expressions that the library does not know
		}
		for _, r := range rules {
			i, o := podRule(r.Exprs)
			in, out = in || i, out || o
		}
	}
	return in, out
}

// podRule tells whether a rule is an accept or a jump for packets from a pod's
// device, or to one.
func podRule(exprs []expr.Any) (in, out bool) {
	var loaded expr.MetaKey
	passes := false
	for _, e := range exprs {
		switch e := e.(type) {
		case *expr.Meta:
			loaded = e.Key
		case *expr.Cmp:
			ours := false
			switch loaded {
			case expr.MetaKeyIIFNAME, expr.MetaKeyOIFNAME:
				// A prefix is compared by its length, without the zero byte.
				ours = bytes.Equal(e.Data, []byte(hostIfPrefix))
			case expr.MetaKeyIIFGROUP, expr.MetaKeyOIFGROUP:
				ours = bytes.Equal(e.Data, binaryutil.NativeEndian.PutUint32(LinkGroup))
			}
			if ours && e.Op == expr.CmpOpEq {
				in = in || loaded == expr.MetaKeyIIFNAME || loaded == expr.MetaKeyIIFGROUP
				out = out || loaded == expr.MetaKeyOIFNAME || loaded == expr.MetaKeyOIFGROUP
			}
		case *expr.Verdict:
			passes = e.Kind == expr.VerdictAccept || e.Kind == expr.VerdictJump || e.Kind == expr.VerdictGoto
		}
	}
	return in && passes, out && passes
}
