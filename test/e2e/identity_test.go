package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/test/lab"
)

// Who a workload is comes from whoever started it, and a new agent still knows.
func TestIdentityOfWorkloads(t *testing.T) {
	l := lab.Up(t, "--nodes", "1")
	n := l.Nodes[0]
	config := fmt.Sprintf(`{"cniVersion":"1.0.0","name":"underlay","type":"underlay-cni","socket":%q}`, n.AgentSocket)
	const uid = "7f7b8c9e-1d2a-4c53-9f6e-0a1b2c3d4e5f"
	want := map[string]agentapi.Pod{}
	for id, tc := range map[string]struct {
		args string
		want agentapi.Pod
	}{
		"kubernetes": {"IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=c;K8S_POD_UID=" + uid, agentapi.Pod{Namespace: "shop", Name: "web-0", UID: uid}},
		"nomad":      {"IgnoreUnknown=true;NOMAD_REGION=global;NOMAD_NAMESPACE=default;NOMAD_JOB_ID=api;NOMAD_GROUP_NAME=web;NOMAD_ALLOC_ID=" + uid + ";Colour=blue", agentapi.Pod{Namespace: "default", Name: "api/web", UID: uid}},
		"long":       {"NOMAD_NAMESPACE=" + strings.Repeat("n", 128) + ";NOMAD_JOB_ID=" + strings.Repeat("j", 400), agentapi.Pod{Namespace: strings.Repeat("n", 55) + "~dd2411b9", Name: strings.Repeat("j", 247) + "~9d821d0d"}},
		"nobody":     {"Colour=blue;;odd", agentapi.Pod{}},
	} {
		name := "ul-" + l.Name + "-pod-" + id
		if err := nl.NewNamed(name); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = nl.DeleteNamed(name) })
		if _, e := plugin(t, "ADD", nl.Path(name), config, "CNI_CONTAINERID="+id, "CNI_ARGS="+tc.args); e != nil {
			t.Fatalf("ADD of %s: %+v", id, e)
		}
		want[id] = tc.want
	}
	known := func() map[string]agentapi.Pod {
		pods := map[string]agentapi.Pod{}
		for _, e := range l.Inspect(n).Endpoints {
			pods[e.ContainerID] = e.Pod
		}
		return pods
	}
	if diff := cmp.Diff(want, known()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	l.Kill("underlay-agent", n.Name)
	l.Underlay("node", "restart-agent", n.Name)
	if diff := cmp.Diff(want, known()); diff != "" {
		t.Errorf("after a restart, -want +got:\n%s", diff)
	}
	if _, e := plugin(t, "GC", "", strings.Replace(config, "1.0.0", "1.1.0", 1)[:len(config)-1]+`,"cni.dev/valid-attachments":[]}`); e != nil {
		t.Errorf("GC: %+v", e)
	}
}
