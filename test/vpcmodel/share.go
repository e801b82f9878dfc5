package vpcmodel

import (
	"fmt"
	"slices"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// ShareGroup associates a group with another VPC: "Security Group VPC Association
// lets one SG be used in several VPCs of a region".
type ShareGroup struct {
	Group vpc.SecurityGroupID
	VPC   vpc.VPCID
}

func (s ShareGroup) String() string { return fields("share", s.Group, s.VPC) }

// Apply changes the world.
func (s ShareGroup) Apply(w *World) error {
	if err := first(need("group", w.Groups, s.Group), need("VPC", w.VPCs, s.VPC)); err != nil {
		return err
	}
	g := w.Groups[s.Group]
	if g.usable(s.VPC) {
		return fmt.Errorf("%s can be used in %s already", s.Group, s.VPC)
	}
	g.Also = append(g.Also, s.VPC)
	return nil
}

// usable reports whether interfaces of a VPC may have the group.
func (g *Group) usable(id vpc.VPCID) bool { return g.VPC == id || slices.Contains(g.Also, id) }
