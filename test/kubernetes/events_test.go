package kubernetes

import (
	"encoding/xml"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/test/lab"
)

// Where a subnet has no address left, the pod that waits says so, and how to go
// on; once there are some, it comes up.
func TestEventWhenTheSubnetIsFull(t *testing.T) {
	c := shared(t)
	ns := c.namespace("full")
	n := c.Lab.Nodes[0]
	free := c.reserve(t, n.SubnetID)

	// More than the pool has to spare.
	spare := 0
	for _, e := range c.Inspect(n).ENIs {
		spare += e.Addresses.Free + e.Addresses.Cooling
	}
	var manifest strings.Builder
	for i := range spare + 2 {
		manifest.WriteString(idle(fmt.Sprintf("p-%d", i), n.Name, ""))
	}
	c.apply(ns, manifest.String())
	lab.Eventually(t, 2*time.Minute, "an Event on a pod that says SubnetFull", func() error {
		events, err := get[list[struct {
			Reason, Message string
			InvolvedObject  struct{ Kind, Name, UID string }
		}]](c, "events", "-n", ns)
		if err != nil {
			return err
		}
		var seen []string
		for _, e := range events.Items {
			if e.Reason == "SubnetFull" && e.InvolvedObject.Kind == "Pod" {
				if !strings.Contains(e.Message, n.SubnetID) {
					t.Errorf("the Event does not name the subnet: %s", e.Message)
				}
				described := c.kubectl("describe", "pod", e.InvolvedObject.Name, "-n", ns)
				if !strings.Contains(described, "SubnetFull") {
					t.Errorf("kubectl describe pod does not show it:\n%s", described)
				}
				return nil
			}
			seen = append(seen, e.Reason+": "+e.Message)
		}
		return fmt.Errorf("there are %q", seen)
	})
	free()
	c.awaitPods(ns, spare+2, 3*time.Minute)
}

// reserve takes all free addresses of a subnet out of EC2's choice, by
// reservations, until free is called.
func (c *cluster) reserve(t *testing.T, subnet string) (free func()) {
	t.Helper()
	var described struct {
		Items []struct {
			CIDR string `xml:"cidrBlock"`
		} `xml:"subnetSet>item"`
	}
	if err := c.Call("DescribeSubnets", map[string]string{"SubnetId.1": subnet}, &described); err != nil {
		t.Fatal(err)
	}
	cidr := netip.MustParsePrefix(described.Items[0].CIDR)
	var made struct {
		XMLName xml.Name
		ID      string `xml:"subnetCidrReservation>subnetCidrReservationId"`
	}
	if err := c.Call("CreateSubnetCidrReservation", map[string]string{"SubnetId": subnet, "Cidr": cidr.String(), "ReservationType": "explicit"}, &made); err != nil {
		t.Fatal(err)
	}
	freed := false
	free = func() {
		if freed {
			return
		}
		freed = true
		if err := c.Call("DeleteSubnetCidrReservation", map[string]string{"SubnetCidrReservationId": made.ID}, &struct{ XMLName xml.Name }{}); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(free)
	return free
}
