// Command underlay-agent is the node agent: it holds the node's addresses in
// EC2, makes the pods' endpoints, and serves the CNI plugin on a unix socket.
// It runs in the node's network namespace. When it ends, however it ends, the
// pods' packets go on.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"golang.org/x/sync/errgroup"

	"github.com/underlay-cni/underlay/internal/agent"
	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/datapath"
	"github.com/underlay-cni/underlay/internal/ec2"
	"github.com/underlay-cni/underlay/internal/imds"
	"github.com/underlay-cni/underlay/internal/ipam"
)

func main() {
	// A burst of pods leaves garbage behind. Collected at a quarter of the live
	// heap, not at all of it, 230 at once cost a fifth less at their peak, which is
	// 33 MB now (TestBurst), and no time that could be told from chance.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(25)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stderr)
	stop()
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errUsage):
		os.Exit(2)
	default:
		fmt.Fprintln(os.Stderr, "underlay-agent:", err)
		os.Exit(1)
	}
}

// run is the whole wiring: one agent between a socket, a kernel and a cloud.
func run(ctx context.Context, args []string, stderr io.Writer) error {
	if len(args) > 0 && args[0] == "poller" {
		return runPoller(ctx, args[1:], stderr)
	}
	o, err := parseFlags(args, stderr)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: o.level}))
	if o.uninstall {
		if err := ownBPFFS(o); err != nil {
			return err
		}
		err := uninstall(ctx, o, log)
		if err == nil && o.stay {
			stay(ctx, log)
		}
		return err
	}
	tune, err := knobs(os.LookupEnv, o.prefixes)
	if err != nil {
		return err
	}
	aws := tune
	tune = func(c *ipam.Config) { aws(c); c.SetLinger = o.linger }
	if err := preflight(o); err != nil {
		return err
	}
	lock, err := agent.Lock(ctx, o.socket, log)
	if err != nil {
		return stopped(ctx, err)
	}
	defer lock.Close()
	socket, err := agentapi.Listen(o.socket)
	if err != nil {
		return err
	}
	defer socket.Close()
	var ended agent.Ended
	var a *agent.Agent // there before the first ADD is served
	dp, err := datapath.Open(datapath.Options{BeforeReady: func(ctx context.Context, ep datapath.Endpoint) error { return a.BeforeReady(ctx, ep) },
		Ended: ended.Add, BPFFS: o.bpffs, AllowIMDS: o.imds == "allow", Hook: o.hook, SNAT: o.snat, SNATExclude: o.snatExclude, Direct: o.direct, StackNetworks: o.directExcept, ProcSysNet: o.procSysNet, Logger: log})
	if err != nil {
		return fmt.Errorf("open the datapath: %w; docs/datapath.md says what it needs of the kernel", err)
	}
	defer dp.Close()
	n, err := newNode(o, log)
	if err != nil {
		return err
	}
	a = agent.New(agent.Options{
		Version: version(), Cluster: o.cluster, Socket: o.socket, Datapath: dp, Metadata: imds.New(""), Logger: log, Tune: tune, Sweep: o.sweep, Rival: agent.AWSNode,
		ConnectEC2: func(ctx context.Context, region string) (agent.EC2, error) { return ec2.New(ctx, region) },
		SetPolicy:  dp.SetPolicy, GroupsMode: o.groupsMode, GroupsPoller: o.groupsPoller, Verdicts: dp, Orchestrator: n.orchestrator(), Serving: n.install,
	})
	conntrack, err := dp.ConntrackID()
	if err != nil {
		return err
	}
	flows, err := agent.NewFlows(a, dp, &ended, conntrack, agent.FlowOptions{Dir: o.flowDir, Format: o.flows, Interval: o.flowInterval, Node: o.nodeName})
	if err != nil {
		return fmt.Errorf("%w; choose another --flow-dir", err)
	}
	log.Info("serving", "socket", o.socket, "version", version(), "hook", o.hook)

	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return agentapi.Serve(gctx, socket, a, log) })
	g.Go(func() error { return a.Run(gctx) })
	g.Go(func() error { return flows.Run(gctx) })
	g.Go(func() error { return n.run(gctx) })
	if o.metrics != "" {
		g.Go(func() error { return serveHTTP(gctx, o.metrics, handler(a, n)) })
	}
	err = g.Wait()
	if ctx.Err() != nil { // told to end
		n.leave()
	}
	return err
}

// stopped is err, or nothing when it is only that we were asked to end.
func stopped(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// version names the build: the module's version, or the commit it is of.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := info.Main.Version
	if v != "" && v != "(devel)" {
		return v
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			return "devel-" + s.Value[:12]
		}
	}
	return "devel"
}
