package e2e

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/test/lab"
)

// plugin runs underlay-cni as a runtime would, and returns the error that it
// printed, nil when it refused nothing.
func plugin(t *testing.T, command, netns, config string, env ...string) (string, *lab.CNIError) {
	t.Helper()
	out, err := lab.Plugin(t, config, append([]string{"CNI_COMMAND=" + command, "CNI_CONTAINERID=bad-input", "CNI_NETNS=" + netns}, env...)...)
	var e *lab.CNIError
	errors.As(err, &e)
	return out, e
}

// Bad input gets the CNI error code and a message with the next step, and the
// agent goes on as if nothing had been.
func TestBadInput(t *testing.T) {
	l := lab.Up(t, "--nodes", "1")
	n := l.Nodes[0]
	config := func(version, socket string) string {
		return fmt.Sprintf(`{"cniVersion":%q,"name":"underlay","type":"underlay-cni","socket":%q}`, version, socket)
	}
	good := config("1.1.0", n.AgentSocket)
	netns := "ul-" + l.Name + "-pod-bad"
	if err := nl.NewNamed(netns); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nl.DeleteNamed(netns) })
	path := nl.Path(netns)

	// A file that is no namespace.
	notNetns := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(notNetns, nil, 0o600); err != nil {
		t.Fatal(err)
	}

	for _, tc := range []struct {
		name, command, netns, config string
		env                          []string
		code                         uint
		says                         []string // each must be in the message
	}{
		{"config that is no JSON", "ADD", path, "{", nil, 6, nil},
		{"config without a socket that exists", "ADD", path, config("1.1.0", "/run/underlay/none/agent.sock"), nil, 100, []string{"/run/underlay/none/agent.sock"}},
		{"unknown CNI version", "ADD", path, config("9.9.9", n.AgentSocket), nil, 1, []string{"9.9.9"}},
		{"missing netns", "ADD", "/run/netns/ul-none", good, nil, 8, []string{"/run/netns/ul-none"}},
		{"netns that is a file", "ADD", notNetns, good, nil, 8, []string{notNetns}},
		{"no container ID", "ADD", path, good, []string{"CNI_CONTAINERID="}, 4, nil},
		{"bad interface name", "ADD", path, good, []string{"CNI_IFNAME=a/b"}, 4, nil},
		{"CHECK of what was never added", "CHECK", path, `{"cniVersion":"1.1.0","name":"underlay","type":"underlay-cni","socket":"` + n.AgentSocket + `","prevResult":{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","sandbox":"` + path + `"}],"ips":[{"address":"10.0.0.9/32","interface":0}]}}`, nil, 3, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			out, e := plugin(t, tc.command, tc.netns, tc.config, tc.env...)
			if e == nil {
				t.Fatalf("accepted: %s", out)
			}
			if e.Code != tc.code {
				t.Errorf("code %d, want %d (%s)", e.Code, tc.code, e.Msg)
			}
			for _, s := range tc.says {
				if !strings.Contains(out, s) {
					t.Errorf("%s\ndoes not mention %s", out, s)
				}
			}
		})
	}

	t.Run("DEL of what was never added", func(t *testing.T) {
		if _, e := plugin(t, "DEL", path, good); e != nil {
			t.Errorf("%+v", e)
		}
	})

	t.Run("garbage on the socket", func(t *testing.T) {
		for name, b := range map[string][]byte{
			"nothing":          nil,
			"half a length":    {0, 0},
			"oversized":        binary.BigEndian.AppendUint32(nil, 1<<30),
			"no JSON":          append(binary.BigEndian.AppendUint32(nil, 4), "{{{{"...),
			"cut off":          append(binary.BigEndian.AppendUint32(nil, 400), "{"...),
			"text":             []byte("GET / HTTP/1.1\r\n\r\n"),
			"unknown op":       append(binary.BigEndian.AppendUint32(nil, 30), `{"version":1,"op":"selfdestr"}`...),
			"add with nothing": append(binary.BigEndian.AppendUint32(nil, 24), `{"version":1,"op":"add"}`...),
		} {
			c, err := net.Dial("unix", n.AgentSocket)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = c.Write(b)
			_ = c.(*net.UnixConn).CloseWrite()
			_ = c.SetDeadline(time.Now().Add(5 * time.Second))
			if _, err := io.ReadAll(c); err != nil && !strings.Contains(err.Error(), "reset") {
				t.Errorf("%s: %v", name, err)
			}
			c.Close()
			if in := l.Inspect(n); !in.Healthy {
				t.Errorf("after %s: %s", name, in.Reason)
			}
		}
	})

	t.Run("EC2 denies", func(t *testing.T) {
		l.Run("first") // takes what the pool holds
		l.Chaos("--fail", "AssignPrivateIpAddresses=UnauthorizedOperation:1.0", "--fail", "CreateNetworkInterface=UnauthorizedOperation:1.0")
		defer l.Chaos("--fail", "none")
		var failed bool
		for i := range 5 {
			_, stderr, code := l.Try("run", fmt.Sprintf("denied-%d", i))
			if code != 0 {
				failed = true
				if !strings.Contains(stderr, "UnauthorizedOperation") && !strings.Contains(stderr, "104") {
					t.Errorf("the message does not tell: %s", stderr)
				}
				break
			}
		}
		if !failed {
			t.Error("five pods without a call to EC2")
		}
	})

	t.Run("agent down", func(t *testing.T) {
		l.Kill("underlay-agent", n.Name)
		out, e := plugin(t, "ADD", path, good)
		if e == nil || e.Code != 100 && e.Code != 11 || !strings.Contains(out, n.AgentSocket) {
			t.Errorf("%s %+v", out, e)
		}
		if _, e := plugin(t, "STATUS", "", good); e == nil || e.Code != 50 {
			t.Errorf("STATUS with the agent down: %+v, want code 50", e)
		}
		if _, e := plugin(t, "DEL", path, good); e != nil {
			t.Errorf("DEL with the agent down: %+v", e)
		}
	})
}

// A subnet without addresses is said so, and pods that run are not touched.
func TestSubnetFull(t *testing.T) {
	l := lab.Up(t, "--nodes", "1")
	a := l.Run("a")
	l.FillSubnet(l.Nodes[0].SubnetID)
	var message string
	for i := range 6 {
		if _, stderr, code := l.Try("run", fmt.Sprintf("more-%d", i)); code != 0 {
			message = stderr
			break
		}
	}
	if !strings.Contains(message, l.Nodes[0].SubnetID) || !strings.Contains(message, "address") {
		t.Errorf("the message does not name the subnet: %q", message)
	}
	l.Underlay("exec", "a", "--", "ping", "-c", "1", "-W", "2", l.Nodes[0].IP.String())
	if got := l.Pods()["node-1/a"]; got != a.IP.String() {
		t.Errorf("pod a is known as %s, was %s", got, a.IP)
	}
}
