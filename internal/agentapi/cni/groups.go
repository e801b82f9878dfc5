package cni

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
)

// argGroups is the key of CNI_ARGS that names a container's security groups.
const argGroups = "UNDERLAY_SECURITY_GROUPS"

// groupList is a list of security groups as JSON has it, or a text with commas.
// What is neither is found fault with when somebody wants the groups: a DEL
// must not fail for it.
type groupList struct {
	groups []string
	wrong  string
}

// UnmarshalJSON implements json.Unmarshaler.
func (l *groupList) UnmarshalJSON(b []byte) error {
	var text string
	*l = groupList{}
	switch {
	case json.Unmarshal(b, &l.groups) == nil: // null too
	case json.Unmarshal(b, &text) == nil:
		l.groups = splitGroups(text)
	default:
		*l = groupList{wrong: string(b)}
	}
	return nil
}

func splitGroups(text string) []string { return strings.Split(text, ",") }

// groupsOf returns the security groups that are asked for, by ID or name: what
// the container's own request says, be it in CNI_ARGS, in runtimeConfig (as the
// capability "securityGroups") or in args.cni, or else the configuration's
// securityGroups, which are for all of the network. Where the request says
// several things they must be the same: a container with other groups than
// somebody counts on is a hole.
func groupsOf(c *config, args string) ([]string, error) {
	var fromArgs groupList
	for part := range strings.SplitSeq(args, ";") {
		if key, value, ok := strings.Cut(part, "="); ok && key == argGroups {
			fromArgs.groups = splitGroups(value)
		}
	}
	const network = "securityGroups"
	var asked []string
	from := ""
	for _, s := range []struct {
		where string
		list  groupList
	}{
		{argGroups + " of CNI_ARGS", fromArgs}, {"runtimeConfig.securityGroups", c.Runtime.Groups},
		{"args.cni.securityGroups", c.Args.CNI.Groups}, {network, c.Groups},
	} {
		if s.list.wrong != "" {
			return nil, types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("%s is %.100s; give a list of security groups by ID or name", s.where, s.list.wrong), "")
		}
		groups := tidy(s.list.groups)
		switch {
		case len(groups) == 0:
		case from == "":
			asked, from = groups, s.where
		case s.where != network && !slices.Equal(asked, groups):
			return nil, types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("%s asks for the security groups %s and %s for %s; name them in one place",
				from, strings.Join(asked, ","), s.where, strings.Join(groups, ",")), "")
		}
	}
	return asked, nil
}

// tidy returns the list sorted, without spaces around its members, empty ones
// and repetitions.
func tidy(list []string) []string {
	var out []string
	for _, g := range list {
		if g = strings.TrimSpace(g); g != "" {
			out = append(out, g)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
