package cli

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/underlay-cni/underlay/internal/agentapi"
)

// flowNames tells what the addresses of flow records are called: pods, nodes,
// VMs and services. It asks again when it meets an address that it does not
// know, but not all the time.
type flowNames struct {
	read func() map[netip.Addr]string
	now  func() time.Time

	names map[netip.Addr]string
	asked time.Time
}

// namesAgain is how long an unknown address stays unknown.
const namesAgain = 2 * time.Second

func (n *flowNames) of(a netip.Addr) string {
	name, ok := n.names[a]
	if !ok && (n.names == nil || n.now().Sub(n.asked) >= namesAgain) {
		n.names, n.asked = n.read(), n.now()
		name = n.names[a]
	}
	return name
}

// add puts the names of a record's ends into it.
func (n *flowNames) add(r flowRecord) {
	for end, field := range map[string]string{"source-name": "pkt-srcaddr", "destination-name": "pkt-dstaddr"} {
		if name := n.of(r.address(field)); name != "" {
			r[end] = name
		}
	}
}

// addressOf is the address of what has this name.
func (n *flowNames) addressOf(name string) (netip.Addr, error) {
	n.names, n.asked = n.read(), n.now()
	for a, have := range n.names {
		if have == name {
			return a, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("there is no pod %q; underlay status lists them", name)
}

// labNames are the names of addresses that a lab's agents and files know now. An
// agent that does not answer is not waited for; its pods are those that run
// made.
func labNames(h home, f *labFile) map[netip.Addr]string {
	out := map[netip.Addr]string{}
	if pods, err := h.loadPods(); err == nil {
		for _, p := range pods {
			if a, err := netip.ParseAddr(p.Pod.IP); err == nil {
				out[a] = p.Pod.Name
			}
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, n := range f.Lab.Nodes {
		wg.Go(func() {
			in, err := (&agentapi.Client{Socket: n.AgentSocket}).Inspect(ctx)
			if err != nil {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			for _, e := range in.Endpoints {
				if e.State == tombstone || e.Pod.Name == "" {
					continue
				}
				name := e.Pod.Name
				if f.Lab.Kubernetes != nil && e.Pod.Namespace != "" {
					name = e.Pod.Namespace + "/" + name
				}
				out[e.IP] = name
			}
		})
	}
	wg.Wait()
	for _, n := range f.Lab.Nodes {
		out[n.IP] = n.Name
	}
	for _, o := range f.Lab.Outside {
		out[o.IP] = o.Name
	}
	if k := f.Lab.Kubernetes; k != nil {
		out[k.ControlPlane.IP] = k.ControlPlane.Name
	}
	return out
}
