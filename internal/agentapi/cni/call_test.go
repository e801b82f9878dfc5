package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
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
	return &agentapi.Result{Addr: netip.MustParseAddr("10.0.0.9"), Gateway: netip.MustParseAddr("169.254.1.1"), MAC: "02:75:0a:00:00:09", HostIfName: "ul1", HostMAC: "02:00:00:00:00:01", MTU: 9001},
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

// What ADD answers in each version, whole: what a version does not have is not
// said in it.
func TestResultInEachVersion(t *testing.T) {
	const (
		ips0 = `"ips":[{"version":"4","interface":1,"address":"10.0.0.9/32","gateway":"169.254.1.1"}],`
		ips1 = `"ips":[{"interface":1,"address":"10.0.0.9/32","gateway":"169.254.1.1"}],`
		ifs  = `"interfaces":[{"name":"ul1","mac":"02:00:00:00:00:01"},{"name":"eth0","mac":"02:75:0a:00:00:09","sandbox":"/proc/self/ns/net"}],`
		mtus = `"interfaces":[{"name":"ul1","mac":"02:00:00:00:00:01","mtu":9001},{"name":"eth0","mac":"02:75:0a:00:00:09","mtu":9001,"sandbox":"/proc/self/ns/net"}],`
		rest = `"routes":[{"dst":"0.0.0.0/0","gw":"169.254.1.1"}]`
		dns  = `,"dns":{"nameservers":["10.0.0.2"],"search":["shop.internal"]}`
	)
	for _, tc := range []struct{ version, more, want string }{
		{"0.3.1", "", ifs + ips0 + rest + `,"dns":{}`},
		{"0.4.0", "", ifs + ips0 + rest + `,"dns":{}`},
		{"1.0.0", "", ifs + ips1 + rest},
		{"1.1.0", "", mtus + ips1 + rest},
		{"0.3.1", dns, ifs + ips0 + rest + dns},
		{"0.4.0", dns, ifs + ips0 + rest + dns},
		{"1.0.0", dns, ifs + ips1 + rest + dns},
		{"1.1.0", dns, mtus + ips1 + rest + dns},
	} {
		exit, out := Run(t.Context(), &backend{}, call("ADD", configOf(tc.version, tc.more)), nil)
		var got, want any
		if err := json.Unmarshal(out, &got); err != nil || exit != pipe.ExitOK {
			t.Fatalf("%s: %d, %s, %v", tc.version, exit, out, err)
		}
		if err := json.Unmarshal([]byte(`{"cniVersion":"`+tc.version+`",`+tc.want+`}`), &want); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s%s: -want +got:\n%s", tc.version, tc.more, diff)
		}
		// CHECK takes the same back, from the version that has it.
		b := &backend{}
		exit, out = Run(t.Context(), b, call("CHECK", configOf(tc.version, `,"prevResult":`+string(out))), nil)
		if tc.version == "0.3.1" {
			if exit != pipe.ExitFailed || !strings.Contains(string(out), `"code": 1,`) || b.asked != nil {
				t.Errorf("CHECK in %s: %d, %s", tc.version, exit, out)
			}
		} else if exit != pipe.ExitOK || len(out) != 0 || len(b.asked) != 1 || b.asked[0] != "check 10.0.0.9" {
			t.Errorf("CHECK in %s: %d, %s, asked %q", tc.version, exit, out, b.asked)
		}
	}
}

// Which version has which command.
func TestVersionOfEachVerb(t *testing.T) {
	prev := `,"cni.dev/valid-attachments":[],"prevResult":{"cniVersion":"0.4.0","interfaces":[{"name":"eth0","sandbox":"/n"}],"ips":[{"version":"4","address":"10.0.0.9/32","interface":0}]}`
	for version, has := range map[string]string{
		"":      "",
		"0.1.0": "",
		"0.2.0": "",
		"0.3.0": "",
		"0.3.1": "ADD DEL",
		"0.4.0": "ADD DEL CHECK",
		"1.0.0": "ADD DEL CHECK",
		"1.1.0": "ADD DEL CHECK GC STATUS",
		"1.2.0": "",
		"2.0.0": "",
		"one":   "",
	} {
		for _, command := range []string{"ADD", "DEL", "CHECK", "GC", "STATUS"} {
			b := &backend{}
			exit, out := Run(t.Context(), b, call(command, configOf(version, strings.ReplaceAll(prev, "0.4.0", version))), nil)
			switch {
			case slices.Contains(strings.Fields(has), command):
				if exit != pipe.ExitOK || len(b.asked) != 1 {
					t.Errorf("%s in %q: %d, %s", command, version, exit, out)
				}
			case exit != pipe.ExitFailed || !strings.Contains(string(out), `"code": 1,`) || b.asked != nil:
				t.Errorf("%s in %q: %d, %s, want code 1", command, version, exit, out)
			}
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
