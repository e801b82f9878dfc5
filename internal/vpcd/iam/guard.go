package iam

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"strings"

	"github.com/underlay-cni/underlay/internal/vpcd/query"
)

// Need is one permission that a call needs: an action on a resource, which is
// an ARN, or "*" where the action is on none in particular.
type Need struct{ Action, Resource string }

// Guard keeps callers to their policies.
type Guard struct {
	policies map[string]*Policy // by access key; "" is of all that have none of their own
	needs    func(query.Call) []Need
}

var accessKey = regexp.MustCompile(`^[A-Z0-9]{16,128}$`)

// Load reads policies from files, each named as FILE or ACCESSKEY=FILE: of all
// callers, or of who signs with that key. Who has no policy may do everything.
// needs says what a call needs.
func Load(names []string, needs func(query.Call) []Need) (*Guard, error) {
	g := &Guard{policies: map[string]*Policy{}, needs: needs}
	for _, file := range names {
		key := ""
		if before, after, ok := strings.Cut(file, "="); ok && accessKey.MatchString(before) {
			key, file = before, after
		}
		if g.policies[key] != nil {
			return nil, fmt.Errorf("IAM policy %s: there is one already for the same callers", file)
		}
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("read the IAM policy: %w", err)
		}
		if g.policies[key], err = Parse(b); err != nil {
			return nil, fmt.Errorf("IAM policy %s: %w", file, err)
		}
	}
	return g, nil
}

// Gate asks next, and then lets those calls pass that the caller's policy
// allows. Who is throttled learns nothing of permissions, as on AWS.
func (g *Guard) Gate(next query.Gate) query.Gate {
	if len(g.policies) == 0 {
		return next
	}
	return func(ctx context.Context, c query.Call) error {
		if err := next(ctx, c); err != nil {
			return err
		}
		p := g.policies[c.Identity.AccessKey]
		if p == nil {
			p = g.policies[""]
		}
		if p == nil {
			return nil
		}
		for _, n := range g.needs(c) {
			if v := p.Judge(n.Action, n.Resource); v != Allowed {
				return unauthorized(c.Identity, n, v)
			}
		}
		return nil
	}
}

// unauthorized is EC2's answer, in its words as seen in the field (karpenter
// issue 2813, January 2026), less the encoded message that only STS can read.
// Who signs with an access key of vpcd's is a user of that name.
func unauthorized(id query.Identity, n Need, v Verdict) error {
	on, why := "", "because no identity-based policy allows the "+n.Action+" action"
	if n.Resource != "*" {
		on = " on resource: " + n.Resource
	}
	if v == Denied {
		why = "with an explicit deny in an identity-based policy"
	}
	return query.Errorf("UnauthorizedOperation", "You are not authorized to perform this operation. User: arn:aws:iam::%s:user/%s is not authorized to perform: %s%s %s",
		id.Account, id.AccessKey, n.Action, on, why)
}
