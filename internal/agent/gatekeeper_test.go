package agent

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/datapath"
	"github.com/underlay-cni/underlay/internal/policy"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// endpointOf returns what the kernel has of a container.
func (d *fakeDatapath) endpointOf(id string) datapath.Endpoint {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, e := range d.records {
		if e.ContainerID == id && e.State == datapath.Live {
			return e
		}
	}
	return datapath.Endpoint{}
}

// passes reports whether the kernel would let a TCP connection from one pod of
// the node to another pass: by the sender's egress and the receiver's ingress.
func (r *rig) passes(from, to string, port uint16) bool {
	r.t.Helper()
	f, t := r.kernel.endpointOf(from), r.kernel.endpointOf(to)
	if !f.Addr.IsValid() || !t.Addr.IsValid() {
		r.t.Fatalf("%s or %s is not there", from, to)
	}
	flow := policy.Flow{Src: f.Addr, Dst: t.Addr, Protocol: policy.TCP, SrcPort: 40000, DstPort: port}
	r.kernel.mu.Lock()
	defer r.kernel.mu.Unlock()
	for dir, e := range map[policy.Direction]datapath.Endpoint{policy.Egress: f, policy.Ingress: t} {
		tables := r.kernel.tables[e.HostIfIndex]
		if tables.Gates[policy.Groups] != nil && !tables.Judge(dir, flow)[policy.Groups].Allow {
			return false
		}
	}
	return true
}

func rule(id string, group vpc.SecurityGroupID, port int, from vpc.SecurityGroupID) vpc.SecurityGroupRule {
	return vpc.SecurityGroupRule{ID: "sgr-" + id, Group: group, Protocol: 6, FromPort: port, ToPort: port, Referenced: from}
}

func everything(group vpc.SecurityGroupID) vpc.SecurityGroupRule {
	return vpc.SecurityGroupRule{ID: "sgr-out-" + string(group), Group: group, Egress: true, Protocol: -1, FromPort: -1, ToPort: -1, CIDR: netip.MustParsePrefix("0.0.0.0/0")}
}

func (c *fakeCloud) setRules(rules ...vpc.SecurityGroupRule) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rules = rules
}

func (c *fakeCloud) reads() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ruleReads
}

// Three tiers on one node: each reaches the next, and nothing else passes; a rule
// that goes or comes has its effect within a second.
func TestTiersOnOneNode(t *testing.T) {
	run(t, "m5.xlarge", func(r *rig) {
		r.withGroups()
		r.judges = true
		node := vpc.SecurityGroupID("sg-0123456789abcdef0")
		rules := []vpc.SecurityGroupRule{everything(sgA), everything(sgB), everything(sgC), everything(node), rule("1", sgB, 8080, sgA), rule("2", sgC, 5432, sgB), rule("3", sgA, 80, node)}
		r.cloud.setRules(rules...)
		r.start()
		r.mustAdd("plain")
		r.mustAdd("other")
		time.Sleep(time.Minute)
		if n := r.cloud.reads(); n != 0 || r.kernel.puts > 0 && !r.passes("plain", "other", 1) {
			t.Errorf("%d reads of rules on a node where nobody asked for groups", n)
		}
		for id, group := range map[string]string{"web": "a", "app": "b", "db": "c"} {
			if _, err := r.addTo(id, group); err != nil {
				t.Fatalf("add %s: %v", id, err)
			}
		}
		check := func(want map[string]bool) {
			t.Helper()
			for _, from := range []string{"plain", "web", "app", "db"} {
				for _, to := range []string{"plain", "web", "app", "db"} {
					for _, port := range []uint16{80, 8080, 5432} {
						if from == to {
							continue
						}
						k := fmt.Sprintf("%s %s %d", from, to, port)
						if got := r.passes(from, to, port); got != want[k] {
							t.Errorf("%s: passes %v, want %v", k, got, want[k])
						}
					}
				}
			}
		}
		want := map[string]bool{"web app 8080": true, "app db 5432": true, "plain web 80": true}
		check(want)
		if !r.passes("plain", "other", 1234) || !r.passes("other", "plain", 80) {
			t.Errorf("pods that asked for nothing do not reach each other")
		}
		in := r.inspect()
		if p := in.Policy; p == nil || p.Mode != "vpc" || p.Judged != 5 || p.Groups != 4 || p.Rules != 7 || p.Read == nil || p.Error != "" {
			t.Errorf("status %+v", p)
		}

		// A rule is revoked, another comes.
		r.cloud.setRules(append(slices.Clone(rules[:4]), rules[5], rules[6], rule("4", node, 8080, sgC))...)
		time.Sleep(time.Second)
		synctest.Wait()
		check(map[string]bool{"app db 5432": true, "plain web 80": true, "db plain 8080": true})

		// Unchanged rules cost nothing but the read.
		puts, reads := r.kernel.puts, r.cloud.reads()
		time.Sleep(20 * time.Second)
		synctest.Wait()
		if r.kernel.puts != puts || r.cloud.reads() == reads {
			t.Errorf("%d tables put in place for nothing, %d reads", r.kernel.puts-puts, r.cloud.reads()-reads)
		}

		// The next agent puts the same in place, and goes on.
		r.start()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		check(map[string]bool{"app db 5432": true, "plain web 80": true, "db plain 8080": true})

		// With the last pod that asked, the reads end.
		r.del("web")
		r.del("app")
		r.del("db")
		time.Sleep(time.Second)
		synctest.Wait()
		reads = r.cloud.reads()
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := r.cloud.reads(); n != reads {
			t.Errorf("%d reads for nobody", n-reads)
		}
		if !r.passes("plain", "other", 80) {
			t.Error("pods that asked for nothing do not reach each other")
		}
		for _, id := range []string{"plain", "other"} {
			if r.kernel.tables[r.kernel.endpointOf(id).HostIfIndex].Gates[policy.Groups] != nil {
				t.Errorf("%s is judged still", id)
			}
		}
	})
}

// ADD returns when the rules are in the kernel, or fails: while EC2 does not say
// what they are, no pod of the set comes up, and no other pod is held up.
func TestAddWaitsForRules(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		r.withGroups()
		r.judges = true
		r.cloud.setRules(everything(sgA), rule("1", sgA, 80, sgA))
		r.start()
		r.mustAdd("plain")
		until := time.Now().Add(20 * time.Second)
		r.cloud.setFail(func(call string) error {
			if call == "describe-rules" && time.Now().Before(until) {
				return apiError("RequestLimitExceeded")
			}
			return nil
		})
		added := make(chan error)
		go func() {
			_, err := r.addTo("c1", "a")
			added <- err
		}()
		time.Sleep(15 * time.Second)
		r.mustAdd("plain-2") // waits for nobody's rules
		if r.kernel.endpointOf("c1").Addr.IsValid() {
			t.Error("a pod is up before its policy")
		}
		if err := <-added; err != nil || time.Now().Before(until) {
			t.Errorf("add: %v", err)
		}
		if _, err := r.addTo("c2", "a"); err != nil {
			t.Errorf("add: %v", err)
		}
		if !r.passes("c1", "c2", 80) || r.passes("c1", "c2", 81) || r.passes("plain", "c1", 80) {
			t.Error("the rules are not in the kernel")
		}

		r.cloud.setFail(func(call string) error {
			if call == "describe-rules" {
				return apiError("UnauthorizedOperation")
			}
			return nil
		})
		_, err := r.addTo("c3", "b")
		wantCode(t, err, agentapi.CodeDenied, "EC2 denies the node to read the rules of the pod's security groups (UnauthorizedOperation")
		if r.kernel.endpointOf("c3").Addr.IsValid() {
			t.Error("a pod is up without its policy")
		}
		if !r.passes("c1", "c2", 80) || r.passes("c1", "c2", 81) {
			t.Error("what was known is forgotten")
		}
	})
}

// Reads slow down while EC2 throttles, and find back.
func TestRulesAreReadWithinABudget(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		r.withGroups()
		r.judges = true
		r.start()
		if _, err := r.addTo("c1", "a"); err != nil {
			t.Fatal(err)
		}
		count := func(d time.Duration) int {
			before := r.cloud.reads()
			time.Sleep(d)
			return r.cloud.reads() - before
		}
		if n := count(time.Minute); n < 70 || n > 100 {
			t.Errorf("%d reads a minute", n)
		}
		refused := 0
		r.cloud.setFail(func(call string) error {
			if call == "describe-rules" {
				refused++
				return apiError("RequestLimitExceeded")
			}
			return nil
		})
		time.Sleep(5 * time.Minute)
		r.cloud.mu.Lock()
		n := refused
		r.cloud.mu.Unlock()
		if n < 5 || n > 20 {
			t.Errorf("%d refused reads in five minutes", n)
		}
		r.cloud.setFail(nil)
		time.Sleep(10 * time.Minute)
		if n := count(time.Minute); n < 70 {
			t.Errorf("%d reads a minute after it is over", n)
		}
	})
}

// A prefix list is read again when its version is another.
func TestPrefixListsInRules(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		r.withGroups()
		r.judges = true
		r.cloud.lists = map[vpc.PrefixListID][]netip.Prefix{"pl-1": {netip.MustParsePrefix("10.0.0.0/20")}}
		in := rule("1", sgB, 80, "")
		in.PrefixList = "pl-1"
		r.cloud.setRules(everything(sgA), in)
		r.start()
		for id, group := range map[string]string{"web": "a", "app": "b"} {
			if _, err := r.addTo(id, group); err != nil {
				t.Fatal(err)
			}
		}
		if !r.passes("web", "app", 80) || r.passes("web", "app", 81) {
			t.Error("the list's entries do not count")
		}
		time.Sleep(10 * time.Second)
		if n := r.cloud.listReads; n > 2 {
			t.Errorf("the list is read %d times", n)
		}
		r.cloud.mu.Lock()
		r.cloud.lists["pl-1"] = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("198.51.100.0/24")}
		r.cloud.mu.Unlock()
		time.Sleep(time.Second)
		synctest.Wait()
		if r.passes("web", "app", 80) {
			t.Error("the list's old entries count")
		}
	})
}

// In mode host a pod has an address of the node's own, and the node judges all
// that it says by the groups that it asked for, with the members that EC2 knows.
// Status tells.
func TestGroupsOfModeHost(t *testing.T) {
	run(t, "t3.small", func(r *rig) {
		r.withGroups()
		r.judges = true
		out := netip.MustParseAddr("10.0.9.9")
		r.cloud.members = map[vpc.SecurityGroupID][]netip.Prefix{sgB: {netip.PrefixFrom(out, 32)}}
		in := rule("1", sgA, 80, sgB)
		r.cloud.setRules(everything(sgB), in)
		r.start()
		host := func(id string, groups ...string) error {
			_, err := r.a.Add(r.t.Context(), &agentapi.Attachment{ContainerID: id, IfName: "eth0", Groups: groups, GroupsMode: agentapi.GroupsHost}, 0, r.netns)
			return err
		}
		if err := host("c1", "a"); err != nil {
			t.Fatal(err)
		}
		ep := r.kernel.endpointOf("c1")
		if !ep.GroupsHere || ep.Groups != sgA || ep.ENI != "eni-00000000000000001" {
			t.Errorf("endpoint %+v", ep)
		}
		allows := func(dir policy.Direction, peer netip.Addr, port uint16) bool {
			r.kernel.mu.Lock()
			defer r.kernel.mu.Unlock()
			f := policy.Flow{Src: peer, Dst: ep.Addr, Protocol: policy.TCP, SrcPort: 40000, DstPort: port}
			if dir == policy.Egress {
				f.Src, f.Dst = f.Dst, f.Src
			}
			tables := r.kernel.tables[ep.HostIfIndex]
			return tables.Gates[policy.Groups] != nil && tables.Judge(dir, f)[policy.Groups].Allow
		}
		other, dns := netip.MustParseAddr("10.0.9.10"), netip.MustParseAddr("169.254.169.253")
		if !allows(policy.Ingress, out, 80) || allows(policy.Ingress, out, 81) || allows(policy.Ingress, other, 80) || allows(policy.Egress, out, 80) || !allows(policy.Egress, dns, 53) {
			t.Error("the groups are not what judges it")
		}
		// A member comes.
		r.cloud.mu.Lock()
		r.cloud.members[sgB] = append(r.cloud.members[sgB], netip.PrefixFrom(other, 32))
		r.cloud.mu.Unlock()
		time.Sleep(time.Second)
		synctest.Wait()
		if !allows(policy.Ingress, other, 80) {
			t.Error("a group's new member is not let in")
		}
		st := r.inspect()
		if st.Policy.Mode != "vpc" || st.Policy.Host != 1 || st.Policy.Members != 2 || st.Endpoints[0].GroupsMode != "host" || st.Endpoints[0].Groups[0] != sgA || st.SetsLeft != 2 {
			t.Errorf("status %+v, %+v", st.Policy, st.Endpoints[0])
		}
		if err := host("c1", "a"); err != nil {
			t.Errorf("repeated: %v", err)
		}
		_, err := r.addTo("c1", "a")
		wantCode(t, err, agentapi.CodeConflict, "send DEL first")
		wantCode(t, host("c1", "b"), agentapi.CodeConflict, "send DEL first")

		// The next agent knows by the record.
		r.start()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if st := r.inspect(); st.Policy.Host != 1 || !allows(policy.Ingress, out, 80) || allows(policy.Ingress, out, 81) {
			t.Errorf("after a restart: %+v", st.Policy)
		}
		r.judges = false
		r.start()
		wantCode(t, host("c2", "a"), agentapi.CodeGroups, "ask for mode vpc")
	})
}

func (r *rig) looked() uint64 {
	r.a.gate.mu.Lock()
	defer r.a.gate.mu.Unlock()
	return r.a.gate.looked
}

// What an ADD costs the gatekeeper does not depend on how many pods there are.
func TestGateLooksAtWhatChanged(t *testing.T) {
	run(t, "m5.24xlarge", func(r *rig) {
		r.withGroups()
		r.judges = true
		r.cloud.setRules(everything(sgA), everything(sgB))
		r.start()
		id := func(i int) string { return fmt.Sprintf("c%03d", i) }
		cost := func(from, n int, add func(int)) float64 {
			before := r.looked()
			for i := range n {
				add(from + i)
			}
			synctest.Wait()
			return float64(r.looked()-before) / float64(n)
		}
		plain := func(i int) { r.mustAdd(id(i)) }
		few := cost(0, 50, plain)
		many := cost(50, 350, plain)
		t.Logf("pods looked at by an ADD: %.1f beside none, %.1f beside 50 to 400", few, many)
		if many > 4 {
			t.Errorf("an ADD looks at %.1f pods", many)
		}
		if r.kernel.puts != 0 {
			t.Errorf("%d tables for nobody", r.kernel.puts)
		}
		// One that asks for groups is looked at with all that it speaks to, once.
		if _, err := r.addTo("asks", "a"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		grouped := cost(401, 20, func(i int) {
			if _, err := r.addTo(id(i), "b"); err != nil {
				t.Fatal(err)
			}
		})
		t.Logf("of a pod with groups beside 400: %.1f", grouped)
		if grouped > 30 { // itself, and those of its groups
			t.Errorf("an ADD with groups looks at %.1f pods", grouped)
		}
	})
}

// Whatever came and went before: the tables are those that an agent makes who
// sees the node for the first time.
func TestTablesDoNotDependOnHistory(t *testing.T) {
	run(t, "m5.4xlarge", func(r *rig) {
		r.withGroups()
		r.judges = true
		rules := []vpc.SecurityGroupRule{everything(sgA), everything(sgB), everything(sgC), everything("sg-0123456789abcdef0"),
			rule("1", sgB, 8080, sgA), rule("2", sgC, 5432, sgB), rule("3", sgA, 80, "sg-0123456789abcdef0")}
		r.cloud.setRules(rules...)
		r.start()
		digests := func() map[string]string {
			time.Sleep(2 * time.Second)
			synctest.Wait()
			out := map[string]string{}
			r.kernel.mu.Lock()
			defer r.kernel.mu.Unlock()
			for _, e := range r.kernel.records {
				if e.State != datapath.Live {
					continue
				}
				out[e.ContainerID] = "unjudged"
				if table := r.kernel.tables[e.HostIfIndex].Gates[policy.Groups]; table != nil {
					out[e.ContainerID] = fmt.Sprintf("%x", table.Digest)
				}
			}
			return out
		}
		random := rand.New(rand.NewPCG(3, 4))
		here := map[string]bool{}
		for i := range 120 {
			id := fmt.Sprintf("c%d", random.IntN(12))
			switch {
			case here[id]:
				r.del(id)
				delete(here, id)
			default:
				var err error
				switch g := []string{"", "", "a", "b", "c", "host"}[random.IntN(6)]; g {
				case "":
					_, err = r.add(id)
				case "host":
					_, err = r.a.Add(r.t.Context(), &agentapi.Attachment{ContainerID: id, IfName: "eth0", Groups: []string{"b"}, GroupsMode: agentapi.GroupsHost}, 0, r.netns)
				default:
					_, err = r.addTo(id, g)
				}
				if err != nil {
					t.Fatalf("step %d: add %s: %v", i, id, err)
				}
				here[id] = true
			}
			if random.IntN(4) == 0 {
				r.cloud.setRules(rules[:4+random.IntN(4)]...)
			}
			if i%6 != 0 {
				continue
			}
			by := digests()
			r.start()
			if fresh := digests(); !maps.Equal(by, fresh) {
				t.Fatalf("step %d: tables\n%v\nthe next agent makes\n%v", i, by, fresh)
			}
		}
	})
}
