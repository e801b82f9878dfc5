package datapath

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestSetENIs(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	w.ip(w.node, "rule add pref 40 fwmark 0x10/0xff lookup 1234") // somebody else's
	w.ip(w.node, "route add 192.0.2.0/24 via 10.0.0.1 table 30062 proto static")
	state := func() string {
		return w.ip(w.node, "-d rule") + w.ip(w.node, "-4 -d route show table all") + w.ip(w.node, "-4 addr")
	}
	before := state()
	for _, want := range []string{
		"32:\tfrom all fwmark 0x4/0x3046 lookup 30062 proto 117",
		"default via 10.0.1.1 dev eth1 table 30062 proto 117",
		"10.0.1.1 dev eth1 table 30062 proto 117 scope link",
		"inet 10.0.1.10/32 scope global noprefixroute eth1",
	} {
		if !strings.Contains(before, want) {
			t.Errorf("lacks %q:\n%s", want, before)
		}
	}
	if err := d.SetENIs(ctx, enis); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(before, state()); diff != "" {
		t.Errorf("SetENIs again changed (-before +after):\n%s", diff)
	}
	for _, name := range []string{"eth0", "eth1"} {
		got := w.run("ip", "netns", "exec", w.node, "cat", "/proc/sys/net/ipv4/conf/"+name+"/rp_filter")
		if got != "2\n" {
			t.Errorf("rp_filter of %s is %q", name, got)
		}
	}
	if got := w.ip(w.node, "link show eth1"); !strings.Contains(got, "mtu 9001") || !strings.Contains(got, "UP") {
		t.Errorf("eth1: %s", got)
	}

	// What others damage is repaired.
	w.run("ip", "netns", "exec", w.node, "nft", "flush", "ruleset")
	w.ip(w.node, "rule del pref 20")
	w.ip(w.node, "rule del pref 32")
	w.ip(w.node, "route del default table 30062")
	if err := d.SetENIs(ctx, enis); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(before, state()); diff != "" {
		t.Errorf("after a repair (-before +after):\n%s", diff)
	}
	if out := w.run("ip", "netns", "exec", w.node, "nft", "list", "ruleset"); !strings.Contains(out, `iifgroup 30060/31 meta mark & 0x00003046 == 0x00000000 counter name "no_mark" drop`) {
		t.Errorf("the guard is not repaired:\n%s", out)
	}

	// A device that is not there yet, then is.
	third := ENI{ID: "eni-00000000000000003", Index: 31, MAC: mac("02:00:00:00:02:10"), Primary: netip.MustParseAddr("10.0.2.10"), Subnet: netip.MustParsePrefix("10.0.2.0/24")}
	three := append(append([]ENI{}, enis...), third)
	var missing *LinkMissingError
	if err := d.SetENIs(ctx, three); !errors.As(err, &missing) || !errors.Is(err, ErrLinkMissing) || len(missing.ENIs) != 1 || missing.ENIs[0] != third.ID {
		t.Errorf("SetENIs without a device: %v", err)
	}
	if diff := cmp.Diff(before, state()); diff != "" {
		t.Errorf("SetENIs without a device changed (-before +after):\n%s", diff)
	}
	w.ip(w.node, "link add eth2 address 02:00:00:00:02:10 type veth peer name r2 netns "+w.wire)
	w.ip(w.wire, "link set r2 up")
	if err := d.SetENIs(ctx, three); err != nil {
		t.Error(err)
	}
	if got := state(); !strings.Contains(got, "61:\tfrom all fwmark 0x3046/0x3046 lookup 30091 proto 117") || !strings.Contains(got, "default via 10.0.2.1 dev eth2 table 30091") {
		t.Errorf("the third ENI's rule or route is missing:\n%s", got)
	}

	// Gone: rule and table too, and nothing of others.
	if err := d.SetENIs(ctx, enis[:1]); err != nil {
		t.Error(err)
	}
	after := state()
	for _, gone := range []string{"lookup 30062", "lookup 30091", "default via 10.0.1.1", "table 30091"} {
		if strings.Contains(after, gone) {
			t.Errorf("%q is left:\n%s", gone, after)
		}
	}
	for _, kept := range []string{"lookup 1234", "192.0.2.0/24", "lookup 30061", "20:\tfrom all lookup 30060"} {
		if !strings.Contains(after, kept) {
			t.Errorf("%q went:\n%s", kept, after)
		}
	}

	for _, tt := range []struct {
		want   string
		change func(*ENI)
	}{
		{"within 1..31", func(e *ENI) { e.Index = 32 }},
		{"both have index 1", func(e *ENI) { e.Index = 1 }},
		{"lacks", func(e *ENI) { e.MAC = nil }},
	} {
		bad := append([]ENI{}, enis...)
		tt.change(&bad[1])
		if err := d.SetENIs(ctx, bad); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("SetENIs: %v, want %q", err, tt.want)
		}
	}
}

func TestForeignIsWhatOthersConfigured(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	has := func(text string) bool {
		got, err := d.Foreign()
		if err != nil {
			t.Fatal(err)
		}
		return slices.Contains(got, netip.MustParseAddr(text))
	}
	w.ip(w.node, "addr add 10.0.1.77/32 dev eth1")
	w.ip(w.node, "route add 10.0.1.78/32 dev eth1 table 1234")
	w.ip(w.node, "route add 10.0.1.79/32 dev eth1 table 30060") // a pod of ours
	w.ip(w.node, "route add 10.0.1.128/25 dev eth1 table 1234")
	for addr, want := range map[string]bool{"10.0.0.10": true, "10.0.1.77": true, "10.0.1.78": true, "10.0.1.79": false, "10.0.1.128": false, "10.0.1.1": false} {
		if has(addr) != want {
			t.Errorf("Foreign lists %s: %t", addr, !want)
		}
	}
	w.ip(w.node, "addr del 10.0.1.77/32 dev eth1")
	if has("10.0.1.77") {
		t.Error("an address that was deleted is listed")
	}
}

func TestWatchHearsWhatOthersChange(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	ctx, cancel := context.WithCancel(context.Background())
	heard := make(chan struct{}, 100)
	ended := make(chan error)
	go func() { ended <- d.Watch(ctx, func() { heard <- struct{}{} }) }()
	// Watch has begun once it hears of something that is ours to hear.
	begun := func() bool {
		w.ip(w.node, "rule add pref 31000 table 31000")
		w.ip(w.node, "rule del pref 31000")
		select {
		case <-heard:
			return true
		case <-time.After(50 * time.Millisecond):
			return false
		}
	}
	for deadline := time.Now().Add(10 * time.Second); !begun(); {
		if time.Now().After(deadline) {
			t.Fatal("nothing is heard")
		}
	}
	for len(heard) > 0 {
		<-heard
	}
	for _, args := range []string{ // the address last: it takes routes along
		"rule del pref 32",
		"route del default table 30062",
		"addr del 10.0.1.10/32 dev eth1",
		"addr add 10.0.1.77/32 dev eth1",
		"route add 10.0.1.78/32 dev eth1",
	} {
		w.ip(w.node, args)
		select {
		case <-heard:
		case <-time.After(5 * time.Second):
			t.Errorf("not heard: ip %s", args)
		}
		for len(heard) > 0 {
			<-heard
		}
	}
	untilQuiet(heard) // what the address took along may still come
	// The pods' own table changes with every pod.
	w.ip(w.node, "route add 10.0.9.9/32 dev eth0 table 30060")
	w.ip(w.node, "route del 10.0.9.9/32 table 30060")
	select {
	case <-heard:
		t.Error("a pod's route is heard")
	case <-time.After(200 * time.Millisecond):
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// untilQuiet receives until nothing has come for a while.
func untilQuiet(heard <-chan struct{}) {
	for {
		select {
		case <-heard:
		case <-time.After(100 * time.Millisecond):
			return
		}
	}
}
