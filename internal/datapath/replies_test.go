package datapath

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/testenv"
)

// The chains for replies come with somebody else's translation, and go with it.
func TestReplies(t *testing.T) {
	testenv.Require(t, "portmap") // for iptables
	w := newWorld(t)
	var log bytes.Buffer
	d := w.open(Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	in := func(command string) string {
		t.Helper()
		return w.run("ip", append([]string{"netns", "exec", w.node}, strings.Fields(command)...)...)
	}
	set := func(enis []ENI) string {
		t.Helper()
		if err := d.SetENIs(ctx, enis); err != nil {
			t.Fatal(err)
		}
		return in("nft list table inet underlay")
	}
	unchanged := func(want string) {
		t.Helper()
		before := log.Len()
		if got := set(enis); got != want || log.Len() != before {
			t.Errorf("a second time: %s\n%s", cmp.Diff(want, got), log.String()[before:])
		}
	}
	bare := set(enis)
	unchanged(bare)
	if strings.Contains(bare, "ct ") {
		t.Fatalf("without translation:\n%s", bare)
	}

	in("nft add table ip other")
	in("nft add chain ip other out { type nat hook postrouting priority 100 ; }")
	unchanged(bare) // masquerading alone
	in("nft add chain ip other in { type nat hook prerouting priority -100 ; }")
	on := set(enis)
	for _, want := range []string{
		"type filter hook prerouting priority mangle; policy accept;",
		`ct direction reply ct status dnat jump translated comment "replies to what others translated"`,
		`meta mark set meta mark & 0xffffcfb9 comment "by the main table"`,
		`ct original ip daddr 10.0.1.10 meta mark set meta mark & 0xffffcfbd | 0x00000004 comment "10.0.1.10 by ENI 2"`,
	} {
		if !strings.Contains(on, want) {
			t.Errorf("with translation, lacks %q:\n%s", want, on)
		}
	}
	unchanged(on)
	for _, chain := range []string{repliesChain, translatedChain} {
		in("nft flush chain inet underlay " + chain)
		if got := set(enis); got != on {
			t.Errorf("after chain %s was flushed: %s", chain, cmp.Diff(on, got))
		}
	}
	if got := set(enis[:1]); got != bare {
		t.Errorf("with the primary ENI alone: %s", cmp.Diff(bare, got))
	}
	if got := set(enis); got != on {
		t.Errorf("with the second ENI again: %s", cmp.Diff(on, got))
	}
	in("nft delete table ip other")
	if got := set(enis); got != bare {
		t.Errorf("when nobody translates any more: %s", cmp.Diff(bare, got))
	}
	in("iptables-legacy -t nat -A PREROUTING -j ACCEPT")
	if got := set(enis); got != on {
		t.Errorf("with iptables from before nftables: %s", cmp.Diff(on, got))
	}
}

func TestWatchHearsOfTranslation(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	ctx, cancel := context.WithCancel(context.Background())
	heard := make(chan struct{}, 100)
	ended := make(chan error)
	go func() { ended <- d.Watch(ctx, func() { heard <- struct{}{} }) }()
	nft := func(command string) {
		t.Helper()
		w.run("ip", append([]string{"netns", "exec", w.node, "nft"}, strings.Fields(command)...)...)
	}
	nft("add table ip other")
	deadline := time.After(10 * time.Second)
	for begun := false; !begun; {
		nft("add chain ip other in { type nat hook prerouting priority -100 ; }")
		select {
		case <-heard:
			begun = true
		case <-time.After(50 * time.Millisecond):
			nft("delete chain ip other in")
		case <-deadline:
			t.Fatal("a chain of type nat is not heard")
		}
	}
	untilQuiet(heard)
	nft("add chain ip other more") // as of a Service
	nft("add rule ip other in jump more")
	select {
	case <-heard:
		t.Error("somebody's further chain is heard")
	case <-time.After(200 * time.Millisecond):
	}
	nft("add chain ip other forward { type filter hook forward priority 0 ; policy drop ; }")
	select {
	case <-heard:
	case <-time.After(10 * time.Second):
		t.Error("a chain that drops is not heard")
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
