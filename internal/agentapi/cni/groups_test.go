package cni

import (
	"slices"
	"strings"
	"testing"
)

func TestGroupsOf(t *testing.T) {
	for _, tc := range []struct {
		name, config, args string
		want               []string
		wrong              string // in the error
	}{
		{name: "none", config: `{"name":"n"}`, args: "IgnoreUnknown=1;K8S_POD_NAME=web"},
		{name: "arguments", config: `{"name":"n"}`, args: "IgnoreUnknown=1;UNDERLAY_SECURITY_GROUPS=sg-2, app,sg-2,", want: []string{"app", "sg-2"}},
		{name: "none in the arguments", config: `{"name":"n"}`, args: "UNDERLAY_SECURITY_GROUPS="},
		{name: "runtimeConfig", config: `{"name":"n","runtimeConfig":{"securityGroups":["sg-1"]}}`, want: []string{"sg-1"}},
		{name: "args.cni", config: `{"name":"n","args":{"cni":{"securityGroups":["sg-1","sg-0"]}}}`, want: []string{"sg-0", "sg-1"}},
		{name: "args.cni as a text", config: `{"name":"n","args":{"cni":{"securityGroups":"sg-1,sg-0"}}}`, want: []string{"sg-0", "sg-1"}},
		{name: "of the network", config: `{"name":"n","securityGroups":["sg-1"]}`, want: []string{"sg-1"}},
		{name: "the request counts", config: `{"name":"n","securityGroups":["sg-1"]}`, args: "UNDERLAY_SECURITY_GROUPS=sg-2", want: []string{"sg-2"}},
		{name: "said twice", config: `{"name":"n","args":{"cni":{"securityGroups":["b","a"]}}}`, args: "UNDERLAY_SECURITY_GROUPS=a,b", want: []string{"a", "b"}},
		{name: "two things", config: `{"name":"n","runtimeConfig":{"securityGroups":["sg-1"]}}`, args: "UNDERLAY_SECURITY_GROUPS=sg-2", wrong: "CNI_ARGS says sg-2 and runtimeConfig.securityGroups says sg-1"},
		{name: "a number", config: `{"name":"n","securityGroups":7}`, wrong: "securityGroups is 7"},
		{name: "numbers", config: `{"name":"n","args":{"cni":{"securityGroups":[7]}}}`, wrong: "args.cni.securityGroups is [7]"},
		{name: "null", config: `{"name":"n","securityGroups":null,"args":{"cni":null},"runtimeConfig":{}}`},
	} {
		c, err := parseConfig([]byte(tc.config))
		if err != nil {
			t.Fatalf("%s: %v", tc.name, err)
		}
		got, err := groupsOf(c, tc.args)
		switch {
		case tc.wrong == "" && (err != nil || !slices.Equal(got, tc.want)):
			t.Errorf("%s: %q, %v, want %q", tc.name, got, err, tc.want)
		case tc.wrong != "" && (err == nil || !strings.Contains(err.Error(), tc.wrong)):
			t.Errorf("%s: %v, want an error that says %q", tc.name, err, tc.wrong)
		}
	}
}

func TestModeOf(t *testing.T) {
	for _, tc := range []struct{ config, args, want, wrong string }{
		{config: `{"name":"n"}`},
		{config: `{"name":"n","securityGroupsMode":"host"}`, want: "host"},
		{config: `{"name":"n","securityGroupsMode":"host"}`, args: "UNDERLAY_SECURITY_GROUPS_MODE=vpc", want: "vpc"},
		{config: `{"name":"n","args":{"cni":{"securityGroupsMode":"host"}}}`, want: "host"},
		{config: `{"name":"n"}`, args: "UNDERLAY_SECURITY_GROUPS_MODE=both", wrong: "securityGroupsMode is both; give vpc or host"},
		{config: `{"name":"n","securityGroupsMode":{}}`, wrong: "securityGroupsMode is {}; give vpc or host"},
	} {
		c, err := parseConfig([]byte(tc.config))
		if err != nil {
			t.Fatal(err)
		}
		got, err := modeOf(c, tc.args)
		if got != tc.want || (err == nil) != (tc.wrong == "") || err != nil && !strings.Contains(err.Error(), tc.wrong) {
			t.Errorf("%s %s: %q, %v", tc.config, tc.args, got, err)
		}
	}
}

func TestSubnetOf(t *testing.T) {
	for _, tc := range []struct{ config, args, want, wrong string }{
		{config: `{"name":"n"}`},
		{config: `{"name":"n","subnet":"subnet-0a"}`, want: "subnet-0a"},
		{config: `{"name":"n","subnet":"subnet-0a"}`, args: "IgnoreUnknown=1;UNDERLAY_SUBNET=subnet-0b", want: "subnet-0b"},
		{config: `{"name":"n","runtimeConfig":{"subnet":"subnet-0c"}}`, want: "subnet-0c"},
		{config: `{"name":"n","args":{"cni":{"subnet":"subnet-0c"}}}`, args: "UNDERLAY_SUBNET=subnet-0b", wrong: "say it in one place"},
		{config: `{"name":"n"}`, args: "UNDERLAY_SUBNET=mine", wrong: "give one by its ID"},
		{config: `{"name":"n","subnet":["subnet-0a","subnet-0b"]}`, wrong: "give one by its ID"},
		{config: `{"name":"n","subnet":7}`, wrong: "give a subnet by its ID"},
	} {
		c, err := parseConfig([]byte(tc.config))
		if err != nil {
			t.Fatal(err)
		}
		got, err := subnetOf(c, tc.args)
		if got != tc.want || (err == nil) != (tc.wrong == "") || err != nil && !strings.Contains(err.Error(), tc.wrong) {
			t.Errorf("%s %s: %q, %v", tc.config, tc.args, got, err)
		}
	}
}
