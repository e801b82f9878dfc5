package vpc

import (
	"net/netip"
	"strings"
)

// PrivateDomain is what private names of a region end with (VPC user guide,
// "DNS attributes for your VPC").
func PrivateDomain(region string) string {
	if region == "us-east-1" {
		return "ec2.internal"
	}
	return region + ".compute.internal"
}

// PublicDomain is what the names of a region's public addresses end with.
func PublicDomain(region string) string {
	if region == "us-east-1" {
		return "compute-1.amazonaws.com"
	}
	return region + ".compute.amazonaws.com"
}

// PrivateName is the name of a private address: ip-10-0-0-5.ec2.internal.
func PrivateName(a netip.Addr, region string) string {
	return "ip-" + dashed(a) + "." + PrivateDomain(region)
}

// PublicName is the name of a public address: ec2-198-51-100-1.compute-1.amazonaws.com.
func PublicName(a netip.Addr, region string) string {
	return "ec2-" + dashed(a) + "." + PublicDomain(region)
}

func dashed(a netip.Addr) string { return strings.ReplaceAll(a.String(), ".", "-") }

// Resolver is the address of a VPC's DNS resolver, the third of its primary
// block (VPC user guide, "Amazon DNS server").
func Resolver(primary netip.Prefix) netip.Addr { return Router(primary).Next() }
