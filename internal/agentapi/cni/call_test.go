package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/agentapi/pipe"
)

// backend notes what it was asked.
type backend struct {
	asked []string
	err   error
}

func (b *backend) note(what string) error {
	b.asked = append(b.asked, what)
	return b.err
}

func (b *backend) Add(_ context.Context, a *agentapi.Attachment, _ time.Duration, f *os.File) (*agentapi.Result, error) {
	return &agentapi.Result{Addr: netip.MustParseAddr("10.0.0.9"), Gateway: netip.MustParseAddr("169.254.1.1"), MAC: "02:75:0a:00:00:09", HostIfName: "ul1", MTU: 9001},
		b.note(fmt.Sprintf("add %s/%s %s %s %v", a.ContainerID, a.IfName, a.Netns, a.Pod, f != nil))
}
func (b *backend) Del(_ context.Context, a *agentapi.Attachment) error {
	return b.note("del " + a.ContainerID)
}
func (b *backend) Check(_ context.Context, a *agentapi.Attachment, _ *os.File) error {
	return b.note("check " + a.Addr.String())
}
func (b *backend) GC(_ context.Context, valid []agentapi.Attachment) error {
	return b.note(fmt.Sprintf("gc %d", len(valid)))
}
func (b *backend) Status(context.Context) error { return b.note("status") }

func call(command, config string, env ...string) *pipe.Call {
	return &pipe.Call{Env: append(env, "CNI_COMMAND="+command, "CNI_CONTAINERID=c1", "CNI_IFNAME=eth0", "CNI_PATH=/p", "CNI_NETNS=/proc/self/ns/net", "CNI_ARGS=K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web"), Stdin: []byte(config)}
}

func configOf(version, more string) string {
	return fmt.Sprintf(`{"cniVersion":%q,"name":"underlay","type":"underlay-cni"%s}`, version, more)
}

func TestVerbs(t *testing.T) {
	ns, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	prev := `,"prevResult":{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","sandbox":"/n"}],"ips":[{"address":"10.0.0.9/32","interface":0}]}`
	for _, tc := range []struct {
		name  string
		call  *pipe.Call
		asked []string
		code  uint // 0: it succeeds
	}{
		{"add", call("ADD", configOf("1.1.0", "")), []string{"add c1/eth0 /proc/self/ns/net shop/web true"}, 0},
		{"del", call("DEL", configOf("1.1.0", "")), []string{"del c1"}, 0},
		{"del without a namespace", call("DEL", configOf("0.3.1", ""), "CNI_NETNS="), []string{"del c1"}, 0},
		{"check", call("CHECK", configOf("1.1.0", prev)), []string{"check 10.0.0.9"}, 0},
		{"gc", call("GC", configOf("1.1.0", `,"cni.dev/valid-attachments":[{"containerID":"c","ifname":"eth0"}]`), "CNI_CONTAINERID="), []string{"gc 1"}, 0},
		{"status", call("STATUS", configOf("1.1.0", ""), "CNI_CONTAINERID=", "CNI_IFNAME="), []string{"status"}, 0},

		{"check without a result", call("CHECK", configOf("1.1.0", "")), nil, 7},
		{"check in a version without", call("CHECK", configOf("0.3.1", prev)), nil, 1},
		{"gc in a version without", call("GC", configOf("1.0.0", "")), nil, 1},
		{"gc without a list", call("GC", configOf("1.1.0", "")), nil, 7},
		{"status in a version without", call("STATUS", configOf("1.0.0", "")), nil, 1},
		{"unknown version", call("ADD", configOf("9.9.9", "")), nil, 1},
		{"old version", call("ADD", configOf("0.2.0", "")), nil, 1},
		{"no version", call("ADD", `{"name":"n"}`), nil, 1},
		{"no JSON", call("ADD", `{`), nil, 6},
		{"no container", call("ADD", configOf("1.1.0", ""), "CNI_CONTAINERID="), nil, 4},
		{"container that is a path", call("DEL", configOf("1.1.0", ""), "CNI_CONTAINERID=../x"), nil, 4},
		{"long container", call("DEL", configOf("1.1.0", ""), "CNI_CONTAINERID="+strings.Repeat("c", 129)), nil, 4},
		{"bad interface", call("ADD", configOf("1.1.0", ""), "CNI_IFNAME=a/b"), nil, 4},
		{"no namespace", call("ADD", configOf("1.1.0", ""), "CNI_NETNS="), nil, 4},
		{"no path", call("ADD", configOf("1.1.0", ""), "CNI_PATH="), nil, 4},
		{"unknown command", call("DANCE", configOf("1.1.0", "")), nil, 4},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := &backend{}
			exit, out := Run(t.Context(), b, tc.call, ns)
			var e struct {
				Code uint
				Msg  string
			}
			if tc.code != 0 {
				if err := json.Unmarshal(out, &e); err != nil || exit != pipe.ExitFailed || e.Code != tc.code || !strings.Contains(e.Msg, "; ") {
					t.Errorf("%d, %s, %v; want code %d and a next step", exit, out, err, tc.code)
				}
			} else if exit != pipe.ExitOK {
				t.Errorf("%s", out)
			}
			if diff := cmp.Diff(tc.asked, b.asked); diff != "" {
				t.Errorf("-want +asked:\n%s", diff)
			}
		})
	}
}

func TestResultInEachVersion(t *testing.T) {
	for version, ip := range map[string]string{
		"0.3.1": `{"address":"10.0.0.9/32","gateway":"169.254.1.1","interface":1,"version":"4"}`,
		"0.4.0": `{"address":"10.0.0.9/32","gateway":"169.254.1.1","interface":1,"version":"4"}`,
		"1.0.0": `{"address":"10.0.0.9/32","gateway":"169.254.1.1","interface":1}`,
		"1.1.0": `{"address":"10.0.0.9/32","gateway":"169.254.1.1","interface":1}`,
	} {
		exit, out := Run(t.Context(), &backend{}, call("ADD", configOf(version, "")), nil)
		var res struct {
			CNIVersion string
			IPs        []map[string]any
			Routes     []map[string]any
		}
		if err := json.Unmarshal(out, &res); err != nil || exit != pipe.ExitOK {
			t.Fatalf("%s: %s, %v", version, out, err)
		}
		got, _ := json.Marshal(res.IPs[0])
		if res.CNIVersion != version || string(got) != ip || len(res.IPs) != 1 || len(res.Routes) != 1 || res.Routes[0]["dst"] != "0.0.0.0/0" {
			t.Errorf("%s: %s", version, out)
		}
	}
}

func TestBackendsErrorsKeepTheirCode(t *testing.T) {
	for want, err := range map[string]error{
		`"code": 101`: agentapi.Errorf(agentapi.CodeNoAddress, "none; wait"),
		`"code": 199`: errors.New("broken"),
	} {
		if exit, out := Run(t.Context(), &backend{err: err}, call("ADD", configOf("1.1.0", "")), nil); exit != pipe.ExitFailed || !strings.Contains(string(out), want) {
			t.Errorf("%v: %s", err, out)
		}
	}
}

func TestNamespaceThatIsNone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{path, "/proc/self/ns/uts"} {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		b := &backend{}
		if exit, out := Run(t.Context(), b, call("ADD", configOf("1.1.0", "")), f); exit != pipe.ExitFailed || !strings.Contains(string(out), `"code": 8`) || b.asked != nil {
			t.Errorf("%s: %s", path, out)
		}
		f.Close()
	}
}
