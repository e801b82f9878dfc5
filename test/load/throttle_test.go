package load

import (
	"encoding/json"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/test/lab"
)

// drain takes the account's tokens of the actions that give nodes addresses,
// with calls that EC2 lets through and refuses for what they ask.
func drain(t *testing.T, l *lab.Lab) {
	t.Helper()
	const eni = "eni-0123456789abcdef0"
	var wg sync.WaitGroup
	for action, params := range map[string]map[string]string{
		"AssignPrivateIpAddresses":        {"NetworkInterfaceId": eni, "SecondaryPrivateIpAddressCount": "1"},
		"CreateNetworkInterface":          {"SubnetId": "subnet-0123456789abcdef0"},
		"AttachNetworkInterface":          {"NetworkInterfaceId": eni, "InstanceId": "i-0123456789abcdef0", "DeviceIndex": "1"},
		"ModifyNetworkInterfaceAttribute": {"NetworkInterfaceId": eni, "SourceDestCheck.Value": "true"},
	} {
		wg.Go(func() {
			for n := 0; n < 1000; n++ {
				err := l.Call(action, params, new(struct{}))
				switch {
				case err == nil:
					t.Errorf("%s of what is not there succeeds", action)
					return
				case strings.Contains(err.Error(), "RequestLimitExceeded"):
					return
				case !strings.Contains(err.Error(), "NotFound"):
					t.Error(err)
					return
				}
			}
			t.Errorf("the tokens for %s have no end", action)
		})
	}
	wg.Wait()
}

// Twenty nodes get their pods at once, when the account's token buckets are
// empty: EC2 throttles most of the calls, and no ADD fails. How long it takes is
// told and not asserted: on a small machine the nodes want for its processors.
// (The simulator asserts it: TestTwentyNodesAtOnce in internal/sim.)
func TestTwentyNodesThrottled(t *testing.T) {
	const nodes = 20
	for _, tc := range []struct {
		name string
		args []string
		per  int           // pods on each node, of which a t3.small holds 9, or 144 with prefixes
		mut  int           // calls that each node needs of the action of which it needs most
		tail time.Duration // after the last of them
	}{
		{"single addresses", nil, 8, 2, 50*time.Millisecond + time.Second + 500*time.Millisecond}, // two interfaces
		{"prefixes", []string{"--prefixes"}, 20, 1, 500 * time.Millisecond},                       // beside the floor's
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := lab.Up(t, append([]string{"--nodes", strconv.Itoa(nodes), "--instance-type", "t3.small"}, tc.args...)...)
			for _, n := range l.Nodes {
				l.AwaitFree(n, 1, freeSoon)
			}
			l.Chaos("--throttle", "aws")
			drain(t, l)
			l.Chaos(append([]string{"--throttle", "aws"}, slowEC2...)...)
			writes := l.Writes()
			began := time.Now()
			var made []lab.Pod
			if err := json.Unmarshal([]byte(l.Underlay("run", "many", "--count", strconv.Itoa(nodes*tc.per), "-o", "json")), &made); err != nil {
				t.Fatal(err)
			}
			took := time.Since(began)
			on := map[string]int{}
			seen := map[netip.Addr]string{}
			slowest := 0.0
			for _, p := range made {
				if p.Error != "" {
					t.Errorf("%s on %s: %s", p.Name, p.Node, p.Error)
				}
				if other := seen[p.IP]; other != "" {
					t.Errorf("%s and %s both have %s", p.Name, other, p.IP)
				}
				seen[p.IP] = p.Name
				on[p.Node]++
				slowest = max(slowest, p.AddMillis)
			}
			if len(made) != nodes*tc.per || len(on) != nodes {
				t.Errorf("%d pods on %d nodes", len(made), len(on))
			}
			least := time.Duration(nodes*tc.mut)*time.Second/5 + tc.tail // at five tokens a second
			t.Logf("%d pods up after %s, slowest ADD %.1f s; the buckets allow %s, ratio %.2f; %d EC2 writes, the throttled included",
				len(made), took.Round(100*time.Millisecond), slowest/1000, least, took.Seconds()/least.Seconds(), l.Writes()-writes)
		})
	}
}
