package differential

import (
	"errors"
	"fmt"
	"strings"

	"github.com/underlay-cni/underlay/test/vpcmodel"
)

// remove deletes what the script made, so that worlds do not pile up. What never
// came to be is no error.
func (c *cloud) remove(terminated func(instances []string) error) error {
	var errs []error
	try := func(action string, params ...string) {
		if strings.HasPrefix(params[len(params)-1], "unknown-") {
			return
		}
		if err := c.do(action, params...); err != nil && !strings.Contains(err.Error(), ".NotFound") && !strings.Contains(err.Error(), "InvalidStateTransition") {
			errs = append(errs, err)
		}
	}
	if len(c.instances) > 0 {
		var params []string
		for i, id := range c.instances {
			params = append(params, fmt.Sprintf("InstanceId.%d", i+1), id)
		}
		try("TerminateInstances", params...)
		if err := terminated(c.instances); err != nil {
			return err
		}
	}
	for name := range c.world.Peerings {
		if c.world.Peerings[name].Active {
			try("DeleteVpcPeeringConnection", "VpcPeeringConnectionId", id(c, name))
		}
	}
	if err := c.removeGateways(try); err != nil {
		errs = append(errs, err)
	}
	for name := range c.world.ENIs {
		try("DeleteNetworkInterface", "NetworkInterfaceId", id(c, name))
	}
	for _, association := range c.tableOf {
		try("DisassociateRouteTable", "AssociationId", association)
	}
	for name := range c.world.Tables {
		try("DeleteRouteTable", "RouteTableId", id(c, name))
	}
	for name := range c.world.Subnets {
		try("DeleteSubnet", "SubnetId", id(c, name))
	}
	defaults := map[vpcmodel.ACLID]bool{}
	for _, v := range c.world.VPCs {
		defaults[v.DefaultACL] = true
	}
	for name := range c.world.ACLs {
		if !defaults[name] {
			try("DeleteNetworkAcl", "NetworkAclId", id(c, name))
		}
	}
	c.removeGroups(try)
	for name := range c.world.Lists {
		try("DeleteManagedPrefixList", "PrefixListId", id(c, name))
	}
	for name := range c.world.VPCs {
		try("DeleteVpc", "VpcId", id(c, name))
	}
	return errors.Join(errs...)
}

// removeGroups revokes what groups say of each other, then deletes them.
func (c *cloud) removeGroups(try func(string, ...string)) {
	for name, g := range c.world.Groups {
		for d, rules := range g.Rules {
			for _, r := range rules {
				if r.Group == "" && r.List == "" || r.Group == name {
					continue
				}
				action := "RevokeSecurityGroupIngress"
				if d == vpcmodel.Out {
					action = "RevokeSecurityGroupEgress"
				}
				try(action, c.permission(name, r)...)
			}
		}
	}
	for name, g := range c.world.Groups {
		for _, v := range g.Also {
			try("DisassociateSecurityGroupVpc", "GroupId", id(c, name), "VpcId", id(c, v))
		}
		if !c.isDefault(string(name)) {
			try("DeleteSecurityGroup", "GroupId", id(c, name))
		}
	}
	for _, id := range c.silent {
		try("DeleteSecurityGroup", "GroupId", id)
	}
}
