package e2e

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/test/lab"
)

// A database and a load balancer of the lab's own making: what EC2 tells of
// their interfaces, what answers behind them, before and after vpcd's restart,
// and that the VPC's resolver knows their names.
func TestManagedServices(t *testing.T) {
	l := lab.Up(t, "--nodes", "1")
	one := l.Run("one", "--", filepath.Join(lab.Bin, "underlay"), "serve-tcp", "--server-name", "one", "--listen", ":8080")
	two := l.Run("two", "--", filepath.Join(lab.Bin, "underlay"), "serve-tcp", "--server-name", "two", "--listen", ":8080")
	var found struct{ SecurityGroups []struct{ GroupID string } }
	l.AWS(&found, "ec2", "describe-security-groups", "--filters", "Name=group-name,Values=underlay-"+l.Name+"-nodes")
	if len(found.SecurityGroups) != 1 {
		t.Fatalf("groups of nodes: %v", found)
	}
	groups := []string{"--group", found.SecurityGroups[0].GroupID}
	l.Underlay(append([]string{"service", "add", "orders"}, groups...)...)
	l.Underlay(append([]string{"service", "add", "lb", "--kind", "load-balancer", "--target", one.IP.String() + ":8080", "--target", two.IP.String() + ":8080"}, groups...)...)

	type service struct {
		Name, Kind, PrivateIPAddress, NetworkInterfaceID string
		Serves                                           bool
	}
	var services []service
	list := func() map[string]service {
		t.Helper()
		if err := json.Unmarshal([]byte(l.Underlay("service", "list", "-o", "json")), &services); err != nil {
			t.Fatal(err)
		}
		all := map[string]service{}
		for _, s := range services {
			all[s.Name] = s
		}
		return all
	}
	all := list()
	ask := func(at string) string {
		out, _, _ := l.Try("exec", "one", "--", "timeout", "5", "bash", "-c", "cat < /dev/tcp/"+at)
		return strings.TrimSpace(out)
	}
	check := func() {
		t.Helper()
		if got, want := ask(all["orders"].PrivateIPAddress+"/5432"), "orders: hello "+one.IP.String(); got != want {
			t.Errorf("the database says %q, want %q", got, want)
		}
		said := map[string]bool{}
		for range 2 {
			said[ask(all["lb"].PrivateIPAddress+"/80")] = true
		}
		from := all["lb"].PrivateIPAddress
		if !said["one: hello "+from] || !said["two: hello "+from] {
			t.Errorf("behind the load balancer: %v", said)
		}
		for name, want := range map[string]string{
			"ip-" + strings.ReplaceAll(from, ".", "-"):                              from,
			"ip-" + strings.ReplaceAll(one.IP.String(), ".", "-"):                   one.IP.String(),
			"ip-" + strings.ReplaceAll(one.IP.String(), ".", "-") + ".ec2.internal": one.IP.String(),
		} {
			if out := l.Underlay("exec", "one", "--", "getent", "ahostsv4", name); !strings.HasPrefix(out, want+" ") {
				t.Errorf("%s is %q to a pod, want %s", name, out, want)
			}
		}
	}
	check()
	var out struct {
		NetworkInterfaces []struct {
			NetworkInterfaceID, Description, InterfaceType, RequesterID string
			RequesterManaged                                            bool
			Attachment                                                  struct{ InstanceID, InstanceOwnerID string }
		}
	}
	l.AWS(&out, "ec2", "describe-network-interfaces", "--filters", "Name=requester-managed,Values=true")
	for _, n := range out.NetworkInterfaces {
		switch got := fmt.Sprint(strings.Join(strings.Split(n.Description, "/")[:min(2, strings.Count(n.Description, "/")+1)], "/"), " ", n.InterfaceType, " ", n.RequesterID, " ", n.Attachment.InstanceOwnerID, n.Attachment.InstanceID); n.NetworkInterfaceID {
		case all["lb"].NetworkInterfaceID:
			if got != "ELB net/lb network_load_balancer amazon-elb amazon-elb" {
				t.Errorf("the load balancer's interface: %s", got)
			}
		case all["orders"].NetworkInterfaceID:
			if got != "RDSNetworkInterface interface amazon-rds amazon-rds" {
				t.Errorf("the database's interface: %s", got)
			}
		}
	}
	if len(out.NetworkInterfaces) != 3 {
		t.Errorf("%d requester-managed interfaces, want those of db-1, orders and lb", len(out.NetworkInterfaces))
	}

	l.Underlay("vpcd", "restart")
	check()
	for name, s := range list() {
		if !s.Serves {
			t.Errorf("%s does not serve after the restart", name)
		}
	}

	// One target goes: the other has it all.
	l.Underlay("rm", "two")
	lab.Eventually(t, 20*time.Second, "all go to the target that is left", func() error {
		for range 2 {
			if got := ask(all["lb"].PrivateIPAddress + "/80"); !strings.HasPrefix(got, "one: ") {
				return fmt.Errorf("%q", got)
			}
		}
		return nil
	})

	l.Underlay("service", "rm", "lb")
	if _, there := list()["lb"]; there {
		t.Error("the load balancer is still listed")
	}
	for _, tt := range []struct{ args, want string }{
		{"service rm vm-1", "no managed service"},
		{"service rm nothing", "no such managed service"},
		{"service add orders", "already"},
		{"service add x --kind queue", "load-balancer"},
		{"service add x --kind load-balancer", "--target"},
		{"service add x --target 10.0.0.1:80", "no targets"},
		{"service add X", "not of the form"},
		{"service add x --group sg-0123456789abcdef0", "InvalidGroup"},
	} {
		if _, stderr, code := l.Try(strings.Fields(tt.args)...); code == 0 || !strings.Contains(stderr, tt.want) {
			t.Errorf("underlay %s: exit %d, %s", tt.args, code, stderr)
		}
	}
}

// The demos prove what they say.
func TestDemos(t *testing.T) {
	for demo, facts := range map[string]int{"three-tier": 11, "overlay": 9} {
		t.Run(demo, func(t *testing.T) {
			proofs := lab.Demo(t, demo)
			if len(proofs) != facts {
				t.Errorf("%d facts, want %d", len(proofs), facts)
			}
			for _, p := range proofs {
				if !p.OK {
					t.Errorf("%s: %s\n%s", p.Fact, p.Why, p.Output)
				}
			}
		})
	}
}
