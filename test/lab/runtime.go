package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/underlay-cni/underlay/internal/nl"
)

// Runtime is a container runtime's side of CNI on one node: libcni, which
// Nomad, podman and containerd use, with a configuration list and a cache of
// its own. Plugins run in the node's network namespace.
type Runtime struct {
	node  Node
	cache string
	list  *libcni.NetworkConfigList
	cni   *libcni.CNIConfig
}

// Runtime returns one whose list is underlay-cni and what is chained behind
// it, as JSON, their programs found in path too.
func (l *Lab) Runtime(n Node, version string, chained []string, path ...string) *Runtime {
	l.t.Helper()
	first := fmt.Sprintf(`{"type":"underlay-cni","socket":%q}`, n.AgentSocket)
	list, err := libcni.ConfListFromBytes(fmt.Appendf(nil, `{"cniVersion":%q,"name":"underlay","plugins":[%s]}`, version, strings.Join(append([]string{first}, chained...), ",")))
	if err != nil {
		l.t.Fatal(err)
	}
	r := &Runtime{node: n, cache: l.t.TempDir(), list: list}
	r.cni = libcni.NewCNIConfigWithCacheDir(append([]string{Bin}, path...), r.cache, nil)
	return r
}

// Restart forgets what is in memory, as the restart of the runtime does.
func (r *Runtime) Restart() {
	r.cni = libcni.NewCNIConfigWithCacheDir(r.cni.Path, r.cache, nil)
}

// Add, Check and Del are CNI's, on the whole list. Errors are the plugin's.
func (r *Runtime) Add(ctx context.Context, c *libcni.RuntimeConf) (*current.Result, error) {
	var res *current.Result
	err := nl.Do(r.node.Netns, func() error {
		answer, err := r.cni.AddNetworkList(ctx, r.list, c)
		if err != nil {
			return err
		}
		res, err = current.NewResultFromResult(answer)
		return err
	})
	return res, err
}

func (r *Runtime) Check(ctx context.Context, c *libcni.RuntimeConf) error {
	return nl.Do(r.node.Netns, func() error { return r.cni.CheckNetworkList(ctx, r.list, c) })
}

func (r *Runtime) Del(ctx context.Context, c *libcni.RuntimeConf) error {
	return nl.Do(r.node.Netns, func() error { return r.cni.DelNetworkList(ctx, r.list, c) })
}

// Cached tells whether the runtime has kept a result for the attachment.
func (r *Runtime) Cached(t testing.TB, c *libcni.RuntimeConf) bool {
	t.Helper()
	b, _, err := r.cni.GetNetworkListCachedConfig(r.list, c)
	if err != nil {
		t.Fatal(err)
	}
	return json.Valid(b)
}
