package main

import (
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/datapath"
	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

func TestKnobs(t *testing.T) {
	limits, _ := vpc.LimitsOf("m5.large") // 3 ENIs of 10 addresses
	type want struct {
		floor, minimum, maxENIs int
		cooldown                time.Duration
		prefixes                bool
	}
	for _, tc := range []struct {
		env  string
		flag bool
		want want
	}{
		{"", false, want{floor: 1, cooldown: 30 * time.Second}},
		{"", true, want{floor: 1, cooldown: 30 * time.Second, prefixes: true}},
		{"WARM_IP_TARGET=", false, want{floor: 1, cooldown: 30 * time.Second}},
		{"WARM_IP_TARGET=5 MINIMUM_IP_TARGET=10", false, want{floor: 5, minimum: 10, cooldown: 30 * time.Second}},
		{"MINIMUM_IP_TARGET=10 WARM_ENI_TARGET=1", false, want{minimum: 10, cooldown: 30 * time.Second}},
		{"WARM_ENI_TARGET=1", false, want{floor: 9, cooldown: 30 * time.Second}},
		{"WARM_ENI_TARGET=1 ENABLE_PREFIX_DELEGATION=true", false, want{floor: 144, cooldown: 30 * time.Second, prefixes: true}},
		{"WARM_PREFIX_TARGET=2 WARM_ENI_TARGET=1", true, want{floor: 32, cooldown: 30 * time.Second, prefixes: true}},
		{"WARM_PREFIX_TARGET=2 WARM_ENI_TARGET=1", false, want{floor: 9, cooldown: 30 * time.Second}},
		{"MAX_ENI=2 IP_COOLDOWN_PERIOD=0", false, want{floor: 1, maxENIs: 2}},
		{"MAX_ENI=40", false, want{floor: 1, maxENIs: 3, cooldown: 30 * time.Second}},
	} {
		tune, err := knobs(environ(tc.env), tc.flag)
		if err != nil {
			t.Errorf("%s: %v", tc.env, err)
			continue
		}
		c := ipam.Default()
		c.Limits = limits
		tune(&c)
		got := want{c.Floor, c.Minimum, c.MaxENIs, c.Cooldown, c.Prefixes}
		if diff := cmp.Diff(tc.want, got, cmp.AllowUnexported(want{})); diff != "" {
			t.Errorf("%s, --prefixes=%v (-want +got):\n%s", tc.env, tc.flag, diff)
		}
	}
	for _, env := range []string{"WARM_IP_TARGET=many", "MINIMUM_IP_TARGET=-1", "MAX_ENI=0", "IP_COOLDOWN_PERIOD=30s", "ENABLE_PREFIX_DELEGATION=maybe", "WARM_ENI_TARGET=99999999999"} {
		name, _, _ := strings.Cut(env, "=")
		if _, err := knobs(environ(env), false); err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "set it to") {
			t.Errorf("%s: %v", env, err)
		}
	}
}

func TestSNATKnobs(t *testing.T) {
	for _, tc := range []struct {
		env, args string
		mode      datapath.SNAT
		exclude   string
	}{
		{"", "", datapath.SNATByENI, "[]"},
		{"AWS_VPC_K8S_CNI_EXTERNALSNAT=true", "", datapath.SNATNone, "[]"},
		{"AWS_VPC_K8S_CNI_EXTERNALSNAT=false", "", datapath.SNATByENI, "[]"},
		{"AWS_VPC_K8S_CNI_EXTERNALSNAT=true", "--snat=primary", datapath.SNATByPrimary, "[]"},
		{"AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS=198.51.100.0/24,192.0.2.9/25", "--snat-exclude 203.0.113.0/24", datapath.SNATByENI, "[203.0.113.0/24 198.51.100.0/24 192.0.2.0/25]"},
	} {
		for _, v := range strings.Fields(tc.env) {
			name, value, _ := strings.Cut(v, "=")
			t.Setenv(name, value)
		}
		o, err := parseFlags(strings.Fields(tc.args), io.Discard)
		if err != nil || o.snat != tc.mode || fmt.Sprint(o.snatExclude) != tc.exclude {
			t.Errorf("%s %s: %s %v, %v", tc.env, tc.args, o.snat, o.snatExclude, err)
		}
		for _, v := range strings.Fields(tc.env) {
			name, _, _ := strings.Cut(v, "=")
			t.Setenv(name, "")
		}
	}
	for _, env := range []string{"AWS_VPC_K8S_CNI_EXTERNALSNAT=perhaps", "AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS=10.0.0.0"} {
		name, _, _ := strings.Cut(env, "=")
		if err := snatKnobs(environ(env), false, &options{}); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", env, err)
		}
	}
}

func environ(text string) func(string) (string, bool) {
	return func(name string) (string, bool) {
		for _, pair := range strings.Fields(text) {
			if k, v, _ := strings.Cut(pair, "="); k == name {
				return v, true
			}
		}
		return "", false
	}
}
