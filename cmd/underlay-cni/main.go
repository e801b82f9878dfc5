// Command underlay-cni is the CNI plugin: it asks the node's agent and prints
// the answer. All that decides or touches the kernel is the agent's.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/underlay-cni/underlay/internal/agentapi"
)

// How long the plugin waits. An ADD may have to wait for EC2; kubelet gives a
// sandbox four minutes, containerd and Nomad one and more. The agent's own
// deadline is below it, so that it is the agent who says what was missing.
const (
	addTimeout  = 58 * time.Second
	callTimeout = 10 * time.Second
)

func main() {
	err := skel.PluginMainFuncsWithError(skel.CNIFuncs{Add: add, Del: del, Check: check, GC: gc, Status: status},
		version.PluginSupports("0.3.1", "0.4.0", "1.0.0", "1.1.0"),
		"underlay-cni: CNI plugin that gives a container an address of the VPC; it asks underlay-agent on the socket that its configuration names")
	if err != nil {
		advise(err)
		_ = err.Print() // to stdout: if that fails, nobody is left to tell
		os.Exit(1)
	}
}

// advise adds the next step to the errors of the CNI library, which knows
// none. Those of ours have one, after a semicolon.
func advise(e *types.Error) {
	if strings.Contains(e.Msg, ";") {
		return
	}
	switch e.Code {
	case types.ErrIncompatibleCNIVersion:
		e.Msg += "; set \"cniVersion\" in the network configuration to one from 0.3.1 to 1.1.0 (CHECK wants 0.4.0, GC and STATUS 1.1.0)"
	case types.ErrDecodingFailure, types.ErrInvalidNetworkConfig:
		e.Msg += "; correct the network configuration in the runtime's CNI directory"
	case types.ErrInvalidEnvironmentVariables:
		e.Msg += "; this is a CNI plugin, to be run by a container runtime, which sets the CNI_ variables"
	}
}

// attachment names the interface that a command is about.
func attachment(c *config, args *skel.CmdArgs) agentapi.Attachment {
	return agentapi.Attachment{Network: c.Name, ContainerID: args.ContainerID, IfName: args.IfName, Netns: args.Netns, Pod: podOf(args.Args)}
}

func add(args *skel.CmdArgs) error {
	c, err := parseConfig(args.StdinData)
	if err != nil {
		return err
	}
	netns, err := openNetns(args.Netns)
	if err != nil {
		return err
	}
	defer netns.Close()
	ctx, cancel := context.WithTimeout(context.Background(), addTimeout)
	defer cancel()
	client := agentapi.Client{Socket: c.Socket}
	res, err := client.Add(ctx, attachment(c, args), netns)
	if err != nil {
		return cniError(c.Socket, err)
	}
	return types.PrintResult(result(res, args), c.CNIVersion)
}

// result puts the agent's answer in CNI's form.
func result(res *agentapi.Result, args *skel.CmdArgs) *current.Result {
	container := 1 // index in interfaces
	return &current.Result{
		CNIVersion: current.ImplementedSpecVersion,
		Interfaces: []*current.Interface{
			{Name: res.HostIfName, Mac: res.HostMAC, Mtu: res.MTU},
			{Name: args.IfName, Mac: res.MAC, Mtu: res.MTU, Sandbox: args.Netns},
		},
		IPs: []*current.IPConfig{{
			Interface: &container,
			Address:   net.IPNet{IP: res.Addr.AsSlice(), Mask: net.CIDRMask(res.Addr.BitLen(), res.Addr.BitLen())},
			Gateway:   res.Gateway.AsSlice(),
		}},
		Routes: []*types.Route{{Dst: net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, GW: res.Gateway.AsSlice()}},
	}
}

func del(args *skel.CmdArgs) error {
	c, err := parseConfig(args.StdinData)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	client := agentapi.Client{Socket: c.Socket}
	a := attachment(c, args)
	err = client.Del(ctx, a)
	if errors.Is(err, agentapi.ErrUnreachable) {
		// A runtime that cannot remove a container keeps it, and its node
		// cannot be drained. The agent takes the release up when it starts.
		if err := agentapi.Spool(c.Socket, a); err != nil {
			return types.NewError(uint(agentapi.CodeAgentUnreachable), fmt.Sprintf("no agent answers on %s, and the release cannot be kept for it: %v; start underlay-agent", c.Socket, err), "")
		}
		return nil
	}
	if err != nil {
		return cniError(c.Socket, err)
	}
	return nil
}

func check(args *skel.CmdArgs) error {
	c, err := parseConfig(args.StdinData)
	if err != nil {
		return err
	}
	a := attachment(c, args)
	if a.Addr, err = previousAddr(c, args.IfName); err != nil {
		return err
	}
	netns, err := openNetns(args.Netns)
	if err != nil {
		return err
	}
	defer netns.Close()
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	client := agentapi.Client{Socket: c.Socket}
	if err := client.Check(ctx, a, netns); err != nil {
		return cniError(c.Socket, err)
	}
	return nil
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

func gc(args *skel.CmdArgs) error {
	c, err := parseConfig(args.StdinData)
	if err != nil {
		return err
	}
	// An absent list is not an empty one: GC with neither would remove all.
	var given struct {
		Valid *json.RawMessage `json:"cni.dev/valid-attachments"`
	}
	if err := json.Unmarshal(args.StdinData, &given); err != nil || given.Valid == nil {
		return types.NewError(types.ErrInvalidNetworkConfig, "no cni.dev/valid-attachments; the runtime must hand GC the list of what is in use", "")
	}
	valid := make([]agentapi.Attachment, len(c.ValidAttachments))
	for i, v := range c.ValidAttachments {
		valid[i] = agentapi.Attachment{ContainerID: v.ContainerID, IfName: v.IfName}
	}
	ctx, cancel := context.WithTimeout(context.Background(), addTimeout)
	defer cancel()
	client := agentapi.Client{Socket: c.Socket}
	if err := client.GC(ctx, valid); err != nil {
		return cniError(c.Socket, err)
	}
	return nil
}

func status(args *skel.CmdArgs) error {
	c, err := parseConfig(args.StdinData)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	client := agentapi.Client{Socket: c.Socket}
	err = client.Status(ctx)
	if errors.Is(err, agentapi.ErrUnreachable) {
		return types.NewError(uint(agentapi.CodeNotAvailable), unreachable(c.Socket), err.Error())
	}
	if err != nil {
		return cniError(c.Socket, err)
	}
	return nil
}

// openNetns opens the container's namespace, to be handed to the agent: the
// runtime's mounts need not be visible there.
func openNetns(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, types.NewError(types.ErrInvalidNetNS, fmt.Sprintf("open the network namespace %s: %v; the runtime must make it before ADD", path, errors.Unwrap(err)), "")
	}
	if err := isNetns(f); err != nil {
		f.Close()
		return nil, types.NewError(types.ErrInvalidNetNS, fmt.Sprintf("%s is no network namespace: %v; CNI_NETNS must name one", path, err), "")
	}
	return f, nil
}

func unreachable(socket string) string {
	return fmt.Sprintf("no agent answers on %s; start underlay-agent on this node, or see why it ended in its log", socket)
}

// cniError puts an error in CNI's form.
func cniError(socket string, err error) error {
	var e *agentapi.Error
	switch {
	case errors.As(err, &e):
		return types.NewError(uint(e.Code), e.Message, e.Details)
	case errors.Is(err, context.DeadlineExceeded):
		return types.NewError(types.ErrTryAgainLater, fmt.Sprintf("the agent on %s gave no answer in time; see its log", socket), err.Error())
	case errors.Is(err, agentapi.ErrUnreachable):
		return types.NewError(uint(agentapi.CodeAgentUnreachable), unreachable(socket), err.Error())
	}
	return types.NewError(uint(agentapi.CodeInternal), err.Error()+"; see the agent's log", "")
}
