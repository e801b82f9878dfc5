package fabric

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// natPorts knows which guests are NAT gateways, to ask their kernel for how many
// connections it had no source port. It is safe for concurrent use.
type natPorts struct {
	mu   sync.Mutex
	enis map[string]vpc.ENIID // by guest
}

func (n *natPorts) set(want desired) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.enis = map[string]vpc.ENIID{}
	for _, p := range want.order {
		if _, ok := want.nats[p.Guest]; ok {
			n.enis[p.Guest] = p.ID
		}
	}
}

// errors counts them, by the gateway's interface, since its guest was made.
// Gateways that cannot be asked are left out: they are being made or removed, or
// the kernel does not count (CONFIG_NF_CONNTRACK_PROCFS).
func (n *natPorts) errors() map[vpc.ENIID]uint64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := map[vpc.ENIID]uint64{}
	for guest, id := range n.enis {
		var text []byte
		err := nl.Do(nl.Path(guest), func() (err error) {
			// Not /proc/net, which is of the process's first thread.
			text, err = os.ReadFile("/proc/thread-self/net/stat/nf_conntrack")
			return err
		})
		if err == nil {
			out[id] = insertFailed(string(text))
		}
	}
	return out
}

// insertFailed adds up what a namespace's conntrack could not insert, because
// the tuple of the answers is another connection's: without a port of its own a
// connection keeps one that is in use (nf_nat_l4proto_unique_tuple in the
// kernel's net/netfilter/nf_nat_core.c). The text has a line of names, then a
// line of hexadecimal numbers for each CPU.
func insertFailed(text string) (sum uint64) {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	at := slices.Index(strings.Fields(lines[0]), "insert_failed")
	for _, line := range lines[1:] {
		f := strings.Fields(line)
		if at < 0 || at >= len(f) {
			continue
		}
		n, _ := strconv.ParseUint(f[at], 16, 64)
		sum += n
	}
	return sum
}
