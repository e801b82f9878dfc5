package cni

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/underlay-cni/underlay/internal/agentapi"
)

// argGroups is the key of CNI_ARGS that names a container's security groups.
const argGroups = "UNDERLAY_SECURITY_GROUPS"

// argMode is the key of CNI_ARGS that says who judges by them.
const argMode = "UNDERLAY_SECURITY_GROUPS_MODE"

// argSubnet is the key of CNI_ARGS that names the subnet of a container's address.
const argSubnet = "UNDERLAY_SUBNET"

// ownKeys are those that say where in the VPC a container is to be, wherever they
// stand.
type ownKeys struct {
	Groups groupList `json:"securityGroups"`
	Mode   groupList `json:"securityGroupsMode"`
	Subnet groupList `json:"subnet"`
}

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
	return said(args, argGroups, "securityGroups", "a list of security groups by ID or name",
		c.Runtime.Groups, c.Args.CNI.Groups, c.Groups)
}

// modeOf returns who is to judge by them, "" if nobody says.
func modeOf(c *config, args string) (string, error) {
	mode, err := said(args, argMode, "securityGroupsMode", "vpc or host", c.Runtime.Mode, c.Args.CNI.Mode, c.Mode)
	switch {
	case err != nil || len(mode) == 0:
		return "", err
	case len(mode) == 1 && (mode[0] == agentapi.GroupsVPC || mode[0] == agentapi.GroupsHost):
		return mode[0], nil
	}
	return "", types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("securityGroupsMode is %s; give vpc or host", strings.Join(mode, ",")), "")
}

// subnetOf returns the subnet that is asked for, "" if nobody says.
func subnetOf(c *config, args string) (string, error) {
	subnet, err := said(args, argSubnet, "subnet", "a subnet by its ID", c.Runtime.Subnet, c.Args.CNI.Subnet, c.Subnet)
	switch {
	case err != nil || len(subnet) == 0:
		return "", err
	case len(subnet) == 1 && strings.HasPrefix(subnet[0], "subnet-"):
		return subnet[0], nil
	}
	return "", types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("subnet is %s; give one by its ID, subnet-…", strings.Join(subnet, ",")), "")
}

// said returns what one key says, from the places where it may stand.
func said(args, argKey, key, want string, runtime, cniArgs, network groupList) ([]string, error) {
	var fromArgs groupList
	for part := range strings.SplitSeq(args, ";") {
		if k, value, ok := strings.Cut(part, "="); ok && k == argKey {
			fromArgs.groups = splitGroups(value)
		}
	}
	var asked []string
	from := ""
	for _, s := range []struct {
		where string
		list  groupList
	}{{argKey + " of CNI_ARGS", fromArgs}, {"runtimeConfig." + key, runtime}, {"args.cni." + key, cniArgs}, {key, network}} {
		if s.list.wrong != "" {
			return nil, types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("%s is %.100s; give %s", s.where, s.list.wrong, want), "")
		}
		groups := tidy(s.list.groups)
		switch {
		case len(groups) == 0:
		case from == "":
			asked, from = groups, s.where
		case s.where != key && !slices.Equal(asked, groups): // the network's is for those who say nothing
			return nil, types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("%s says %s and %s says %s; say it in one place",
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
