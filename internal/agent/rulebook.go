package agent

import (
	"context"
	"fmt"
	"net"

	"github.com/underlay-cni/underlay/internal/groups"
)

// rulesError says that rules are not there in time.
type rulesError struct{ cause error }

func (e *rulesError) Error() string {
	return fmt.Sprintf("read the rules of the pod's security groups: %v", e.cause)
}
func (e *rulesError) Unwrap() error { return e.cause }

// newBook returns what keeps the rules of the security groups that the node
// needs: from the poller at Options.GroupsPoller, or by polls of its own.
func newBook(a *Agent) *groups.Book {
	o := groups.BookOptions{PollerOptions: groups.PollerOptions{
		Count: a.metrics.call,
		Note: func(err error) {
			a.incident("rules", stable(err)+"; pods on this node are judged by the rules as they were read before")
		},
	}}
	if a.opts.GroupsPoller != "" {
		o.Dial = func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", a.opts.GroupsPoller)
		}
		o.Away = func(err error) {
			a.incident("poller", err.Error()+"; pods on this node are judged by the rules as they were read last, and the agent reads them itself if it stays away")
		}
	}
	return groups.NewBook(o)
}
