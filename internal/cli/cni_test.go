package cli

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
)

// scripted returns a runtime whose plugin is a shell script.
func scripted(t *testing.T, script string) *runtime {
	t.Helper()
	h, f := aLab(t)
	n := f.Lab.Nodes[0]
	n.Netns = "" // our own
	plugin := filepath.Join(t.TempDir(), "underlay-cni")
	if err := os.WriteFile(plugin, []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := writeCNI(n, plugin); err != nil {
		t.Fatal(err)
	}
	rt, err := newRuntime(h, n)
	if err != nil {
		t.Fatal(err)
	}
	return rt
}

var aPod = &podFile{Pod: Pod{Name: "web", Netns: "/run/netns/ul-demo-pod-web"}, ContainerID: "demo-web-01020304"}

func TestADD(t *testing.T) {
	rt := scripted(t, `
config=$(cat)
case "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME $CNI_NETNS $CNI_ARGS" in
"ADD demo-web-01020304 eth0 /run/netns/ul-demo-pod-web "*"K8S_POD_NAME=web"*) ;;
*) echo "$CNI_COMMAND $CNI_ARGS" >&2; exit 1 ;;
esac
case $config in *agent.sock*) ;; *) echo "no socket in $config" >&2; exit 1 ;; esac
echo '{"cniVersion":"1.1.0","interfaces":[{"name":"ul1"},{"name":"eth0","mac":"02:75:0a:00:00:07","sandbox":"/run/netns/ul-demo-pod-web"}],"ips":[{"address":"10.0.0.7/32","interface":1}]}'
`)
	got, err := rt.add(t.Context(), aPod)
	if err != nil {
		t.Fatal(err)
	}
	if want := (addResult{ip: "10.0.0.7", mac: "02:75:0a:00:00:07"}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestADDFails(t *testing.T) {
	for name, c := range map[string]struct {
		script, says string
		code         uint
	}{
		"with an error of CNI": {`echo '{"cniVersion":"1.1.0","code":103,"msg":"the node is full; use a larger one"}'; exit 1`, "CNI ADD: the node is full; use a larger one (code 103)", 103},
		"with details":         {`echo '{"code":100,"msg":"no agent","details":"refused"}'; exit 1`, "CNI ADD: no agent (refused) (code 100)", 100},
		"without a word":       {`echo broken >&2; exit 3`, "exit status 3: broken", 0},
		"with garbage":         {`echo '{"cniVersion":'`, "CNI ADD", 0},
		"without an address":   {`echo '{"cniVersion":"1.1.0"}'`, "without an address", 0},
	} {
		_, err := scripted(t, c.script).add(t.Context(), aPod)
		if err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "failed (add)") && c.code != 0 {
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
		var ce *types.Error
		if errors.As(err, &ce) != (c.code != 0) || (ce != nil && ce.Code != c.code) {
			t.Errorf("%s: code of %v is not %d", name, err, c.code)
		}
	}
}
