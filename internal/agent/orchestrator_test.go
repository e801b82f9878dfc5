package agent

import (
	"fmt"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/agentapi"
)

// fakeOrchestrator notes what it is told.
type fakeOrchestrator struct {
	mu       sync.Mutex
	statuses []NodeStatus // those that differ from the one before
	told     []string     // "pod reason"
	messages map[string]string
	served   []string
}

func (f *fakeOrchestrator) Publish(s NodeStatus) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := len(f.statuses); n == 0 || f.statuses[n-1] != s {
		f.statuses = append(f.statuses, s)
	}
}

func (f *fakeOrchestrator) Tell(p agentapi.Pod, n Notice) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.told = append(f.told, p.Name+" "+n.Reason)
	if f.messages == nil {
		f.messages = map[string]string{}
	}
	f.messages[n.Reason] = n.Message
}

func (f *fakeOrchestrator) Served(p agentapi.Pod) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.served = append(f.served, p.Name)
}

func (f *fakeOrchestrator) Dropped() uint64 { return 7 }

// take returns and forgets what was told.
func (f *fakeOrchestrator) take() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := f.told
	f.told = nil
	return out
}

func (f *fakeOrchestrator) last() NodeStatus {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.statuses[len(f.statuses)-1]
}

func TestNodeIsPublished(t *testing.T) {
	run(t, "m5.large", func(r *rig) { // 3 ENIs of 10 addresses
		o := &fakeOrchestrator{}
		r.orchestrator = o
		r.start()
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if o.statuses[0].Ready || o.statuses[0].Addresses != 0 {
			t.Errorf("at the start: %+v", o.statuses[0])
		}
		if diff := cmp.Diff(NodeStatus{Ready: true, Addresses: 27, ENIs: 1, MaxENIs: 3, FreeAtLeast: 16}, o.last()); diff != "" {
			t.Errorf("ready: %s", diff)
		}
		rec := httptest.NewRecorder()
		r.a.Metrics().ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
		if !strings.Contains(rec.Body.String(), "underlay_notices_dropped_total 7") {
			t.Errorf("metrics:\n%s", rec.Body)
		}
		// A pod that comes and goes moves nothing.
		published := len(o.statuses)
		for i := range 20 {
			id := fmt.Sprint("pod-", i)
			r.mustAdd(id)
			time.Sleep(6 * time.Second)
			r.del(id)
			time.Sleep(6 * time.Second)
		}
		synctest.Wait()
		if n := len(o.statuses); n != published {
			t.Errorf("published %+v", o.statuses[published:])
		}
		for i := range 27 {
			r.mustAdd(fmt.Sprint("full-", i))
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if diff := cmp.Diff(NodeStatus{Ready: true, Addresses: 27, ENIs: 3, MaxENIs: 3}, o.last()); diff != "" {
			t.Errorf("full: %s", diff)
		}
	})
}

func TestFreeIsCoarse(t *testing.T) {
	for _, tc := range []struct{ n, floor int }{{0, 0}, {1, 1}, {2, 2}, {3, 2}, {16, 16}, {31, 16}, {434, 256}} {
		if got := floor2(tc.n); got != tc.floor {
			t.Errorf("floor2(%d) = %d", tc.n, got)
		}
	}
}

// What a pod's users are told: why it waits after two seconds, why it failed,
// and nothing of one that came up at once.
func TestPodsUsersAreTold(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		o := &fakeOrchestrator{}
		r.orchestrator = o
		r.cloud.attach = 8 * time.Second
		r.start()
		for i := range 9 {
			r.mustAdd(fmt.Sprint("quick-", i))
		}
		if got := o.take(); got != nil {
			t.Errorf("told of pods that came up at once: %v", got)
		}
		if len(o.served) != 9 {
			t.Errorf("served %v", o.served)
		}
		r.mustAdd("patient") // needs a second interface
		if diff := cmp.Diff([]string{"patient WaitingForENI"}, o.take()); diff != "" {
			t.Error(diff)
		}
		if o.served[len(o.served)-1] != "patient" {
			t.Errorf("served %v", o.served)
		}

		for reason, code := range map[string]string{
			"EC2Denied": "UnauthorizedOperation", "EC2Throttled": "RequestLimitExceeded", "SubnetFull": "InsufficientFreeAddressesInSubnet",
		} {
			r.cloud.setFail(func(call string) error {
				if strings.HasPrefix(call, "assign") || call == "create" {
					return apiError(code)
				}
				return nil
			})
			for i := range 20 { // until the pool is dry
				if _, err := r.add(fmt.Sprint(reason, i)); err != nil {
					break
				}
			}
			got := strings.Join(o.take(), ", ")
			if !strings.Contains(got, " "+reason) || !strings.Contains(o.messages[reason], "; ") {
				t.Errorf("%s: told %q, message %q", code, got, o.messages[reason])
			}
			r.cloud.setFail(nil)
			time.Sleep(2 * time.Minute)
		}

		for i := range 27 {
			if _, err := r.add(fmt.Sprint("many-", i)); err != nil {
				break
			}
		}
		if got := strings.Join(o.take(), ", "); !strings.Contains(got, " NodeFull") {
			t.Errorf("a full node: told %q", got)
		}
		if m := o.messages["NodeFull"]; !strings.Contains(m, "use a larger instance type") {
			t.Errorf("a full node: %q", m)
		}
	})
}

func TestUnreadyAgentTells(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		o := &fakeOrchestrator{}
		r.orchestrator = o
		r.cloud.noIMDS = apiError("InternalError")
		r.start()
		if _, err := r.add("early"); err == nil {
			t.Fatal("added without IMDS")
		}
		if diff := cmp.Diff([]string{"early AgentNotReady"}, o.take()); diff != "" {
			t.Error(diff)
		}
		if m := o.messages["AgentNotReady"]; !strings.Contains(m, "169.254.169.254") {
			t.Errorf("%q", m)
		}
		if o.last().Ready {
			t.Errorf("published %+v", o.last())
		}
	})
}
