package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

const (
	// rivalPoll is how often a start looks whether the rival is gone.
	rivalPoll = 5 * time.Second
	// Where the AWS VPC CNI's agent is found, v1.23: its program, its socket
	// for the plugin, its introspection port.
	awsNodeProgram       = "aws-k8s-agent"
	awsNodeSocket        = "/var/run/aws-node/ipamd.sock"
	awsNodeIntrospection = "127.0.0.1:61679"
)

// migrate is what to do about a rival.
const migrate = "two agents would hand out the same addresses. Cordon and drain this node, keep aws-node off it " +
	"(kubectl -n kube-system edit daemonset aws-node: a node affinity that leaves it out), and this agent serves by itself; " +
	"it takes over the interfaces that carry this node's and cluster's tags"

// AWSNode reports where an agent of the AWS VPC CNI runs in this process's
// network namespace; "" when there is none. It looks at processes, as far as
// /proc shows them, at the agent's socket, and at its introspection port.
func AWSNode(ctx context.Context) string {
	if pid := processInNetns(awsNodeProgram); pid != 0 {
		return fmt.Sprintf("process %s, pid %d", awsNodeProgram, pid)
	}
	for _, at := range []struct{ network, address string }{{"unix", awsNodeSocket}, {"tcp", awsNodeIntrospection}} {
		d := net.Dialer{Timeout: time.Second}
		if c, err := d.DialContext(ctx, at.network, at.address); err == nil {
			c.Close()
			return "it answers on " + at.address
		}
	}
	return ""
}

// processInNetns returns the pid of a program of that name in our network
// namespace, 0 if there is none.
func processInNetns(name string) int {
	ours, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return 0
	}
	comms, _ := filepath.Glob("/proc/[0-9]*/comm") // the pattern is well-formed
	for _, path := range comms {
		comm, err := os.ReadFile(path)
		if err != nil || strings.TrimSpace(string(comm)) != name {
			continue // ended meanwhile, or another
		}
		dir := filepath.Dir(path)
		if theirs, err := os.Readlink(filepath.Join(dir, "ns/net")); err != nil || theirs != ours {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(dir))
		return pid
	}
	return 0
}

// rival returns an error when another agent hands out this node's addresses.
func (a *Agent) rival(ctx context.Context) error {
	if a.opts.Rival == nil {
		return nil
	}
	if where := a.opts.Rival(ctx); where != "" {
		return fmt.Errorf("the AWS VPC CNI runs on this node (%s): %s", where, migrate)
	}
	return nil
}

// awaitAlone waits until no other agent hands out the node's addresses.
// Nothing is read from EC2 and nothing written anywhere before.
func (a *Agent) awaitAlone(ctx context.Context) error {
	for {
		err := a.rival(ctx)
		a.mu.Lock()
		a.refuses = err != nil
		a.mu.Unlock()
		if err == nil {
			return nil
		}
		a.setWaitsFor("not ready: " + err.Error())
		a.incident("start", err.Error())
		t := time.NewTimer(rivalPoll)
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
	}
}

// errRival ends an agent beside which another one was started: what that one
// does with the addresses is not seen from here. The next start waits for its
// end; the pods' packets go on.
var errRival = errors.New("stopped serving")
