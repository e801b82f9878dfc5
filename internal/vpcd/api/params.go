package api

import (
	"context"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/vpcd/query"
)

// harmless are the parameters that handlers accept and do not honour, because
// nothing that can be seen here depends on them. NAME=VALUE accepts that value
// alone. All else that no handler honours is refused.
var harmless = map[string]map[string]string{
	"*": {
		"DryRun": "answered before the handler is asked",
	},
	"RunInstances": {
		"AdditionalInfo":                                  "reserved by AWS",
		"BlockDeviceMapping":                              "an instance is a network namespace and has no disks",
		"CpuOptions":                                      "an instance has the cores of its host",
		"CreditSpecification":                             "an instance is not billed",
		"EbsOptimized":                                    "an instance has no disks",
		"EnclaveOptions.Enabled=false":                    "the default",
		"HibernationOptions.Configured=false":             "the default",
		"KernelId":                                        "the kernel is the host's",
		"MaintenanceOptions":                              "an instance is not moved",
		"MetadataOptions.HttpProtocolIpv6=disabled":       "the default",
		"NetworkInterface.AssociatePublicIpAddress=false": "the default; the only public addresses are Elastic IPs",
		"NetworkInterface.InterfaceType=interface":        "the default",
		"Placement.Tenancy=default":                       "the default",
		"PrivateDnsNameOptions.EnableResourceNameDnsAAAARecord=false": "the default",
		"RamdiskId":               "the kernel is the host's",
		"EnablePrimaryIpv6=false": "the default",

		"Ipv6Address.IsPrimaryIpv6=false":                    "the default",
		"NetworkInterface.Ipv6Addresses.IsPrimaryIpv6=false": "the default",
		"NetworkInterface.PrimaryIpv6=false":                 "the default",
	},
	"TerminateInstances": {
		"Force":          "a namespace always goes",
		"SkipOsShutdown": "a namespace has no system to shut down",
	},
	"StopInstances": {
		"Hibernate=false": "the default",
		"SkipOsShutdown":  "a namespace has no system to shut down",
	},
	"StartInstances": {
		"AdditionalInfo": "reserved by AWS",
	},
	"AllocateAddress": {
		"Domain=vpc":            "the only one there is",
		"PublicIpv4Pool=amazon": "the only one there is",
	},
	"CreateNatGateway": {
		"AvailabilityMode=zonal": "the default",
	},
	"DetachNetworkInterface": {
		"Force": "a detachment here never hangs",
	},
	"DescribeInstances": {
		"IncludeManagedResources": "no instance is managed by a service",
	},
	"DescribeInstanceStatus": {
		"IncludeManagedResources": "no instance is managed by a service",
	},
	"DescribeNetworkInterfaces": {
		"IncludeManagedResources": "requester-managed interfaces are always listed; hidden ones do not exist",
	},
	"DescribeInstanceTypes": {
		"IncludeUnsupportedInRegion": "every known type is supported",
	},
	"DescribeAvailabilityZones": {
		"AllAvailabilityZones": "there is no zone that is not opted in",
	},
	"DescribeRegions": {
		"AllRegions": "there is no region that is not opted in",
	},
	"CreateSubnet": {
		"Ipv6Native=false": "the default",
	},
	"ModifySubnetAttribute": {
		"MapPublicIpOnLaunch.Value=false":                     "the default; the only public addresses are Elastic IPs",
		"MapCustomerOwnedIpOnLaunch.Value=false":              "the default",
		"EnableDns64.Value=false":                             "the default",
		"EnableResourceNameDnsAAAARecordOnLaunch.Value=false": "the default",
	},
	"CreateNetworkInterface": {
		"InterfaceType=interface": "the default",
		"EnablePrimaryIpv6=false": "the default",

		"Ipv6Addresses.IsPrimaryIpv6=false": "the default",
	},
	"ModifyNetworkInterfaceAttribute": {
		"AssociatePublicIpAddress=false": "the default; the only public addresses are Elastic IPs",
	},
}

// handle makes the handler of an action that honours the parameters named in
// honours: wire names without indices, separated by blanks. A structure's name
// stands for all of it. It panics when one is not a parameter of the action.
func handle[Req, Resp any](action, honours string, fn func(ctx context.Context, req *Req) (*Resp, error)) query.Handler {
	g := guard{action: action, ok: map[string]bool{}}
	for _, p := range strings.Fields(honours) {
		g.ok[p] = true
	}
	for _, table := range []string{"*", action} {
		for p := range harmless[table] {
			g.ok[p] = true
		}
	}
	known := map[string]bool{"DryRun": true}
	paths(reflect.TypeFor[Req](), "", known)
	for p := range g.ok {
		if name, _, _ := strings.Cut(p, "="); !known[name] {
			panic(fmt.Sprintf("api: %s has no parameter %s", action, name))
		}
	}
	h := query.Handle(func(ctx context.Context, req *Req) (*Resp, error) {
		if err := g.check(reflect.ValueOf(req).Elem(), ""); err != nil {
			return nil, err
		}
		return fn(ctx, req)
	})
	h.Refused, _ = g.refused(reflect.TypeFor[Req](), "")
	return h
}

// Ignored is a parameter that an action accepts and that changes nothing.
type Ignored struct {
	Parameter string // NAME, or NAME=VALUE when it is that value alone
	Why       string
}

// IgnoredBy lists the parameters that an action ignores, by name. The action
// "*" stands for all of them.
func IgnoredBy(action string) []Ignored {
	var out []Ignored
	for _, p := range slices.Sorted(maps.Keys(harmless[action])) {
		out = append(out, Ignored{p, harmless[action][p]})
	}
	return out
}

// guard refuses what a handler does not honour.
type guard struct {
	action string
	ok     map[string]bool
}

// refused lists what check refuses below t, a structure as one where all of it
// is.
func (g guard) refused(t reflect.Type, at string) (out []string, all bool) {
	all = true
	for f := range t.Fields() {
		p := at + wireName(f)
		switch s, structured := inner(f.Type); {
		case p == at:
			continue
		case g.ok[p]:
			all = false
		case structured:
			below, whole := g.refused(s, p+".")
			if whole {
				below = []string{p}
			}
			out, all = append(out, below...), all && whole
		default:
			if but := g.value(p); but != "" {
				p, all = p+"≠"+but, false
			}
			out = append(out, p)
		}
	}
	return out, all
}

// value returns the one value that a parameter may have, or "".
func (g guard) value(p string) string {
	for ok := range g.ok {
		if v, found := strings.CutPrefix(ok, p+"="); found {
			return v
		}
	}
	return ""
}

var timeType = reflect.TypeFor[time.Time]()

// inner returns the structure inside t, or false when t holds a plain value.
func inner(t reflect.Type) (reflect.Type, bool) {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice {
		t = t.Elem()
	}
	return t, t.Kind() == reflect.Struct && t != timeType
}

func wireName(f reflect.StructField) string {
	name, _, _ := strings.Cut(f.Tag.Get("q"), ",")
	return name
}

// paths collects the wire names of all parameters below t.
func paths(t reflect.Type, at string, into map[string]bool) {
	for f := range t.Fields() {
		name := wireName(f)
		if name == "" {
			continue
		}
		into[at+name] = true
		if s, ok := inner(f.Type); ok {
			paths(s, at+name+".", into)
		}
	}
}

// check returns an error for the first parameter that is set and not honoured.
func (g guard) check(v reflect.Value, at string) error {
	for f, field := range v.Fields() {
		p := at + wireName(f)
		if p == at || field.IsZero() || g.ok[p] {
			continue
		}
		_, structured := inner(f.Type)
		if structured && field.Kind() == reflect.Slice {
			for i := range field.Len() {
				if err := g.check(field.Index(i), p+"."); err != nil {
					return err
				}
			}
			continue
		}
		if structured {
			if err := g.check(field.Elem(), p+"."); err != nil {
				return err
			}
			continue
		}
		if field.Kind() == reflect.Pointer && g.ok[fmt.Sprintf("%s=%v", p, field.Elem())] {
			continue
		}
		return query.Errorf("UnsupportedOperation", "The parameter %s of %s, or the value given for it, is not supported by vpcd. Leave it out.", p, g.action)
	}
	return nil
}
