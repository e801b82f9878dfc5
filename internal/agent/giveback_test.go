package agent

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// What a node gives back at the end: what it took for pods, and nothing of
// others'.
func TestGiveBack(t *testing.T) {
	run(t, "m5.large", func(r *rig) {
		ours := map[string]string{ipam.TagCluster: "test", ipam.TagInstance: string(testInstance)}
		own := &vpc.ENI{}
		others := map[vpc.ENIID]string{}
		made := map[vpc.ENIID]bool{}
		for _, e := range r.cloud.enis {
			own = e
		}
		own.Secondary = []netip.Addr{r.cloud.take(), r.cloud.take(), r.cloud.take()}
		own.Elastic = own.Secondary[1:2]
		own.Prefixes = []netip.Prefix{netip.MustParsePrefix("10.0.3.0/28"), netip.MustParsePrefix("10.0.3.16/28")}
		add := func(what string, change func(*vpc.ENI)) {
			e := r.cloud.make()
			e.Tags, e.Instance, e.Attachment, e.Attached, e.DeviceIndex = map[string]string{}, testInstance, "eni-attach-1", true, len(r.cloud.enis)
			for k, v := range ours {
				e.Tags[k] = v
			}
			change(e)
			if what == "" {
				made[e.ID] = true
			} else {
				others[e.ID] = what
			}
		}
		add("", func(*vpc.ENI) {})
		add("", func(e *vpc.ENI) { e.Instance, e.Attachment, e.Attached = "", "", false }) // never attached
		add("another cluster's", func(e *vpc.ENI) { e.Tags[ipam.TagCluster] = "other" })
		add("without tags", func(e *vpc.ENI) { clear(e.Tags) })
		add("a trunk", func(e *vpc.ENI) { e.Type = "trunk" })
		add("no_manage", func(e *vpc.ENI) { e.Tags[ipam.TagNoManage] = "true" })
		add("of a managed service", func(e *vpc.ENI) { e.RequesterOwned = true })
		add("on another network card", func(e *vpc.ENI) { e.NetworkCard = 1 })
		add("with an Elastic IP", func(e *vpc.ENI) { e.Elastic = []netip.Addr{e.Primary} })

		used := []netip.Addr{own.Secondary[0], netip.MustParseAddr("10.0.3.5")} // configured on the node
		want := own.Secondary[2:]
		h, err := Held(context.Background(), fakeIMDS{r.cloud}, r.cloud, "test", used)
		if err != nil {
			t.Fatal(err)
		}
		same := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
		if diff := cmp.Diff(want, h.Addresses, same); diff != "" || h.Own != own.ID {
			t.Errorf("addresses of %s: %s", h.Own, diff)
		}
		if len(h.Prefixes) != 1 || h.Prefixes[0] != own.Prefixes[1] {
			t.Errorf("prefixes %v", h.Prefixes)
		}
		for _, e := range h.Interfaces {
			if !made[e.ID] {
				t.Errorf("would delete %s, which is %s", e.ID, others[e.ID])
			}
		}
		if len(h.Interfaces) != len(made) {
			t.Errorf("%d interfaces, want %d", len(h.Interfaces), len(made))
		}
		all := strings.Join(h.Commands(), "\n")
		for _, part := range []string{"unassign-private-ip-addresses", want[0].String(), "10.0.3.16/28", "detach-network-interface", "delete-network-interface"} {
			if !strings.Contains(all, part) {
				t.Errorf("the commands have no %q:\n%s", part, all)
			}
		}

		// One refusal does not keep the rest.
		refused := true
		r.cloud.setFail(func(call string) error {
			if call == "unassign" && refused {
				return apiError("UnauthorizedOperation")
			}
			return nil
		})
		if err := h.GiveBack(context.Background(), r.cloud, slog.New(slog.DiscardHandler)); err == nil {
			t.Error("unassign was refused, and no error")
		}
		refused = false
		if h, err = Held(context.Background(), fakeIMDS{r.cloud}, r.cloud, "test", used); err != nil || len(h.Interfaces) != 0 || len(h.Addresses) != 1 {
			t.Fatalf("after a refusal: %+v, %v", h, err)
		}
		if err := h.GiveBack(context.Background(), r.cloud, slog.New(slog.DiscardHandler)); err != nil {
			t.Error(err)
		}
		if h, err = Held(context.Background(), fakeIMDS{r.cloud}, r.cloud, "test", used); err != nil || !h.Empty() || h.Commands() != nil {
			t.Errorf("at the end: %+v, %v", h, err)
		}
		for id, what := range others {
			if r.cloud.enis[id] == nil {
				t.Errorf("deleted %s, which is %s", id, what)
			}
		}
		if !slices.Equal(own.Elastic, own.Secondary[1:2]) {
			t.Errorf("left on the own interface: %v", own.Secondary)
		}
	})
}
