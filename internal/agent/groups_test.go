package agent

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/vpc"
)

const testVPC = vpc.VPCID("vpc-0123456789abcdef0")

func (r *rig) addTo(id string, groups ...string) (*agentapi.Result, error) {
	return r.a.Add(r.t.Context(), &agentapi.Attachment{ContainerID: id, IfName: "eth0", Netns: "/run/netns/" + id, Pod: agentapi.Pod{Namespace: "ns", Name: id}, Groups: groups}, 0, r.netns)
}

// withGroups gives the cloud security groups a, b, … f and another VPC's.
func (r *rig) withGroups() {
	for i, name := range strings.Split("abcdef", "") {
		r.cloud.groups = append(r.cloud.groups, vpc.SecurityGroup{ID: vpc.SecurityGroupID(fmt.Sprintf("sg-%017d", i+1)), Name: name, VPC: testVPC})
	}
	r.cloud.groups = append(r.cloud.groups, vpc.SecurityGroup{ID: "sg-00000000000000099", Name: "a", VPC: "vpc-other"})
}

const (
	sgA = "sg-00000000000000001"
	sgB = "sg-00000000000000002"
	sgC = "sg-00000000000000003"
)

// Pods get an address on an interface that carries exactly their set, whatever
// the order in which they name it and by what.
func TestPodsBySecurityGroups(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		r.withGroups()
		r.start()
		var wg sync.WaitGroup
		for i, groups := range [][]string{{sgA, "b"}, {"b", "a"}, {"a", sgB}, {"c"}, nil} {
			wg.Go(func() {
				if _, err := r.addTo(fmt.Sprint("c", i), groups...); err != nil {
					t.Errorf("add c%d: %v", i, err)
				}
			})
		}
		wg.Wait()
		in := r.inspect()
		on := map[string][]string{}
		for _, e := range in.Endpoints {
			on[e.ContainerID] = e.Groups
			i := slices.IndexFunc(in.ENIs, func(n agentapi.ENI) bool { return n.ID == e.ENI })
			if d := cmp.Diff(in.ENIs[i].Groups, e.Groups); d != "" {
				t.Errorf("%s on an interface of other groups: %s", e.ContainerID, d)
			}
		}
		want := map[string][]string{"c0": {sgA, sgB}, "c1": {sgA, sgB}, "c2": {sgA, sgB}, "c3": {sgC}, "c4": {"sg-0123456789abcdef0"}}
		if d := cmp.Diff(want, on); d != "" {
			t.Errorf("groups of the pods (-want +got):\n%s", d)
		}
		if len(in.ENIs) != 3 || in.SetsLeft != 0 || len(in.Sets) != 3 || !in.Sets[0].Node || in.Sets[1].InUse != 3 || in.Sets[2].InUse != 1 {
			t.Errorf("%d interfaces, %d sets left, sets %+v", len(in.ENIs), in.SetsLeft, in.Sets)
		}
		if r.cloud.asked > 10 { // at most two by five, and answers are shared
			t.Errorf("%d calls for the groups of five pods", r.cloud.asked)
		}
		asked := r.cloud.asked
		if _, err := r.addTo("c9", sgB, "a"); err != nil {
			t.Errorf("add: %v", err)
		}
		if r.cloud.asked != asked {
			t.Errorf("EC2 is asked again for groups that are known")
		}

		// A repeated ADD has the same answer, and one for other groups none.
		if _, err := r.addTo("c3", "c"); err != nil {
			t.Errorf("repeated add: %v", err)
		}
		_, err := r.addTo("c3", "a", "b")
		wantCode(t, err, agentapi.CodeConflict, "with security groups "+sgC+", and ADD asks for security groups "+sgA+","+sgB)
		_, err = r.addTo("c3")
		wantCode(t, err, agentapi.CodeConflict, "ADD asks for the node's own security groups")

		// A fourth set finds no interface: it waits to the end, and says who has them.
		began := time.Now()
		_, err = r.addTo("c5", "d")
		wantCode(t, err, agentapi.CodeSetsFull, "the 3 of a m5.large serve the node's own groups: 1 (1 pod), "+sgA+","+sgB+": 1 (4 pods), "+sgC+": 1 (1 pod); schedule the pod on another node")
		if d := time.Since(began); d != DefaultAddTimeout {
			t.Errorf("it waited %s, want %s", d, DefaultAddTimeout)
		}

		// The sets are the same to the next agent.
		r.start()
		if _, err := r.addTo("c6", "c"); err != nil {
			t.Errorf("add after a restart: %v", err)
		}
		if in := r.inspect(); len(in.ENIs) != 3 || in.Sets[2].InUse != 2 {
			t.Errorf("after a restart: %d interfaces, sets %+v", len(in.ENIs), in.Sets)
		}
	})
}

func TestGroupsThatAreNotToBeHad(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		r.withGroups()
		notices := &fakeOrchestrator{}
		r.orchestrator = notices
		r.start()
		for _, tc := range []struct {
			groups []string
			says   string
		}{
			{[]string{"a", "sg-00000000000000777"}, "EC2 knows no security group sg-00000000000000777 in vpc-0123456789abcdef0; check"},
			{[]string{"nobody"}, "EC2 knows no security group nobody in"},
			{[]string{"sg-00000000000000099"}, "sg-00000000000000099 belongs to vpc-other, and the node is in vpc-0123456789abcdef0; name"},
			{[]string{"a", "b", "c", "d", "e", "f"}, "6 security groups are asked for (a,b,c,d,e,f), and a network interface carries at most 5; name fewer"},
		} {
			_, err := r.addTo("c1", tc.groups...)
			wantCode(t, err, agentapi.CodeGroups, tc.says)
		}
		if _, err := r.addTo("c1", "a", sgA, "b", "c", "d", "e"); err != nil { // five, one of them twice
			t.Errorf("five groups: %v", err)
		}
		if n := r.cloud.written(); n != 4 { // the floor, and create, attach, keep
			t.Errorf("%d calls that change something: %v", n, r.cloud.writes)
		}
	})
}

// While EC2 throttles, an ADD that needs to know a group waits; when it is
// denied, it says what is missing.
func TestGroupsWhileEC2Refuses(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		r.withGroups()
		r.start()
		r.mustAdd("c0")
		until := time.Now().Add(10 * time.Second)
		r.cloud.setFail(func(call string) error {
			if call == "describe-groups" && time.Now().Before(until) {
				return apiError("RequestLimitExceeded")
			}
			return nil
		})
		if _, err := r.addTo("c1", "a"); err != nil {
			t.Errorf("throttled: %v", err)
		}
		r.cloud.setFail(func(call string) error {
			if call == "describe-groups" {
				return apiError("RequestLimitExceeded")
			}
			return nil
		})
		_, err := r.addTo("c2", "b")
		wantCode(t, err, agentapi.CodeTryAgain, "EC2 did not say in time what security groups b are")
		r.cloud.setFail(func(call string) error {
			if call == "describe-groups" {
				return apiError("UnauthorizedOperation")
			}
			return nil
		})
		_, err = r.addTo("c3", "b")
		wantCode(t, err, agentapi.CodeDenied, "attach the documented IAM policy")
		r.mustAdd("c4") // who asks for no group is not concerned
	})
}
