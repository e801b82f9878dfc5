package datapath

import (
	"net/netip"
	"strings"
	"testing"
)

// What stands on an ENI's device is put back when somebody takes it away, and
// goes when the device is an ENI no more. Direct connections outlive both.
func TestENIProgramsAreRepaired(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	a := w.addPod(d, 1)
	w.serve(w.wire, netip.AddrPortFrom(farIP, 80))
	c, err := w.dial(a.ns, a.Addr, netip.AddrPortFrom(farIP, 80))
	if err != nil {
		t.Fatal(err)
	}
	say := func(when string) {
		t.Helper()
		if err := exchange(c, 100_000); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
	}
	say("at first")
	link, err := d.conn.LinkByName("eth1")
	if err != nil {
		t.Fatal(err)
	}
	dev := device{link.Name, link.Index, eniPrograms}
	if err := d.eniHooks.check(dev); err != nil {
		t.Fatal(err)
	}
	if err := d.hooks.detach(dev); err != nil {
		t.Fatal(err)
	}
	say("without programs on the ENI")
	if got := connections(t, d, a.Addr, farIP); len(got) != 1 || got[0].Provenance != Direct {
		t.Errorf("%+v", got)
	}
	// The kernel lets a link without a pin go a moment later, and until then says
	// that the program is there.
	eventually(t, "repaired", func() bool {
		if err := d.SetENIs(ctx, enis); err != nil {
			t.Fatal(err)
		}
		return d.eniHooks.check(dev) == nil
	})
	before := paths(t, d)
	say("repaired")
	if after := paths(t, d); after.Stack != before.Stack || after.Direct == before.Direct {
		t.Errorf("paths: %+v, then %+v", before, after)
	}

	if err := d.SetENIs(ctx, enis[:1]); err != nil {
		t.Fatal(err)
	}
	if err := d.eniHooks.check(dev); err == nil {
		t.Error("the programs are on a device that is no ENI")
	}
	pins, err := pinNames(linkDir(w.bpffs))
	if err != nil || strings.Contains(strings.Join(pins, " "), "eth1_") {
		t.Errorf("pins %v, %v", pins, err)
	}
}

// Programs of an agent before, of the other kind, leave an ENI's device.
func TestENIHooksAreExchanged(t *testing.T) {
	w := newWorld(t)
	var d *Datapath
	for _, hook := range []Hook{Clsact, TCX, Clsact, Auto} {
		if d != nil {
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
		}
		d = w.open(Options{Hook: hook})
		for _, name := range []string{"eth0", "eth1"} {
			link, err := d.conn.LinkByName(name)
			if err != nil {
				t.Fatal(err)
			}
			dev := device{link.Name, link.Index, eniPrograms}
			if err := d.eniHooks.check(dev); err != nil {
				t.Errorf("%s: %v", hook, err)
			}
			if d.eniHooks.old.check(dev) == nil {
				t.Errorf("%s: the other kind is on %s still", hook, name)
			}
		}
	}
}

// A flood of connections leaves those that are there alone.
func TestFloodSparesOthers(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	a, b := w.addPod(d, 1), w.addPod(d, 2)
	w.serve(w.wire, netip.AddrPortFrom(farIP, 80))
	c, err := w.dial(b.ns, b.Addr, netip.AddrPortFrom(farIP, 80))
	if err != nil {
		t.Fatal(err)
	}
	if err := exchange(c, 1000); err != nil {
		t.Fatal(err)
	}
	fd := w.rawSocket(a.ns, "eth0")
	frames := 0
	for p := range 3000 {
		sendRaw(t, fd, udpFrame(a.MAC, hostMAC, a.Addr, netip.AddrFrom4([4]byte{10, 9, byte(p >> 8), byte(p)}), "flood"))
		frames++
	}
	if err := exchange(c, 1<<20); err != nil {
		t.Errorf("another pod's connection: %v", err)
	}
	st, err := d.Status()
	if err != nil || st.Paths.BegunDirect+st.Paths.BegunStack < uint64(frames) || st.Paths.NoRoom != 0 || st.MaxConnections < frames {
		t.Errorf("%+v, %v", st, err)
	}
	if _, err := d.sweepConns(monoNow()); err != nil {
		t.Fatal(err)
	}
	if st, err := d.Status(); err != nil || st.Connections < frames || st.Hook != testHook || st.ENIHook != testHook || !st.Direct {
		t.Errorf("%+v, %v", st, err)
	}
}
