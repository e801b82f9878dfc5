package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"

	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// Holding is what a node holds in EC2 for pods, and could give back.
type Holding struct {
	Instance   vpc.InstanceID
	Region     string
	Interfaces []vpc.ENI // made for this node and cluster, its own not among them
	Own        vpc.ENIID
	Addresses  []netip.Addr // secondary ones of its own interface
	Prefixes   []netip.Prefix
}

// Empty reports whether there is nothing to give back.
func (h *Holding) Empty() bool { return len(h.Interfaces)+len(h.Addresses)+len(h.Prefixes) == 0 }

// Held asks EC2 what the node holds for pods. Addresses that somebody other than
// a pod uses (used: those configured on the node, or another CNI's; or an
// Elastic IP leads to them) and interfaces of others stay out, by the same signs
// by which the agent keeps its hands off them.
func Held(ctx context.Context, meta Metadata, client EC2, cluster string, used []netip.Addr) (*Holding, error) {
	id, err := meta.Identity(ctx)
	if err != nil {
		return nil, fmt.Errorf("ask IMDS who the node is: %w", err)
	}
	enis, err := client.Interfaces(ctx, id.Instance, ipam.TagInstance)
	if err != nil {
		return nil, fmt.Errorf("ask EC2 for the node's interfaces: %w", err)
	}
	h := &Holding{Instance: id.Instance, Region: id.Region}
	for _, e := range enis {
		taken := func(a netip.Addr) bool { return slices.Contains(used, a) || slices.Contains(e.Elastic, a) }
		switch {
		case e.RequesterOwned || e.NetworkCard != 0 || e.Tags[ipam.TagNoManage] == "true":
		case e.Instance == id.Instance && e.DeviceIndex == 0:
			h.Own = e.ID
			for _, a := range e.Secondary {
				if !taken(a) {
					h.Addresses = append(h.Addresses, a)
				}
			}
			for _, p := range e.Prefixes {
				if !slices.ContainsFunc(used, p.Contains) && !slices.ContainsFunc(e.Elastic, p.Contains) {
					h.Prefixes = append(h.Prefixes, p)
				}
			}
		case e.Type != "" && e.Type != "interface":
		case e.Tags[ipam.TagCluster] != cluster || e.Tags[ipam.TagInstance] != string(id.Instance):
		case e.Instance != "" && e.Instance != id.Instance:
		case len(e.Elastic) > 0: // somebody made it reachable: not for our pods
		default:
			h.Interfaces = append(h.Interfaces, e)
		}
	}
	return h, nil
}

// GiveBack returns all of it to EC2: addresses are unassigned, interfaces
// detached and deleted. What fails is told and does not keep the rest.
func (h *Holding) GiveBack(ctx context.Context, client EC2, log *slog.Logger) error {
	var errs []error
	if len(h.Addresses) > 0 { // EC2 takes addresses or prefixes in one call
		err := client.Unassign(ctx, h.Own, h.Addresses, nil)
		if err == nil {
			log.Info("addresses given back", "eni", h.Own, "n", len(h.Addresses), "op", "uninstall")
		}
		errs = append(errs, err)
	}
	if len(h.Prefixes) > 0 {
		err := client.Unassign(ctx, h.Own, nil, h.Prefixes)
		if err == nil {
			log.Info("prefixes given back", "eni", h.Own, "n", len(h.Prefixes), "op", "uninstall")
		}
		errs = append(errs, err)
	}
	for _, e := range h.Interfaces {
		err := client.DeleteInterface(ctx, e.ID, e.Attachment)
		if err == nil {
			log.Info("interface deleted", "eni", e.ID, "op", "uninstall")
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Commands returns what a person with EC2's command line types to give it back.
func (h *Holding) Commands() []string {
	region := " --region " + h.Region
	var out []string
	unassign := "aws ec2 unassign-private-ip-addresses" + region + " --network-interface-id " + string(h.Own)
	if len(h.Addresses) > 0 {
		out = append(out, unassign+" --private-ip-addresses "+joined(h.Addresses))
	}
	if len(h.Prefixes) > 0 {
		out = append(out, unassign+" --ipv4-prefixes "+joined(h.Prefixes))
	}
	for _, e := range h.Interfaces {
		if e.Attachment != "" {
			out = append(out, "aws ec2 detach-network-interface"+region+" --attachment-id "+string(e.Attachment))
		}
		out = append(out, "aws ec2 delete-network-interface"+region+" --network-interface-id "+string(e.ID))
	}
	return out
}

func joined[T fmt.Stringer](all []T) string {
	text := make([]string, len(all))
	for i, a := range all {
		text[i] = a.String()
	}
	return strings.Join(text, " ")
}
