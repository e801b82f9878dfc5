package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/ec2"
	"github.com/underlay-cni/underlay/internal/groups"
	"github.com/underlay-cni/underlay/internal/imds"
)

// maxRate is what EC2 grants an account for reads of one kind, per second.
const maxRate = 20

type pollerOptions struct {
	listen []string
	region string
	rate   float64
	level  slog.Level
}

func parsePollerFlags(args []string, stderr io.Writer) (pollerOptions, error) {
	var o pollerOptions
	f := flag.NewFlagSet("underlay-agent poller", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.Func("listen", "`path` of a unix socket for agents, their --security-groups-poller; may be repeated", func(s string) error {
		if !filepath.IsAbs(s) || len(s) > maxSocketPath {
			return fmt.Errorf("want an absolute path of at most %d bytes", maxSocketPath)
		}
		if slices.Contains(o.listen, s) {
			return errors.New("it is there twice")
		}
		o.listen = append(o.listen, s)
		return nil
	})
	f.StringVar(&o.region, "region", "", "`name` of the region; empty: AWS_REGION, else that of the instance")
	f.Float64Var(&o.rate, "rate", groups.DefaultRate, fmt.Sprintf("requests to EC2 in a `second` at the most, of all kinds together, up to %d; a request has up to 200 security groups", maxRate))
	f.TextVar(&o.level, "log-level", slog.LevelInfo, "debug, info, warn or error")
	f.Usage = func() {
		fmt.Fprint(stderr, `underlay-agent poller reads for many agents what each would have to read for itself:
the rules of their pods' security groups, the prefix lists in these, and the
members of the groups that they name. It tells each what concerns it.

EC2 and its credentials are found as the AWS SDK documents it. It needs the
permissions to describe security group rules, managed prefix lists and their
entries, and network interfaces.

Usage:
  underlay-agent poller --listen PATH [flags]

Example:
  underlay-agent poller --listen /run/underlay/poller.sock
  underlay-agent --security-groups-poller /run/underlay/poller.sock

Flags:
`)
		f.PrintDefaults()
	}
	err := f.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return o, err
	case err != nil:
		return o, errUsage // the flag set has said what
	case f.NArg() > 0:
		err = fmt.Errorf("unexpected argument %q", f.Arg(0))
	case len(o.listen) == 0:
		err = errors.New("--listen is missing: agents have to find it")
	case !(o.rate >= 0.1 && o.rate <= maxRate):
		err = fmt.Errorf("--rate is %g, want 0.1 to %d", o.rate, maxRate)
	}
	if err != nil {
		fmt.Fprintf(stderr, "underlay-agent poller: %v; see underlay-agent poller --help\n", err)
		return o, errUsage
	}
	return o, nil
}

// runPoller is one poller between EC2 and the agents that follow it.
func runPoller(ctx context.Context, args []string, stderr io.Writer) error {
	o, err := parsePollerFlags(args, stderr)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: o.level}))
	region := o.region
	if region == "" && os.Getenv("AWS_REGION") == "" {
		id, err := imds.New("").Identity(ctx)
		if err != nil {
			return fmt.Errorf("find the region: %w; name it with --region", err)
		}
		region = id.Region
	}
	if region == "" {
		region = os.Getenv("AWS_REGION")
	}
	client, err := ec2.New(ctx, region)
	if err != nil {
		return err
	}
	told := ""
	p := groups.NewPoller(groups.PollerOptions{
		Rate: o.rate,
		Count: func(call string, err error) {
			if err == nil {
				told = "" // it is one loop that calls both
			}
			log.Debug("ec2 call ended", "op", call, "err", err)
		},
		Note: func(err error) {
			_, class := ec2.Outcome(err)
			if now := fmt.Sprint(class); now != told {
				told = now
				log.Warn("groups not read, agents keep what they know; it is tried again", "op", "read", "err", err)
			}
		},
	})
	g, gctx := errgroup.WithContext(ctx)
	for _, path := range o.listen {
		l, err := agentapi.Listen(path)
		if err != nil {
			return fmt.Errorf("%w; choose another --listen", err)
		}
		defer l.Close()
		g.Go(func() error { return p.Serve(gctx, l, log) })
	}
	g.Go(func() error { p.Run(gctx, client); return nil })
	log.Info("polling", "sockets", len(o.listen), "region", region, "rate", o.rate, "version", version())
	return g.Wait()
}
