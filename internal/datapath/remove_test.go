package datapath

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/nl"
)

// footprint is what of ours a node shows.
func (w *world) footprint() map[string]string {
	w.t.Helper()
	out := map[string]string{
		"rules": w.ip(w.node, "rule"), "routes": w.ip(w.node, "route show table all"),
		"nft": w.run("ip", "netns", "exec", w.node, "nft", "list", "ruleset"),
	}
	for _, dev := range []string{"eth0", "eth1"} {
		for _, hook := range []string{"ingress", "egress"} {
			out["filters"] += w.run("tc", "-n", w.node, "filter", "show", "dev", dev, hook)
		}
	}
	// What the kernel adds and takes back itself, up to a second after a device's
	// other end is up: IPv6's own routes, and the mark of one that is down.
	var routes []string
	for line := range strings.Lines(out["routes"]) {
		if !strings.Contains(line, "fe80::") && !strings.Contains(line, "ff00::/8") {
			routes = append(routes, strings.ReplaceAll(line, " linkdown", ""))
		}
	}
	out["routes"] = strings.Join(routes, "")
	var links []string
	for line := range strings.Lines(w.ip(w.node, "-o link")) {
		_, name, _ := strings.Cut(line, ": ")
		name, _, _ = strings.Cut(name, ":")
		links = append(links, name)
	}
	out["links"] = strings.Join(links, " ")
	return out
}

func (w *world) remove(force bool) (r Removal, err error) {
	w.t.Helper()
	doErr := nl.Do(nl.Path(w.node), func() error {
		r, err = Remove(w.bpffs, w.released, force)
		return nil
	})
	if doErr != nil {
		w.t.Fatal(doErr)
	}
	return r, err
}

func TestRemove(t *testing.T) {
	w := newWorld(t)
	w.ip(w.node, "link set eth1 up") // as after SetENIs, which nothing takes back
	w.ip(w.node, "addr add 10.0.1.10/32 dev eth1")
	w.ip(w.node, "rule add priority 21 lookup 99")
	before := w.footprint()
	if r, err := w.remove(false); err != nil || r.Any() {
		t.Errorf("nothing is there: %+v, %v", r, err)
	}

	d := w.open(Options{})
	p := w.addPod(d, 1)
	gone := w.addPod(d, 2)
	if _, err := w.remove(true); err == nil || !strings.Contains(err.Error(), "another process has the datapath") {
		t.Errorf("beside a running agent: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}

	// A pod lives: nothing is changed.
	stands := w.footprint()
	var used *InUseError
	if r, err := w.remove(false); !errors.As(err, &used) || len(used.Endpoints) != 2 || r.Any() || !strings.Contains(err.Error(), p.Addr.String()) {
		t.Fatalf("two pods live: %+v, %v", r, err)
	}
	if diff := cmp.Diff(stands, w.footprint()); diff != "" {
		t.Errorf("refused, and changed:\n%s", diff)
	}
	// The other one's namespace has gone without a DEL.
	w.ip(w.node, "link del "+gone.HostIfName)
	if _, err := w.remove(false); !errors.As(err, &used) || len(used.Endpoints) != 1 || used.Endpoints[0].Addr != p.Addr {
		t.Fatalf("one pod lives: %v", err)
	}
	// The runtime has given it up, and the namespace has not gone yet.
	w.released = func(containerID, ifName string) bool { return containerID == p.ContainerID && ifName == p.IfName }
	var still []Endpoint
	if err := nl.Do(nl.Path(w.node), func() (err error) { still, err = InUse(w.bpffs, w.released); return err }); err != nil || len(still) != 0 {
		t.Errorf("a released one counts: %v, %v", still, err)
	}
	w.released = nil
	r, err := w.remove(true)
	if err != nil || r.Links != 1 || r.Rules != 3 || r.Routes != 4 || !r.Table || r.Pins < 5 {
		t.Errorf("forced: %+v, %v", r, err)
	}
	if diff := cmp.Diff(before, w.footprint()); diff != "" {
		t.Errorf("before the datapath and after it:\n%s", diff)
	}
	if _, err := os.Stat(w.bpffs); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: %v", w.bpffs, err)
	}
	if r, err := w.remove(false); err != nil || r.Any() {
		t.Errorf("once more: %+v, %v", r, err)
	}

	// And all over again, without the pods in the end.
	d = w.open(Options{})
	p = w.addPod(d, 1)
	if _, err := d.Delete(ctx, p.ContainerID, p.IfName); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.remove(false); err != nil {
		t.Errorf("only a tombstone is left: %v", err)
	}
	if diff := cmp.Diff(before, w.footprint()); diff != "" {
		t.Errorf("before the datapath and after it:\n%s", diff)
	}
}
