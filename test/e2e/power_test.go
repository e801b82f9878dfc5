package e2e

import (
	"net/netip"
	"testing"

	"github.com/underlay-cni/underlay/internal/ec2"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// The lab's client stops, starts and reboots instances.
func TestLabStopsAndStarts(t *testing.T) {
	t.Parallel()
	l := ec2.NewLab(startVPCD(t).URL, "us-east-1")
	ctx := t.Context()
	n, err := l.Network(ctx, "power", netip.MustParsePrefix("10.0.0.0/16"), []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")})
	if err != nil {
		t.Fatal(err)
	}
	var ids []vpc.InstanceID
	for _, name := range []string{"a", "b"} {
		i, err := l.Launch(ctx, name, "m5.large", n.Subnets[0].ID, n.Nodes)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, i.ID)
	}
	before, err := l.AwaitRunning(ctx, ids)
	if err != nil {
		t.Fatal(err)
	}
	for _, force := range []bool{false, true} {
		if err := l.Stop(ctx, ids, force); err != nil {
			t.Fatal(err)
		}
		if err := l.Reboot(ctx, ids); err == nil {
			t.Error("stopped instances were rebooted")
		}
		after, err := l.Start(ctx, ids)
		if err != nil {
			t.Fatal(err)
		}
		for k := range ids {
			equal(t, after[k], before[k])
		}
	}
	if err := l.Reboot(ctx, ids); err != nil {
		t.Error(err)
	}
}
