package chaos

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Quota is a limit of the account.
type Quota string

// The quotas that are kept.
const (
	QuotaInterfaces         Quota = "interfaces-per-zone" // network interfaces, of whatever use
	QuotaVPCs               Quota = "vpcs"
	QuotaSubnets            Quota = "subnets-per-vpc"
	QuotaCIDRs              Quota = "cidrs-per-vpc"
	QuotaGroups             Quota = "groups" // security groups
	QuotaGroupsPerInterface Quota = "groups-per-interface"
	QuotaRules              Quota = "rules-per-group" // per direction and address family
	QuotaRouteTables        Quota = "route-tables-per-vpc"
	QuotaRoutes             Quota = "routes-per-table" // per address family; a prefix list counts as many as it may have
	QuotaACLs               Quota = "acls-per-vpc"
	QuotaACLRules           Quota = "rules-per-acl" // per direction and address family
	QuotaPrefixLists        Quota = "prefix-lists"
	QuotaListEntries        Quota = "entries-per-prefix-list"
	QuotaGateways           Quota = "internet-gateways"
	QuotaElastic            Quota = "elastic-ips"
	QuotaNATs               Quota = "nat-gateways-per-zone"
	QuotaPeerings           Quota = "peerings-per-vpc"         // active ones
	QuotaPendingPeerings    Quota = "pending-peerings-per-vpc" // that it asked for

	QuotaIPv6CIDRs  Quota = "ipv6-cidrs-per-vpc"
	QuotaEgressOnly Quota = "egress-only-internet-gateways"
)

// quotas are the limits of an account that never asked for another, and what
// may be had for the asking (Amazon VPC User Guide, "Quotas", 2026; 0: nothing
// is published). The quota of interfaces is of the Region, but each zone has it
// for itself.
var quotas = map[Quota]struct{ first, most int }{
	QuotaInterfaces:         {5000, 0},
	QuotaVPCs:               {5, 0},
	QuotaSubnets:            {200, 0},
	QuotaCIDRs:              {5, 50},
	QuotaIPv6CIDRs:          {5, 50},
	QuotaGroups:             {2500, 0},
	QuotaGroupsPerInterface: {5, 16},
	QuotaRules:              {60, 1000},
	QuotaRouteTables:        {200, 0},
	QuotaRoutes:             {500, 1000},
	QuotaACLs:               {200, 0},
	QuotaACLRules:           {20, 40},
	QuotaPrefixLists:        {100, 0},
	QuotaListEntries:        {1000, 0},
	QuotaGateways:           {5, 0},
	QuotaEgressOnly:         {5, 0},
	QuotaElastic:            {5, 0},
	QuotaNATs:               {5, 0},
	QuotaPeerings:           {50, 125},
	QuotaPendingPeerings:    {25, 0},
}

// maxRulesOnInterface bounds the product of groups per interface and rules per
// group (same source).
const maxRulesOnInterface = 1000

// Quota returns a limit: what the settings say, or what AWS gives to begin
// with.
func (s *Settings) Quota(q Quota) int {
	if n, ok := s.Quotas[q]; ok {
		return n
	}
	return quotas[q].first
}

func (s *Settings) validateQuotas() (errs []error) {
	for _, q := range slices.Sorted(maps.Keys(s.Quotas)) {
		n := s.Quotas[q]
		switch k, ok := quotas[q]; {
		case !ok:
			errs = append(errs, noQuota(q))
		case n < 0 || n > 1e6:
			errs = append(errs, fmt.Errorf("quota %s is %d: give a number from 0 to 1000000", q, n))
		case k.most > 0 && n > k.most:
			errs = append(errs, fmt.Errorf("quota %s is %d: AWS gives no more than %d", q, n, k.most))
		}
	}
	if g, r := s.Quota(QuotaGroupsPerInterface), s.Quota(QuotaRules); g*r > maxRulesOnInterface {
		errs = append(errs, fmt.Errorf("quotas %s and %s are %d and %d: AWS allows a product of %d at most", QuotaGroupsPerInterface, QuotaRules, g, r, maxRulesOnInterface))
	}
	return errs
}

func noQuota(q Quota) error {
	return fmt.Errorf("quota %s: there is none of this name; there are %s", q, strings.Join(QuotaNames(), ", "))
}

// QuotaNames lists the names of the quotas.
func QuotaNames() []string {
	var names []string
	for _, q := range slices.Sorted(maps.Keys(quotas)) {
		names = append(names, string(q))
	}
	return names
}

// ParseQuota reads NAME=N.
func ParseQuota(s string) (Quota, int, error) {
	name, number, ok := strings.Cut(s, "=")
	n, err := strconv.Atoi(number)
	if !ok || err != nil {
		return "", 0, fmt.Errorf("quota %q: write NAME=N, as in %s=20", s, QuotaInterfaces)
	}
	if _, ok := quotas[Quota(name)]; !ok {
		return "", 0, noQuota(Quota(name))
	}
	return Quota(name), n, nil
}
