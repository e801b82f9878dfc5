package datapath

import (
	"context"
	"errors"
	"testing"
)

func TestAddDelete(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	a, b := w.addPod(d, 1), w.addPod(d, 2)

	w.echo(w.wire, farIP)
	w.echo(w.node, enis[0].Primary)
	w.echo(b.ns, b.Addr)
	for name, to := range map[string]struct{ got, want string }{
		"pod to wire": {w.ask(a.ns, a.Addr, farIP, 20), a.Addr.String()},
		"pod to node": {w.ask(a.ns, a.Addr, enis[0].Primary, 20), a.Addr.String()},
		"pod to pod":  {w.ask(a.ns, a.Addr, b.Addr, 20), a.Addr.String()},
		"wire to pod": {w.ask(w.wire, farIP, b.Addr, 20), farIP.String()},
		"node to pod": {w.ask(w.node, enis[0].Primary, b.Addr, 20), enis[0].Primary.String()},
	} {
		if to.got != to.want {
			t.Errorf("%s: seen as %q, want %q", name, to.got, to.want)
		}
	}
	if !w.ping(a.ns, a.Addr, farIP) {
		t.Errorf("%s does not ping %s", a.Addr, farIP)
	}
	if err := d.Check(context.Background(), a.Endpoint, openNetns(t, a.ns)); err != nil {
		t.Error(err)
	}
	gone, err := d.Delete(context.Background(), a.ContainerID, a.IfName)
	if err != nil || gone.State != Tombstone || gone.Released.IsZero() {
		t.Errorf("Delete: %+v, %v", gone, err)
	}
	if _, err := d.Delete(context.Background(), "nobody", "eth0"); !errors.Is(err, ErrNotFound) {
		t.Errorf("Delete of nobody: %v", err)
	}
}
