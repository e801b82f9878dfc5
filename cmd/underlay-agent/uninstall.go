package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/agent"
	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/agentapi/pipe"
	"github.com/underlay-cni/underlay/internal/datapath"
	"github.com/underlay-cni/underlay/internal/ec2"
	"github.com/underlay-cni/underlay/internal/imds"
)

const (
	// lockTimeout is how long uninstall waits for an agent that is ending.
	lockTimeout = 5 * time.Second
	// cloudTimeout bounds the answers of IMDS, the API server and EC2's list;
	// giving back is bounded per call by package ec2.
	cloudTimeout = 15 * time.Second
)

// uninstall takes the node back to what it was without Underlay. It may be
// repeated, and does what is left.
//
// While pods have endpoints it changes nothing: their runtimes need plugin and
// list to take them down. Otherwise the list goes first, so that no new pod
// comes; then plugin, datapath, what is in EC2, and what the API server says of
// the node.
func uninstall(ctx context.Context, o options, log *slog.Logger) error {
	lockCtx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	if _, err := os.Stat(filepath.Dir(o.socket)); err == nil {
		lock, err := agent.Lock(lockCtx, o.socket, log)
		if err != nil {
			return fmt.Errorf("an agent runs on this node and would install itself again: %w; end it first (delete its DaemonSet, or stop its service)", err)
		}
		defer lock.Close()
	}
	released, err := spooled(o.socket)
	if err != nil {
		return err
	}
	used, err := datapath.InUse(o.bpffs, released)
	if err != nil && !o.force {
		return fmt.Errorf("look which pods have endpoints: %w; --force goes on without", err)
	}
	if len(used) > 0 && !o.force {
		return inUse(o, &datapath.InUseError{Endpoints: used})
	}
	var errs []error
	if o.cniConf != "" {
		t, err := o.target()
		if err != nil {
			return err
		}
		removed, err := t.Remove()
		errs = append(errs, err)
		if removed {
			log.Info("plugin removed", "op", "uninstall", "list", o.cniConf, "bin", o.cniBin)
		}
	}
	removal, err := datapath.Remove(o.bpffs, released, o.force)
	var late *datapath.InUseError
	if errors.As(err, &late) { // a pod came meanwhile
		return errors.Join(append(errs, inUse(o, late))...)
	}
	errs = append(errs, err)
	if removal.Any() {
		log.Info("datapath removed", "op", "uninstall", "links", removal.Links, "rules", removal.Rules, "routes", removal.Routes, "nftables", removal.Table, "pins", removal.Pins, "filters", removal.Filters)
	}
	if err == nil {
		errs = append(errs, giveBack(ctx, o, log))
	}
	errs = append(errs, withdraw(ctx, o, log))
	for _, path := range []string{pipe.SpoolDir(o.socket), o.socket, o.socket + ".lock"} {
		errs = append(errs, os.RemoveAll(path))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("not everything could be removed; run it again: %w", err)
	}
	log.Info("node is clean", "op", "uninstall", "left", "net.ipv4.ip_forward, and rp_filter and MTU of the node's own interface, as they are: what they were before is not known, and others may rely on them")
	return nil
}

// spooled returns which containers' releases the plugin has kept for an agent.
// They stay where they are: if this ends half-way, an agent may come yet.
func spooled(socket string) (func(containerID, ifName string) bool, error) {
	type key struct{ containerID, ifName string }
	released := map[key]bool{}
	errKept := errors.New("kept")
	err := agentapi.DrainSpool(socket, func(a agentapi.Attachment) error {
		released[key{a.ContainerID, a.IfName}] = true
		return errKept
	})
	if err != nil && !errors.Is(err, errKept) {
		return nil, err
	}
	return func(containerID, ifName string) bool { return released[key{containerID, ifName}] }, nil
}

// inUse is what a person does about pods that live.
func inUse(o options, err *datapath.InUseError) error {
	drain := "stop these containers"
	if o.nodeName != "" {
		drain = fmt.Sprintf("drain the node (kubectl drain %s --ignore-daemonsets --delete-emptydir-data) and delete what is left", o.nodeName)
	}
	return fmt.Errorf("nothing was removed: %w; %s, then run this again; --force cuts them off", err, drain)
}

// giveBack returns interfaces and addresses to EC2.
func giveBack(ctx context.Context, o options, log *slog.Logger) error {
	if where := agent.AWSNode(ctx); where != "" {
		log.Info("interfaces and addresses are left to the AWS VPC CNI, which runs on this node", "op", "uninstall", "where", where)
		return nil
	}
	askCtx, cancel := context.WithTimeout(ctx, cloudTimeout)
	defer cancel()
	meta := imds.New("")
	id, err := meta.Identity(askCtx)
	if err != nil {
		return fmt.Errorf("ask IMDS who the node is: %w; its interfaces and addresses are kept until the instance ends: give them back with 'aws ec2 delete-network-interface' and 'aws ec2 unassign-private-ip-addresses'", err)
	}
	how := fmt.Sprintf("list them with: aws ec2 describe-network-interfaces --region %s --filters Name=attachment.instance-id,Values=%s", id.Region, id.Instance)
	client, err := ec2.New(askCtx, id.Region)
	if err != nil {
		return fmt.Errorf("reach EC2: %w; %s", err, how)
	}
	used, err := configured()
	if err != nil {
		return err
	}
	h, err := agent.Held(askCtx, meta, client, o.cluster, used)
	if err != nil {
		return fmt.Errorf("%w; the node's interfaces and addresses are kept; %s", err, how)
	}
	if h.Empty() {
		return nil
	}
	if err := h.GiveBack(ctx, client, log); err != nil {
		return fmt.Errorf("give interfaces and addresses back to EC2: %w; what is left goes with:\n  %s", err, strings.Join(h.Commands(), "\n  "))
	}
	return nil
}

// configured returns the addresses on the node's devices.
func configured() ([]netip.Addr, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list the node's addresses: %w", err)
	}
	var out []netip.Addr
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			out = append(out, p.Addr())
		}
	}
	return out, nil
}

// withdraw takes back what the node's object says of us. An API server that is
// away, or a node that is gone, keeps nobody from a clean node.
func withdraw(ctx context.Context, o options, log *slog.Logger) error {
	n, err := newNode(o, log)
	if err != nil || n.api == nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, cloudTimeout)
	defer cancel()
	if err := n.api.Withdraw(ctx, annotations); err != nil {
		log.Warn("what the node's object says of Underlay stays", "node", o.nodeName, "op", "uninstall", "err", err)
	}
	return nil
}

// stay waits until ctx ends: a container of a DaemonSet that ended would be
// started again.
func stay(ctx context.Context, log *slog.Logger) {
	log.Info("nothing is left to do; waiting for the end", "op", "uninstall")
	<-ctx.Done()
}

// ownBPFFS checks the directory as preflight does, unless it is gone.
func ownBPFFS(o options) error {
	if _, err := os.Stat(o.bpffs); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return checkBPFFS(o.bpffs)
}
