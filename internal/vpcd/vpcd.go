package vpcd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/api"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/dns"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
	"github.com/underlay-cni/underlay/internal/vpcd/iam"
	"github.com/underlay-cni/underlay/internal/vpcd/imds"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// Files of Options.Dir.
const (
	stateFile = "state.db"
	keyFile   = "imds.key"
	s3Folder  = "s3"

	flowFolder = "flows"
)

// Options of Run.
type Options struct {
	Name     string   // of the lab: its namespaces are ul-NAME-…
	Dir      string   // for the state; made if it is not there
	BPFFS    string   // a directory in a mounted bpffs, for the fabric's pins
	Listen   string   // address of the EC2 API and of /_vpcd/; port 0: one as nl.Listen takes it
	NoFabric bool     // the API alone: no namespaces, no packets, no IMDS
	Region   string   // "" is us-east-1
	Zones    int      // 0 is 3
	Account  string   // "" is 123456789012
	S3Dir    string   // folder that stands for S3, "" is s3 in Dir: a flow log's bucket is a folder in it
	Policies []string // files with IAM policies, FILE or ACCESSKEY=FILE: see package iam
	// Inferred and LinkLocalPPS are the fabric's, see fabric.Options.
	Inferred     fabric.Inferred
	LinkLocalPPS int
	// ConntrackAllowance as well.
	ConntrackAllowance int
	// FlowInterval is how long packets are gathered into one flow record, at
	// most; 0 is 60 s. The setting flowInterval of chaos goes before it.
	FlowInterval time.Duration
	// FileInterval is how often the files of flow logs are written; 0 is 5 min.
	// What is shorter than a record is as a record. The setting fileInterval of
	// chaos goes before it.
	FileInterval time.Duration
	Logger       *slog.Logger
	Ready        func(listen net.Addr) // called once the EC2 API answers; may be nil
}

// Run serves a VPC until ctx ends. The fabric stays when it returns.
func Run(ctx context.Context, o Options) (err error) {
	o.Region, o.Account, o.Zones = cmp.Or(o.Region, "us-east-1"), cmp.Or(o.Account, "123456789012"), cmp.Or(o.Zones, 3)
	o.Logger = cmp.Or(o.Logger, slog.Default())
	o.S3Dir, o.FlowInterval = cmp.Or(o.S3Dir, filepath.Join(o.Dir, s3Folder)), cmp.Or(o.FlowInterval, defaultFlowInterval)
	o.FileInterval = cmp.Or(o.FileInterval, defaultFileInterval)
	if err := os.MkdirAll(o.Dir, 0o750); err != nil {
		return fmt.Errorf("make the state directory: %w", err)
	}
	// First of all, as it fails at once on an address in use.
	listener, err := nl.Listen(o.Listen)
	if err != nil {
		return fmt.Errorf("listen for EC2 clients: %w; stop what is there, or choose another address with --listen", err)
	}
	defer closing(&err, listener)
	key, err := imdsKey(o.Dir)
	if err != nil {
		return err
	}
	state, err := store.Open(filepath.Join(o.Dir, stateFile), store.Options{})
	if err != nil {
		return err
	}
	defer closing(&err, state)

	control := chaos.New(nil)
	files := newDelivery(o.S3Dir, o.Account, o.Region)
	ec2 := api.New(api.Options{Store: state, Chaos: control, Region: o.Region, Account: o.Account, Zones: o.Zones, Logger: o.Logger, Delivered: files.state})
	state.KeepHistory(func() time.Duration { s := control.Get(); return s.LongestLag() })
	handlers := ec2.Handlers()
	adm := &admin{options: o, chaos: control, store: state, api: ec2}
	for _, action := range enforced {
		handlers[action] = handlers[action].Then(adm.enforce)
	}
	guard, err := iam.Load(o.Policies, ec2.Needs)
	if err != nil {
		return err
	}
	calls := &callCounter{counts: map[string]uint64{}}
	ec2Handler := query.NewServer(query.Options{Handlers: handlers, Gate: calls.gate(guard.Gate(control.Gate)), Account: o.Account, Region: o.Region, Logger: o.Logger})
	ids, err := zoneIDs(ctx, handlers)
	if err != nil {
		return err
	}
	source := &metadata{store: state, lag: func() time.Duration { return control.Get().IMDSLag }, now: time.Now, account: o.Account, region: o.Region, zoneIDs: ids}

	adm.calls = calls
	servers := []*http.Server{httpServer(adm.wrap(ec2Handler), o.Logger)}
	jobs := []func(context.Context) error{ec2.Run}
	if !o.NoFabric {
		f, openErr := fabric.Open(fabric.Options{Lab: o.Name, BPFFS: o.BPFFS, Logger: o.Logger, Inferred: o.Inferred, LinkLocalPPS: o.LinkLocalPPS, ConntrackAllowance: o.ConntrackAllowance})
		if openErr != nil {
			return fmt.Errorf("open the fabric: %w", openErr)
		}
		defer closing(&err, f)
		datagrams, listenErr := f.ListenResolver()
		if listenErr != nil {
			return listenErr
		}
		resolver := &dns.Server{Region: dns.Region{Name: o.Region, Internet: fabric.InternetAddrs[0].Addr()}, View: state.View, Logger: o.Logger}
		inside := httpServer(ec2Handler, o.Logger) // no /_vpcd/ for instances
		adm.fabric = &reconciler{
			names: names{o.Name}, store: state, net: f, now: time.Now, log: o.Logger, ec2: inside, changed: state.Changed(), again: make(chan struct{}, 1),
			exists:     nl.ExistsNamed,
			mappingLag: func() time.Duration { return control.Get().MappingLag },
			dns:        resolver,
			imds: func(id vpc.InstanceID) *imds.Server {
				return imds.New(imds.Config{Instance: id, Source: source, Key: key, Logger: o.Logger})
			},
		}
		out := &internet{run: f.Internet, there: make(chan struct{}, 1), log: o.Logger}
		adm.fabric.internet = out.isThere
		source.mapped = adm.fabric.mapped
		kept, keptErr := openKept(filepath.Join(o.Dir, flowFolder))
		if keptErr != nil {
			return keptErr
		}
		adm.flow = &flowLogger{
			net: f, store: state, account: o.Account, region: o.Region, zoneIDs: ids, log: o.Logger, files: files, recent: newRecentFlows(),
			interval: func() time.Duration { return cmp.Or(control.Get().FlowInterval, o.FlowInterval) },
			window:   func() time.Duration { return cmp.Or(control.Get().FileInterval, o.FileInterval) }, kept: kept,
			ended: make(chan struct{}, 1),
		}
		// What does not succeed is tried again soon.
		if e := adm.flow.catchUp(); e != nil {
			o.Logger.Error("flow records not kept", "err", e)
		}
		if e := adm.flow.endDue(time.Now()); e != nil {
			o.Logger.Error("flow interval not ended", "err", e)
		}
		servers = append(servers, inside)
		jobs = append(jobs, adm.fabric.Run, adm.flow.Run, out.Run,
			func(ctx context.Context) error { return expire(ctx, f, o.Logger) },
			func(context.Context) error {
				return dns.ServeUDP(resolver, datagrams, func(c fabric.Client) vpc.ENIID { return c.ENI })
			},
			func(ctx context.Context) error { <-ctx.Done(); return datagrams.Close() })
	}

	group, ctx := errgroup.WithContext(ctx)
	for _, job := range jobs {
		group.Go(func() error { return job(ctx) })
	}
	group.Go(func() error { return serve(servers[0], listener) })
	group.Go(func() error {
		<-ctx.Done()
		return shutdown(servers)
	})
	o.Logger.Info("vpcd serves", "name", o.Name, "listen", listener.Addr().String(), "fabric", !o.NoFabric)
	if o.Ready != nil {
		o.Ready(listener.Addr())
	}
	err = group.Wait()
	o.Logger.Info("vpcd stops", "name", o.Name)
	return err
}

// enforced are the actions that are answered only when the fabric does what
// they say, unless a setting has it lag: those that open, close or move a way
// for packets between interfaces that stand.
var enforced = []string{
	"AuthorizeSecurityGroupEgress", "AuthorizeSecurityGroupIngress", "RevokeSecurityGroupEgress", "RevokeSecurityGroupIngress",
	"ModifySecurityGroupRules", "ModifyManagedPrefixList", "ModifyNetworkInterfaceAttribute", "ResetNetworkInterfaceAttribute", "ModifyVpcAttribute",
	"CreateNetworkAclEntry", "ReplaceNetworkAclEntry", "DeleteNetworkAclEntry", "ReplaceNetworkAclAssociation",
	"AssignPrivateIpAddresses", "UnassignPrivateIpAddresses", "AttachNetworkInterface", "DetachNetworkInterface",
	"AssignIpv6Addresses", "UnassignIpv6Addresses", "AssociateVpcCidrBlock", "DisassociateVpcCidrBlock",
	"AssociateSubnetCidrBlock", "DisassociateSubnetCidrBlock",
	"CreateRoute", "ReplaceRoute", "DeleteRoute", "AssociateRouteTable", "DisassociateRouteTable", "ReplaceRouteTableAssociation",
	"AttachInternetGateway", "DetachInternetGateway", "AssociateAddress", "DisassociateAddress", "DeleteNatGateway",
	"AcceptVpcPeeringConnection", "DeleteVpcPeeringConnection",
}

// zoneIDs asks the API for its zones' ids, by name.
func zoneIDs(ctx context.Context, handlers map[string]query.Handler) (map[string]string, error) {
	resp, err := query.Invoke[query.DescribeAvailabilityZonesRequest, query.DescribeAvailabilityZonesResponse](
		ctx, handlers["DescribeAvailabilityZones"], &query.DescribeAvailabilityZonesRequest{})
	if err != nil {
		return nil, fmt.Errorf("list the availability zones: %w", err)
	}
	out := map[string]string{}
	for _, z := range resp.AvailabilityZoneInfo {
		out[*z.ZoneName] = *z.ZoneId
	}
	return out, nil
}

// httpServer bounds what a client may make us wait for. There is no write
// timeout: chaos may delay an answer.
func httpServer(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler: h, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: 64 << 10, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}

// expireEvery is how often idle flows make room for others. At 2,000
// connections per second, those that are closed and not removed yet take up a
// quarter of the table.
const expireEvery = 5 * time.Second

// expire removes idle flows from the fabric until ctx ends.
func expire(ctx context.Context, f *fabric.Fabric, log *slog.Logger) error {
	// At once, or a vpcd that dies more often than that never makes room.
	next := time.NewTimer(0)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-next.C:
			next.Reset(expireEvery)
		}
		if n, err := f.ExpireFlows(); err != nil {
			log.Error("idle flows not removed", "err", err)
		} else if n > 0 {
			log.Debug("idle flows removed", "flows", n)
		}
		if err := f.RefillAllowances(); err != nil {
			log.Error("tracked flows not counted", "err", err)
		}
	}
}

func serve(s *http.Server, l net.Listener) error {
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve EC2 clients: %w", err)
	}
	return nil
}

// shutdown lets requests finish, for a moment.
func shutdown(servers []*http.Server) error {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	for _, s := range servers {
		if s.Shutdown(ctx) != nil {
			_ = s.Close() // whoever still waits is cut off
		}
	}
	return nil
}

// closing closes c when a function returns, and tells of what goes wrong.
func closing(err *error, c interface{ Close() error }) {
	if e := c.Close(); e != nil && !errors.Is(e, net.ErrClosed) {
		*err = errors.Join(*err, fmt.Errorf("close: %w", e))
	}
}

// Destroy removes a lab's fabric, its instances' namespaces and its state. It
// refuses while a vpcd serves it.
func Destroy(o Options) error {
	path := filepath.Join(o.Dir, stateFile)
	if _, err := os.Stat(path); err == nil {
		state, err := store.Open(path, store.Options{})
		if err != nil {
			return fmt.Errorf("destroy lab %s: is its vpcd still running? stop it first: %w", o.Name, err)
		}
		if err := state.Close(); err != nil {
			return fmt.Errorf("close the state: %w", err)
		}
	}
	if err := fabric.Destroy(fabric.Options{Lab: o.Name, BPFFS: o.BPFFS, Logger: o.Logger}); err != nil {
		return fmt.Errorf("destroy the fabric: %w", err)
	}
	var errs []error
	for _, f := range []string{stateFile, keyFile} {
		if err := os.Remove(filepath.Join(o.Dir, f)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove the state: %w", err))
		}
	}
	for _, f := range []string{s3Folder, flowFolder} {
		if err := os.RemoveAll(filepath.Join(o.Dir, f)); err != nil {
			errs = append(errs, fmt.Errorf("remove the state: %w", err))
		}
	}
	return errors.Join(errs...)
}
