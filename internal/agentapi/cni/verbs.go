package cni

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/underlay-cni/underlay/internal/agentapi"
)

// attachment names the interface that a request is about.
func (r *request) attachment() *agentapi.Attachment {
	return &agentapi.Attachment{Network: r.config.Name, ContainerID: r.call.Getenv("CNI_CONTAINERID"), IfName: r.call.Getenv("CNI_IFNAME"),
		Netns: r.call.Getenv("CNI_NETNS"), Pod: podOf(r.call.Getenv("CNI_ARGS"))}
}

func add(r *request) (types.Result, error) {
	a := r.attachment()
	var err error
	if a.Groups, err = groupsOf(r.config, r.call.Getenv("CNI_ARGS")); err != nil {
		return nil, err
	}
	if a.GroupsMode, err = modeOf(r.config, r.call.Getenv("CNI_ARGS")); err != nil {
		return nil, err
	}
	if a.Subnet, err = subnetOf(r.config, r.call.Getenv("CNI_ARGS")); err != nil {
		return nil, err
	}
	res, err := r.backend.Add(r.ctx, a, 0, r.netns)
	if err != nil {
		return nil, err
	}
	return result(res, a, r.config), nil
}

// result puts the agent's answer in CNI's form. Name servers are those that the
// configuration names, if any: the VPC's own come by DHCP to the node, and it is
// the runtime that writes a container's resolv.conf.
func result(res *agentapi.Result, a *agentapi.Attachment, c *config) *current.Result {
	container := 1 // index in interfaces
	return &current.Result{
		CNIVersion: current.ImplementedSpecVersion,
		Interfaces: []*current.Interface{
			{Name: res.HostIfName, Mac: res.HostMAC, Mtu: res.MTU},
			{Name: a.IfName, Mac: res.MAC, Mtu: res.MTU, Sandbox: a.Netns},
		},
		IPs: []*current.IPConfig{{
			Interface: &container,
			Address:   net.IPNet{IP: res.Addr.AsSlice(), Mask: net.CIDRMask(res.Addr.BitLen(), res.Addr.BitLen())},
			Gateway:   res.Gateway.AsSlice(),
		}},
		Routes: []*types.Route{{Dst: net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, GW: res.Gateway.AsSlice()}},
		DNS:    c.DNS,
	}
}

func del(r *request) (types.Result, error) { return nil, r.backend.Del(r.ctx, r.attachment()) }

func check(r *request) (_ types.Result, err error) {
	a := r.attachment()
	if a.Addr, err = previousAddr(r.config, a.IfName); err != nil {
		return nil, err
	}
	return nil, r.backend.Check(r.ctx, a, r.netns)
}

// previousAddr returns the address that ADD's result names for the interface.
func previousAddr(c *config, ifname string) (netip.Addr, error) {
	invalid := func(what string) (netip.Addr, error) {
		return netip.Addr{}, types.NewError(types.ErrInvalidNetworkConfig, what+"; the runtime must hand CHECK the result of ADD", "")
	}
	if c.RawPrevResult == nil {
		return invalid("no prevResult")
	}
	if err := version.ParsePrevResult(&c.PluginConf); err != nil {
		return invalid(fmt.Sprintf("prevResult is unreadable: %v", err))
	}
	prev, err := current.NewResultFromResult(c.PrevResult)
	if err != nil {
		return invalid(fmt.Sprintf("prevResult is unreadable: %v", err))
	}
	for _, ip := range prev.IPs {
		if ip.Interface == nil || *ip.Interface < 0 || *ip.Interface >= len(prev.Interfaces) {
			continue
		}
		if i := prev.Interfaces[*ip.Interface]; i.Name == ifname && i.Sandbox != "" {
			addr, _ := netip.AddrFromSlice(ip.Address.IP)
			return addr.Unmap(), nil
		}
	}
	return invalid(fmt.Sprintf("prevResult has no address for %s", ifname))
}

func gc(r *request) (types.Result, error) {
	// An absent list is not an empty one: GC with neither would remove all.
	var given struct {
		Valid *json.RawMessage `json:"cni.dev/valid-attachments"`
	}
	if err := json.Unmarshal(r.call.Stdin, &given); err != nil || given.Valid == nil {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "no cni.dev/valid-attachments; the runtime must hand GC the list of what is in use", "")
	}
	valid := make([]agentapi.Attachment, len(r.config.ValidAttachments))
	for i, v := range r.config.ValidAttachments {
		valid[i] = agentapi.Attachment{ContainerID: v.ContainerID, IfName: v.IfName}
	}
	return nil, r.backend.GC(r.ctx, valid)
}

func status(r *request) (types.Result, error) { return nil, r.backend.Status(r.ctx) }
