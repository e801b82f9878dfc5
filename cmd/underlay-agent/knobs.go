package main

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/datapath"
	"github.com/underlay-cni/underlay/internal/ipam"
)

// knobs reads the settings that operators know from the AWS VPC CNI, by its
// names, and returns what they change in the plan's defaults. A value that is
// nonsense is refused: a node that silently ran on defaults would take other
// amounts of addresses than its operator counted on.
//
// WARM_IP_TARGET and MINIMUM_IP_TARGET override WARM_ENI_TARGET and
// WARM_PREFIX_TARGET, as there. What those two count in interfaces and
// prefixes is kept ready here as that many free addresses.
func knobs(lookup func(string) (string, bool), prefixes bool) (func(*ipam.Config), error) {
	var err error
	count := func(name string, least int) (n int, set bool) {
		text, ok := lookup(name)
		if !ok || text == "" || err != nil {
			return 0, false
		}
		n, convErr := strconv.Atoi(text)
		if convErr != nil || n < least || n > 100_000 {
			err = fmt.Errorf("%s is %q; set it to a whole number from %d, or leave it unset", name, text, least)
			return 0, false
		}
		return n, true
	}
	warmIP, byIP := count("WARM_IP_TARGET", 0)
	minimum, byMinimum := count("MINIMUM_IP_TARGET", 0)
	warmPrefix, byPrefix := count("WARM_PREFIX_TARGET", 0)
	warmENI, byENI := count("WARM_ENI_TARGET", 0)
	maxENI, limited := count("MAX_ENI", 1)
	cooldown, cools := count("IP_COOLDOWN_PERIOD", 0)
	if text, ok := lookup("ENABLE_PREFIX_DELEGATION"); ok && text != "" && err == nil {
		on, boolErr := strconv.ParseBool(text)
		if boolErr != nil {
			err = fmt.Errorf("ENABLE_PREFIX_DELEGATION is %q; set it to true or false, or leave it unset", text)
		}
		prefixes = prefixes || on
	}
	if err != nil {
		return nil, err
	}
	return func(c *ipam.Config) {
		c.Prefixes = prefixes
		if limited {
			c.MaxENIs = min(maxENI, c.Limits.ENIs)
		}
		if cools {
			c.Cooldown = time.Duration(cooldown) * time.Second
		}
		switch {
		case byIP || byMinimum:
			c.Floor, c.Minimum = warmIP, minimum
		case byPrefix && prefixes:
			c.Floor = warmPrefix * ipam.PrefixAddresses
		case byENI:
			c.Floor = warmENI * (c.Limits.IPv4PerENI - 1)
			if prefixes {
				c.Floor *= ipam.PrefixAddresses
			}
		}
	}, nil
}

// snatKnobs reads the AWS VPC CNI's settings of source addresses: the first is
// overridden by --snat, if that is given; ranges add to those of --snat-exclude.
func snatKnobs(lookup func(string) (string, bool), given bool, o *options) error {
	const external, exclude = "AWS_VPC_K8S_CNI_EXTERNALSNAT", "AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS"
	if text, ok := lookup(external); ok && text != "" {
		on, err := strconv.ParseBool(text)
		if err != nil {
			return fmt.Errorf("%s is %q; set it to true or false, or leave it unset", external, text)
		}
		if on && !given {
			o.snat = datapath.SNATNone
		}
	}
	if text, ok := lookup(exclude); ok && text != "" {
		more, err := parseRanges(text)
		if err != nil {
			return fmt.Errorf("%s: %w", exclude, err)
		}
		o.snatExclude = append(o.snatExclude, more...)
	}
	return nil
}

// parseRanges reads IPv4 ranges with commas between them.
func parseRanges(text string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, s := range strings.Split(text, ",") {
		p, err := netip.ParsePrefix(strings.TrimSpace(s))
		if err != nil || !p.Addr().Is4() {
			return nil, fmt.Errorf("%q is no IPv4 range, such as 198.51.100.0/24", s)
		}
		out = append(out, p.Masked())
	}
	return out, nil
}
