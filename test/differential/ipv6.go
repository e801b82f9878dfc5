package differential

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// blockBits is the length of a VPC's block of IPv6.
const blockBits = 56

// learnBlock learns the block of IPv6 that EC2 chose for a VPC: what the script
// has stands for it.
func (c *cloud) learnBlock(v vpc.VPCID, scripts netip.Prefix) error {
	if scripts.Bits() != blockBits {
		return fmt.Errorf("%s is no /%d", scripts, blockBits)
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		a, err := c.call("DescribeVpcs", "VpcId.1", id(c, v))
		if err != nil {
			return err
		}
		var block netip.Prefix
		var bad error
		a.find([]string{"vpcSet", "item", "ipv6CidrBlockAssociationSet", "item"}, func(e element) {
			state := ""
			for _, child := range e.Children {
				switch child.XMLName.Local {
				case "ipv6CidrBlock":
					block, bad = netip.ParsePrefix(child.Text)
				case "ipv6CidrBlockState":
					for _, s := range child.Children {
						if s.XMLName.Local == "state" {
							state = s.Text
						}
					}
				}
			}
			if state != "associated" {
				block = netip.Prefix{}
			}
		})
		switch {
		case bad != nil:
			return bad
		case block.IsValid() && block.Bits() != blockBits:
			return fmt.Errorf("%s has the IPv6 block %s", v, block)
		case block.IsValid():
			c.blocks[scripts] = block
			return nil
		case time.Now().After(deadline):
			return fmt.Errorf("after 10 s %s has no IPv6 block: %s", v, a.body)
		}
		<-time.After(5 * time.Millisecond)
	}
}

// real is EC2's address for a script's.
func (c *cloud) real(a netip.Addr) netip.Addr {
	if known, ok := c.publics[a]; ok {
		return known
	}
	for from, to := range c.blocks {
		if from.Contains(a) {
			return moved(a, to)
		}
	}
	return a
}

// scripted is the script's IPv6 address for EC2's.
func (c *cloud) scripted(a netip.Addr) netip.Addr {
	for from, to := range c.blocks {
		if to.Contains(a) {
			return moved(a, from)
		}
	}
	return a
}

// block is EC2's block for a script's: another if it is of a VPC's block.
func (c *cloud) block(p netip.Prefix) netip.Prefix {
	if p.Bits() < blockBits {
		return p
	}
	return netip.PrefixFrom(c.real(p.Addr()), p.Bits())
}

// moved is an address with the first bits of a block.
func moved(a netip.Addr, block netip.Prefix) netip.Addr {
	b, first := a.As16(), block.Addr().As16()
	copy(b[:blockBits/8], first[:])
	return netip.AddrFrom16(b)
}

// whose6 is whose for what was not received as it was sent: it is known by its
// number.
func (r *runner) whose6(d []byte) fragment {
	i, ok := r.indexOf[numberOf(d)]
	if !ok {
		r.out.noise++
		return fragment{}
	}
	return fragment{i, r.whole[i]}
}

// otherwise says how an IPv6 packet differs from all that were sent.
func (r *runner) otherwise(d []byte) string {
	return fmt.Sprintf(" as %s > %s (%x)", addr6(d[8:24]), addr6(d[24:40]), d[:min(96, len(d))])
}

// hasIPv6 reports whether a VPC of the script has a block of IPv6.
func (c *cloud) hasIPv6(v vpc.VPCID) bool {
	return slices.ContainsFunc(c.world.VPCs[v].CIDRs, func(p netip.Prefix) bool { return p.Addr().Is6() })
}
