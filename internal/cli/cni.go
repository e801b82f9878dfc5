package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	cniversion "github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/agentapi/install"
)

// runtime is a container runtime on one node, as far as CNI is concerned:
// libcni with the node's config list, its plugin started in the node's network
// namespace.
type runtime struct {
	node Node
	cni  *libcni.CNIConfig
	list *libcni.NetworkConfigList
}

func newRuntime(h home, n Node) (*runtime, error) {
	list, err := libcni.LoadConfList(n.CNIConfDir, install.Network)
	if err != nil {
		return nil, fmt.Errorf("read the CNI config of %s: %w", n.Name, err)
	}
	cache := filepath.Join(h.node(n.Name), "cni", "cache")
	return &runtime{
		node: n,
		cni:  libcni.NewCNIConfigWithCacheDir([]string{n.CNIBinDir}, cache, &pluginExec{netns: n.Netns}),
		list: list,
	}, nil
}

// addTimeout is longer than the agent's own patience, which answers with a
// better reason.
const addTimeout = 2 * time.Minute

type addResult struct {
	ip, mac string
}

func (r *runtime) add(ctx context.Context, p *podFile) (addResult, error) {
	ctx, cancel := context.WithTimeout(ctx, addTimeout)
	defer cancel()
	res, err := r.cni.AddNetworkList(ctx, r.list, r.conf(p))
	if err != nil {
		return addResult{}, fmt.Errorf("CNI ADD: %w", plainCNI(err))
	}
	result, err := types100.NewResultFromResult(res)
	if err != nil {
		return addResult{}, fmt.Errorf("CNI ADD: read the result: %w", err)
	}
	if len(result.IPs) == 0 {
		return addResult{}, errors.New("CNI ADD: the plugin answered without an address")
	}
	ip := result.IPs[0] // the primary one
	out := addResult{ip: ip.Address.IP.String()}
	if k := ip.Interface; k != nil && *k >= 0 && *k < len(result.Interfaces) {
		out.mac = result.Interfaces[*k].Mac
	}
	for _, i := range result.Interfaces {
		if out.mac == "" && i.Sandbox != "" {
			out.mac = i.Mac
		}
	}
	return out, nil
}

func (r *runtime) del(ctx context.Context, p *podFile) error {
	ctx, cancel := context.WithTimeout(ctx, addTimeout)
	defer cancel()
	if err := r.cni.DelNetworkList(ctx, r.list, r.conf(p)); err != nil {
		return fmt.Errorf("CNI DEL: %w", plainCNI(err))
	}
	return nil
}

func (r *runtime) conf(p *podFile) *libcni.RuntimeConf {
	conf := &libcni.RuntimeConf{
		ContainerID: p.ContainerID,
		NetNS:       p.Pod.Netns,
		IfName:      "eth0",
		Args: [][2]string{
			{"IgnoreUnknown", "1"},
			{"K8S_POD_NAMESPACE", "default"},
			{"K8S_POD_NAME", p.Pod.Name},
			{"K8S_POD_INFRA_CONTAINER_ID", p.ContainerID},
		},
	}
	if p.Groups != "" {
		conf.Args = append(conf.Args, [2]string{"UNDERLAY_SECURITY_GROUPS", p.Groups})
	}
	if p.GroupsMode != "" {
		conf.Args = append(conf.Args, [2]string{"UNDERLAY_SECURITY_GROUPS_MODE", p.GroupsMode})
	}
	if p.Subnet != "" {
		conf.Args = append(conf.Args, [2]string{"UNDERLAY_SUBNET", p.Subnet})
	}
	return conf
}

// pluginError is a plugin's own error without what libcni wraps around it.
type pluginError struct{ cni *types.Error }

func (e pluginError) Error() string {
	if e.cni.Details != "" {
		return fmt.Sprintf("%s (%s) (code %d)", e.cni.Msg, e.cni.Details, e.cni.Code)
	}
	return fmt.Sprintf("%s (code %d)", e.cni.Msg, e.cni.Code)
}

func (e pluginError) Unwrap() error { return e.cni }

func plainCNI(err error) error {
	var e *types.Error
	if !errors.As(err, &e) {
		return err
	}
	return pluginError{cni: e}
}

// pluginExec starts plugins in a network namespace, for libcni.
type pluginExec struct {
	netns string
	cniversion.PluginDecoder
}

// ExecPlugin runs a plugin to its end. It speaks through files in memory: with
// pipes, each of hundreds of plugins at once needs goroutines of ours to be
// scheduled before it counts as ended. Once, on a busy machine, three of 230
// had not after five seconds; that those goroutines starved is a guess.
func (e *pluginExec) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	var files [3]*os.File // stdin, stdout, stderr
	for i, content := range [][]byte{stdin, nil, nil} {
		f, err := memFile(content)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		files[i] = f
	}
	cmd := exec.CommandContext(ctx, path)
	cmd.Env = environ
	cmd.Stdin, cmd.Stdout, cmd.Stderr = files[0], files[1], files[2]
	err := startIn(cmd, e.netns)
	if err == nil {
		err = cmd.Wait()
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	out, readErr := contentOf(files[1])
	if err == nil {
		return out, readErr
	}
	// A plugin says on stdout what went wrong.
	var ce types.Error
	if json.Unmarshal(out, &ce) == nil && ce.Msg != "" {
		return nil, &ce
	}
	said, _ := contentOf(files[2])
	return nil, fmt.Errorf("run %s: %w: %s", filepath.Base(path), err, strings.TrimSpace(string(said)))
}

// memFile returns a file in memory, open at its beginning.
func memFile(content []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("ul-plugin", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make a file in memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "ul-plugin")
	if _, err := f.WriteAt(content, 0); err != nil {
		f.Close()
		return nil, fmt.Errorf("write a file in memory: %w", err)
	}
	return f, nil
}

// contentOf returns all of a file, wherever it stands.
func contentOf(f *os.File) ([]byte, error) {
	return io.ReadAll(io.NewSectionReader(f, 0, math.MaxInt64))
}

// FindInPath finds a plugin.
func (e *pluginExec) FindInPath(plugin string, paths []string) (string, error) {
	return invoke.FindInPath(plugin, paths)
}
