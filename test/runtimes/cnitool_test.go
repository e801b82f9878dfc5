package runtimes

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/underlay-cni/underlay/test/lab"
)

// The CNI project's cnitool, with all verbs that it has.
func TestCnitool(t *testing.T) {
	w := newWorld(t, `{"cniVersion":"1.1.0","name":"underlay","plugins":[{"type":"underlay-cni"}]}`)
	h := w.h
	build := exec.Command("go", "build", "-o", filepath.Join(lab.Bin, "cnitool"), "github.com/containernetworking/cni/cnitool")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build cnitool: %v\n%s", err, out)
	}
	try := func(verb string) (stdout, stderr string, err error) {
		t.Helper()
		return h.try("env", "CNI_PATH=/opt/cni/bin", "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web", "cnitool", verb, "underlay", "/run/netns/web")
	}
	tool := func(verb string) string {
		t.Helper()
		stdout, stderr, err := try(verb)
		if err != nil {
			t.Fatalf("cnitool %s: %v\n%s%s", verb, err, stdout, stderr)
		}
		return stdout
	}
	// add makes the namespace with a server in it, and returns the container.
	add := func() container {
		t.Helper()
		h.run("ip", "netns", "add", "web")
		out := tool("add")
		var res current.Result
		if err := json.Unmarshal([]byte(out), &res); err != nil || len(res.IPs) != 1 || len(res.Interfaces) != 2 || res.CNIVersion != "1.1.0" {
			t.Fatalf("cnitool add: %v\n%s", err, out)
		}
		addr, _, _ := strings.Cut(res.IPs[0].Address.String(), "/")
		c := container{name: "web", netns: "/run/netns/web", exec: func(args ...string) string {
			args[0] = "/run/bin" + args[0]
			return h.run(append([]string{"ip", "netns", "exec", "web"}, args...)...)
		}}
		for _, e := range w.Inspect(w.node).Endpoints {
			if e.IP.String() == addr && e.State == "live" {
				c.id = e.ContainerID
			}
		}
		h.start("ip", "netns", "exec", "web", "/run/bin/peer", "serve")
		return c
	}

	tool("status")
	web := add()
	first := w.holds(web)
	tool("check")
	h.run("ip", "-n", "web", "route", "del", "default")
	if _, stderr, err := try("check"); err == nil || !strings.Contains(stderr, "route") {
		t.Errorf("CHECK of a container without a default route: %v\n%s", err, stderr)
	}
	tool("del")
	tool("del") // as often as one likes
	w.returned(web.id, first.IP)

	// The agent is gone at DEL.
	h.run("ip", "netns", "del", "web")
	web = add()
	second := w.holds(web)
	w.Kill("underlay-agent", w.node.Name)
	for _, verb := range []string{"status", "check"} {
		if _, stderr, err := try(verb); err == nil || !strings.Contains(stderr, "no agent answers") {
			t.Errorf("cnitool %s without an agent: %v\n%s", verb, err, stderr)
		}
	}
	tool("del")
	w.restartAgent()
	w.returned(web.id, second.IP)

	// Nobody called DEL. cnitool's gc calls it for all that it remembers; then it
	// calls GC without the list of what is in use, and to take that for an empty
	// one would cost every pod of the node its address.
	h.run("ip", "netns", "del", "web")
	web = add()
	third := w.holds(web)
	h.run("ip", "netns", "del", "web")
	if _, stderr, err := try("gc"); err == nil || !strings.Contains(stderr, "valid-attachments") {
		t.Errorf("cnitool gc: %v\n%s", err, stderr)
	}
	w.returned(web.id, third.IP)
	tool("status")
}
