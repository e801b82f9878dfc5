package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/agentapi/install"
)

func newCommand(path string, args ...string) *exec.Cmd { return exec.Command(path, args...) }

// writeCNI lays out what a container runtime reads: the plugin, a copy as an
// installation makes it, so that what is rebuilt later does not change a lab
// that runs; and the config list.
func writeCNI(n Node, plugin string) error {
	for _, dir := range []string{n.CNIConfDir, n.CNIBinDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("make %s: %w", dir, err)
		}
	}
	_, err := install.Target{ConfList: filepath.Join(n.CNIConfDir, install.ConfList), Bin: n.CNIBinDir, Plugin: plugin, Socket: n.AgentSocket}.Install()
	return err
}

// nodeKey is the access key that the agents sign with, in place of their
// instance's role.
const nodeKey = "AKIAUNDERLAYNODE0000"

// nodeEndpoint is the EC2 API as an instance reaches it: over the wire, at a
// link-local address that the fabric answers.
const nodeEndpoint = "http://169.254.171.24:7424"

// nodeEnv is how a program of the nodes finds EC2 at an endpoint.
func nodeEnv(endpoint string) []string {
	return []string{
		"AWS_ENDPOINT_URL_EC2=" + endpoint,
		"AWS_REGION=" + region,
		"AWS_ACCESS_KEY_ID=" + nodeKey,
		"AWS_SECRET_ACCESS_KEY=underlay",
		"AWS_CONFIG_FILE=/dev/null",
		"AWS_SHARED_CREDENTIALS_FILE=/dev/null",
	}
}

var errAgentSlow = errors.New("it did not serve within 90 s")

// startAgent starts the agent of a node and waits until it serves.
func startAgent(ctx context.Context, h home, f *labFile, n Node, agent string) error {
	// A directory in a bpffs is made like any other; the pins of a node stay
	// together.
	bpffs := h.bpf("nodes", n.Name)
	if err := os.MkdirAll(bpffs, 0o700); err != nil {
		return fmt.Errorf("make %s: %w", bpffs, err)
	}
	cmd := newCommand(agent, "--socket", n.AgentSocket, "--bpffs", bpffs, "--cluster", h.name, fmt.Sprintf("--prefixes=%v", f.Prefixes))
	if h.hasPoller() {
		cmd.Args = append(cmd.Args, "--security-groups-poller", pollerSocket(n))
	}
	cmd.Args = append(cmd.Args, f.AgentArgs...)
	cmd.Env = append(cleanEnv(nodeEnv(nodeEndpoint)...), f.AgentEnv...)
	p, exited, err := background(cmd, n.Netns, h.agentLog(n.Name))
	if err != nil {
		return err
	}
	if err := writeJSON(h.agentPID(n.Name), p); err != nil {
		return err
	}
	return whileAlive(ctx, "the agent", exited, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeoutCause(ctx, 90*time.Second, errAgentSlow)
		defer cancel()
		client := agentapi.Client{Socket: n.AgentSocket}
		var last error
		err := poll(ctx, 10*time.Millisecond, func() (bool, error) {
			err := client.Status(ctx)
			if ctx.Err() == nil { // else it tells of our deadline alone
				last = err
			}
			return err == nil, nil
		})
		if errors.Is(err, errAgentSlow) && last != nil {
			return fmt.Errorf("%w (last answer: %w)", err, last)
		}
		return err
	})
}

// restartAgent kills the agent of a node with SIGKILL, as a crash would, and
// starts it anew. It returns how long the new one took to serve.
func (a *App) restartAgent(ctx context.Context, h home, f *labFile, n Node) (time.Duration, error) {
	agent, err := program("underlay-agent")
	if err != nil {
		return 0, err
	}
	unlock, err := kill(ctx, h.node(n.Name), h.agentPID(n.Name))
	if err != nil {
		return 0, fmt.Errorf("restart the agent of %s: %w", n.Name, err)
	}
	defer unlock()
	began := a.now()
	if err := startAgent(ctx, h, f, n, agent); err != nil {
		return 0, fmt.Errorf("restart the agent of %s: %w; see: underlay logs %s%s", n.Name, err, n.Name, a.labFlag())
	}
	return a.now().Sub(began), nil
}

// kill ends the process whose name is in pidFile with SIGKILL. It holds a lock
// on dir until unlock: one restart of the same thing at a time.
func kill(ctx context.Context, dir, pidFile string) (unlock func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX); err != nil {
		d.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	if p, err := readProc(pidFile); err == nil {
		if left := end(ctx, []proc{p}, 0); len(left) > 0 {
			d.Close()
			return nil, fmt.Errorf("%s does not end", describeProcess(p.PID))
		}
	}
	return func() { d.Close() }, nil
}
