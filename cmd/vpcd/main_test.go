package main

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
)

// run runs the command and returns its output.
func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	c := newCommand()
	c.SetOut(&out)
	c.SetErr(&out)
	c.SetArgs(args)
	err := c.ExecuteContext(t.Context())
	return out.String(), err
}

// vpcdWith answers the chaos endpoint from a Control.
func vpcdWith(t *testing.T, control *chaos.Control) string {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/_vpcd/chaos" {
			t.Errorf("path %s", r.URL.Path)
		}
		switch r.Method {
		case http.MethodPut:
			var s chaos.Settings
			if err := json.NewDecoder(r.Body).Decode(&s); err != nil {
				t.Error(err)
			}
			if err := control.Set(s); err != nil {
				w.WriteHeader(http.StatusBadRequest)
				_ = json.NewEncoder(w).Encode(map[string]string{"error": err.Error()})
				return
			}
		case http.MethodDelete:
			control.Reset()
		}
		_ = json.NewEncoder(w).Encode(control.Get())
	}))
	t.Cleanup(srv.Close)
	return srv.URL
}

// A setting that would be taken for another is refused before anything is made.
func TestServeRefuses(t *testing.T) {
	for _, tt := range []struct{ flag, want string }{
		{"--linklocal-pps=0", "-1 for any"},
		{"--icmp-timeout=1500ms", "whole seconds"},
		{"--tcp-closed-timeout=0", "1s or more"},
		{"--fragment-timeout=-1s", "whole seconds"},
	} {
		if _, err := run(t, "serve", "--no-fabric", "--dir", t.TempDir(), "--listen", "127.0.0.1:0", tt.flag); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", tt.flag, err)
		}
	}
}

func TestChaos(t *testing.T) {
	control := chaos.New(nil)
	url := vpcdWith(t, control)
	steps := []struct {
		args []string
		want string // JSON of the settings thereafter
	}{
		{[]string{"set", "--latency", "50ms", "--attach-latency", "1s", "--imds-lag", "500ms", "--throttle", "aws", "--addresses", "scattered"},
			`{"latency":"50ms","attachLatency":"1s","imdsLag":"500ms","mappingLag":"0s","readLag":"0s","flowInterval":"0s","fileInterval":"0s","freshReads":0,"throttle":"aws","addresses":"scattered","quotas":{},"fail":[]}`},
		{[]string{"set", "--fail", "AssignPrivateIpAddresses=InternalError:3", "--fail", "*=RequestLimitExceeded:0.1"},
			`{"latency":"50ms","attachLatency":"1s","imdsLag":"500ms","mappingLag":"0s","readLag":"0s","flowInterval":"0s","fileInterval":"0s","freshReads":0,"throttle":"aws","addresses":"scattered","quotas":{},"fail":[{"action":"AssignPrivateIpAddresses","code":"InternalError","count":3},{"action":"*","code":"RequestLimitExceeded","probability":0.1}]}`},
		{[]string{"set", "--latency", "0", "--mapping-lag", "1s", "--read-lag", "2s", "--fresh-reads", "0.5"},
			`{"latency":"0s","attachLatency":"1s","imdsLag":"500ms","mappingLag":"1s","readLag":"2s","flowInterval":"0s","fileInterval":"0s","freshReads":0.5,"throttle":"aws","addresses":"scattered","quotas":{},"fail":[{"action":"AssignPrivateIpAddresses","code":"InternalError","count":3},{"action":"*","code":"RequestLimitExceeded","probability":0.1}]}`},
		{[]string{"set", "--flow-interval", "1s"},
			`{"latency":"0s","attachLatency":"1s","imdsLag":"500ms","mappingLag":"1s","readLag":"2s","flowInterval":"1s","fileInterval":"0s","freshReads":0.5,"throttle":"aws","addresses":"scattered","quotas":{},"fail":[{"action":"AssignPrivateIpAddresses","code":"InternalError","count":3},{"action":"*","code":"RequestLimitExceeded","probability":0.1}]}`},
		{[]string{"set", "--flow-interval", "0s", "--quota", "vpcs=2", "--quota", "interfaces-per-zone=0"},
			`{"latency":"0s","attachLatency":"1s","imdsLag":"500ms","mappingLag":"1s","readLag":"2s","flowInterval":"0s","fileInterval":"0s","freshReads":0.5,"throttle":"aws","addresses":"scattered","quotas":{"interfaces-per-zone":0,"vpcs":2},"fail":[{"action":"AssignPrivateIpAddresses","code":"InternalError","count":3},{"action":"*","code":"RequestLimitExceeded","probability":0.1}]}`},
		{[]string{"set", "--fail", "none", "--quota", "none"},
			`{"latency":"0s","attachLatency":"1s","imdsLag":"500ms","mappingLag":"1s","readLag":"2s","flowInterval":"0s","fileInterval":"0s","freshReads":0.5,"throttle":"aws","addresses":"scattered","quotas":{},"fail":[]}`},
		{[]string{"show"},
			`{"latency":"0s","attachLatency":"1s","imdsLag":"500ms","mappingLag":"1s","readLag":"2s","flowInterval":"0s","fileInterval":"0s","freshReads":0.5,"throttle":"aws","addresses":"scattered","quotas":{},"fail":[]}`},
		{[]string{"reset"},
			`{"latency":"0s","attachLatency":"0s","imdsLag":"0s","mappingLag":"0s","readLag":"0s","flowInterval":"0s","fileInterval":"0s","freshReads":0,"throttle":"off","addresses":"lowest","quotas":{},"fail":[]}`},
	}
	for _, s := range steps {
		out, err := run(t, append([]string{"chaos", "--endpoint", url, "-o", "json"}, s.args...)...)
		if err != nil {
			t.Fatalf("%v: %v", s.args, err)
		}
		var got bytes.Buffer
		if err := json.Compact(&got, []byte(out)); err != nil {
			t.Fatalf("%v printed %s", s.args, out)
		}
		if d := cmp.Diff(s.want, got.String()); d != "" {
			t.Errorf("%v (-want +got):\n%s", s.args, d)
		}
	}
	out, err := run(t, "chaos", "--endpoint", url, "set", "--fail", "DescribeVpcs=X:2")
	if err != nil || !strings.Contains(out, "fail            DescribeVpcs=X:2\n") {
		t.Errorf("as text: %s, %v", out, err)
	}
}

func TestRefusals(t *testing.T) {
	t.Setenv("AWS_ENDPOINT_URL", "")
	t.Setenv("AWS_ENDPOINT_URL_EC2", "")
	control := chaos.New(nil)
	url := vpcdWith(t, control)
	stranger := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(stranger.Close)
	tests := []struct {
		args string
		want string
	}{
		{"chaos set --endpoint " + url, "give one, as in --latency 50ms"},
		{"chaos set --endpoint " + url + " --throttle maybe", `give "aws" or "off"`},
		{"chaos set --endpoint " + url + " --fresh-reads 2", "between 0 and 1"},
		{"chaos set --endpoint " + url + " --latency -1s", "between 0 and"},
		{"chaos set --endpoint " + url + " --flow-interval 10ms", "give 1s or more"},
		{"serve --no-fabric --flow-interval 0s", "give 1s to 10m"},
		{"chaos set --endpoint " + url + " --file-interval 10ms", "give 1s or more"},
		{"serve --no-fabric --file-interval 2h", "give 1s to 1h"},
		{"serve --no-fabric --conntrack-allowance -1", "give a number of flows above 0"},
		{"chaos set --endpoint " + url + " --latency soon", "invalid argument"},
		{"chaos set --endpoint " + url + " --fail MakeCoffee=X:1", "no such action"},
		{"chaos set --endpoint " + url + " --fail none --fail *=X:1", "write ACTION=CODE:COUNT"},
		{"chaos set --endpoint " + url + " --quota interfaces=3", "there are acls-per-vpc"},
		{"chaos set --endpoint " + url + " --quota vpcs=some", "write NAME=N"},
		{"chaos set --endpoint " + url + " --quota groups-per-interface=17", "no more than 16"},
		{"chaos set --endpoint " + url + " --quota groups-per-interface=16 --quota rules-per-group=100", "product of 1000"},
		{"chaos show --endpoint " + url + " -o yaml", "give text or json"},
		{"chaos show --endpoint 127.0.0.1:7424", "give a URL"},
		{"chaos show --endpoint http://127.0.0.1:1", "start one with vpcd serve"},
		{"chaos show --endpoint " + stranger.URL, "is no vpcd"},
		{"chaos show surplus", "unknown command"},
		{"serve --name Demo", "a lab's name has"},
		{"serve --no-fabric --zones 0", "1 to 6 zones"},
		{"serve --no-fabric --account 12", "12 digits"},
		{"serve --no-fabric --log-level loud", "debug, info, warn or error"},
		{"destroy --name x/y", "a lab's name has"},
		{"nonsense", "unknown command"},
	}
	for _, tt := range tests {
		out, err := run(t, strings.Fields(tt.args)...)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("vpcd %s: %v (%s); want %q", tt.args, err, out, tt.want)
		}
	}
	if d := cmp.Diff(chaos.Defaults(), control.Get()); d != "" {
		t.Errorf("a refused command changed something: %s", d)
	}
}

func TestVersion(t *testing.T) {
	out, err := run(t, "version", "-o", "json")
	var v version
	if err != nil || json.Unmarshal([]byte(out), &v) != nil || v.Go == "" {
		t.Errorf("%s, %v", out, err)
	}
}

// Every command that a person types has an example.
func TestHelpHasExamples(t *testing.T) {
	root := newCommand()
	for _, c := range root.Commands() {
		all := c.Commands()
		if len(all) == 0 {
			all = append(all, c)
		}
		for _, c := range all {
			if c.Name() != "help" && c.Name() != "completion" && (c.Example == "" || c.Short == "") {
				t.Errorf("%s has no example", c.CommandPath())
			}
		}
	}
}
