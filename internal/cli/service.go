package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/underlay-cni/underlay/internal/ec2"
)

// The kinds of a managed service, as vpcd knows them.
const (
	kindDatabase = "database"
	kindBalancer = "load-balancer"
)

// serviceSpec is a managed service that is to be.
type serviceSpec struct {
	name, kind, subnet string
	groups             []string
	port               int
	targets            []netip.AddrPort
}

// managedService is one as vpcd tells.
type managedService struct {
	Name               string     `json:"name"`
	Kind               string     `json:"kind"`
	NetworkInterfaceID string     `json:"networkInterfaceId"`
	PrivateIPAddress   netip.Addr `json:"privateIpAddress"`
	Netns              string     `json:"netns"`
}

// createManagedService makes what RDS or Elastic Load Balancing would make of
// itself in a subnet: a requester-managed interface that belongs to no instance
// of ours.
func (a *admin) createManagedService(ctx context.Context, spec serviceSpec) (managedService, error) {
	var s managedService
	in := map[string]any{"name": spec.name, "kind": spec.kind, "subnetId": spec.subnet, "securityGroupIds": spec.groups}
	if err := a.do(ctx, http.MethodPost, "managed-services", in, &s); err != nil {
		return s, fmt.Errorf("make managed service %s: %w", spec.name, err)
	}
	if s.Netns == "" || !s.PrivateIPAddress.IsValid() {
		return s, errors.New("make managed service " + spec.name + ": vpcd names no namespace and address for it")
	}
	return s, nil
}

func (a *admin) managedServices(ctx context.Context) ([]managedService, error) {
	var all []managedService
	return all, a.do(ctx, http.MethodGet, "managed-services", nil, &all)
}

func (a *admin) deleteManagedService(ctx context.Context, name string) error {
	return a.do(ctx, http.MethodDelete, "managed-services/"+url.PathEscape(name), nil, nil)
}

func (a *App) serviceCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "service",
		Short: "Managed services of the VPC: databases and load balancers",
		Long: `A managed service is outside all instances: an interface that its maker alone may
change (requester-managed, as RDS and Elastic Load Balancing make them), with
security groups of its own, and behind it a small TCP server of ours. It goes on
while vpcd is down, and is there again when vpcd is.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(a.serviceAddCommand(), a.serviceListCommand(), a.serviceRemoveCommand())
	return c
}

func (a *App) serviceAddCommand() *cobra.Command {
	var spec serviceSpec
	var targets []string
	c := &cobra.Command{
		Use:   "add NAME",
		Short: "Make a database, or a load balancer that forwards TCP",
		Long: `Makes a managed service. A database answers each connection with one line, its
name and the address that it sees. A load balancer forwards connections to its
targets in turn, from its own address; one that takes no connections gets none.`,
		Example: `  underlay service add db-2
  underlay service add lb-1 --kind load-balancer --port 80 --target 10.0.0.7:8080 --target 10.0.16.6:8080
  underlay service add db-3 --group sg-0123456789abcdef0`,
		Args:        cobra.ExactArgs(1),
		Annotations: rootBecause("starts a process in a network namespace"),
		RunE: func(cmd *cobra.Command, args []string) error {
			spec.name = args[0]
			switch spec.kind {
			case kindDatabase:
				if len(targets) > 0 {
					return errors.New("a database has no targets; --target is for --kind load-balancer")
				}
				if spec.port == 0 {
					spec.port = ec2.LabDatabasePort
				}
			case kindBalancer:
				var err error
				if spec.targets, err = parseTargets(targets); err != nil {
					return err
				}
				if spec.port == 0 {
					spec.port = 80
				}
			default:
				return fmt.Errorf("--kind %s: give %s or %s", spec.kind, kindDatabase, kindBalancer)
			}
			if spec.port < 0 || spec.port > 65535 {
				return fmt.Errorf("--port %d: give a number from 1 to 65535", spec.port)
			}
			o, err := a.addService(cmd.Context(), spec)
			if err != nil {
				return err
			}
			return a.print(o, func(w io.Writer) {
				fmt.Fprintf(w, "%s %s answers at %s:%d\n", spec.kind, o.Name, o.IP, spec.port)
			})
		},
	}
	c.Flags().StringVar(&spec.kind, "kind", kindDatabase, "database or load-balancer")
	c.Flags().StringVar(&spec.subnet, "subnet", "", "its subnet (default that of the first node)")
	c.Flags().StringArrayVar(&spec.groups, "group", nil, "a security group of its `ID`; repeatable (default the VPC's default group, which admits its own members alone)")
	c.Flags().IntVar(&spec.port, "port", 0, "where it listens (default 5432, of a load balancer 80)")
	c.Flags().StringArrayVar(&targets, "target", nil, "of a load balancer: `ADDRESS:PORT` to forward to; repeatable")
	_ = c.RegisterFlagCompletionFunc("kind", cobra.FixedCompletions([]string{kindDatabase, kindBalancer}, noFiles))
	return c
}

// addService makes a managed service and its server, both or neither.
func (a *App) addService(ctx context.Context, spec serviceSpec) (Outside, error) {
	h := a.home()
	l, err := h.lockLab(ctx, true)
	if err != nil {
		return Outside{}, err
	}
	defer l.release("")
	f, err := h.loadUp()
	if err != nil {
		return Outside{}, err
	}
	if _, err := f.machineNetns(spec.name); err == nil {
		return Outside{}, fmt.Errorf("lab %s has a machine %s already; choose another name", h.name, spec.name)
	}
	if spec.subnet == "" {
		spec.subnet = f.Lab.Nodes[0].SubnetID
	}
	vpcd := newAdmin(f.Lab.Endpoint)
	m, err := vpcd.createManagedService(ctx, spec)
	if err != nil {
		return Outside{}, err
	}
	o := Outside{Name: m.Name, Netns: m.Netns, IP: m.PrivateIPAddress}
	f.Lab.Outside = append(f.Lab.Outside, o)
	s, err := h.startServer(ctx, o, spec)
	if err == nil {
		f.Servers = append(f.Servers, s)
		err = h.save(f)
	}
	if err != nil {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), 15*time.Second)
		defer cancel()
		end(clean, []proc{s.Proc}, time.Second)
		return Outside{}, errors.Join(err, vpcd.deleteManagedService(clean, spec.name))
	}
	return o, nil
}

// startServer starts what answers on an outside machine, and waits until it
// does. It is a process of its own: nobody's end but down's ends it.
func (h home) startServer(ctx context.Context, o Outside, spec serviceSpec) (server, error) {
	self, err := program("underlay")
	if err != nil {
		return server{}, err
	}
	s := server{On: o.Name, Port: spec.port, Log: h.outsideLog(o.Name)}
	argv := []string{"serve-tcp"}
	if spec.kind == kindBalancer {
		argv = []string{"serve-balancer"}
	}
	argv = append(argv, "--name", h.name, "--server-name", o.Name, "--listen", fmt.Sprintf(":%d", spec.port))
	for _, t := range spec.targets {
		argv = append(argv, "--target", t.String())
	}
	cmd := newCommand(self, argv...)
	cmd.Env = cleanEnv()
	var exited func() error
	if s.Proc, exited, err = background(cmd, o.Netns, s.Log); err != nil {
		return s, err
	}
	return s, whileAlive(ctx, "the server on "+o.Name, exited, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeoutCause(ctx, 10*time.Second, fmt.Errorf("the server on %s did not start within 10 s", o.Name))
		defer cancel()
		return poll(ctx, 5*time.Millisecond, func() (bool, error) { lines, err := tail(s.Log, 1); return len(lines) > 0, err })
	})
}

// serviceRow is one of service list.
type serviceRow struct {
	managedService
	Port   int  `json:"port"`   // 0: nothing of ours is behind it
	Serves bool `json:"serves"` // its server runs
}

func (a *App) serviceListCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List the managed services",
		Example: "  underlay service list",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			f, err := a.home().loadUp()
			if err != nil {
				return err
			}
			all, err := newAdmin(f.Lab.Endpoint).managedServices(cmd.Context())
			if err != nil {
				return err
			}
			rows := []serviceRow{}
			for _, m := range all {
				r := serviceRow{managedService: m}
				for _, s := range f.Servers {
					if s.On == m.Name {
						r.Port, r.Serves = s.Port, s.Proc.alive()
					}
				}
				rows = append(rows, r)
			}
			return a.print(rows, func(w io.Writer) {
				t := table{head: []string{"SERVICE", "KIND", "ADDRESS", "ENI", "STATE"}}
				for _, r := range rows {
					state := "nothing behind it"
					switch {
					case r.Serves:
						state = fmt.Sprintf("answers on port %d", r.Port)
					case r.Port > 0:
						state = "its server has ended"
					}
					t.row(text(r.Name), text(r.Kind), text(r.PrivateIPAddress.String()), text(r.NetworkInterfaceID), text(state))
				}
				t.write(w, "", colored(w))
			})
		},
	}
}

func (a *App) serviceRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "rm NAME",
		Short:             "Remove a managed service",
		Example:           "  underlay service rm lb-1",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeMachines,
		Annotations:       rootBecause("ends a process and removes a network namespace"),
		RunE: func(cmd *cobra.Command, args []string) error {
			h := a.home()
			l, err := h.lockLab(cmd.Context(), true)
			if err != nil {
				return err
			}
			defer l.release("")
			f, err := h.loadUp()
			if err != nil {
				return err
			}
			name := args[0]
			for _, o := range f.Lab.Outside {
				if o.Name == name && o.InstanceID != "" {
					return fmt.Errorf("%s is an instance and no managed service", name)
				}
			}
			var procs []proc
			for _, s := range f.Servers {
				if s.On == name {
					procs = append(procs, s.Proc)
				}
			}
			if left := end(cmd.Context(), procs, time.Second); len(left) > 0 {
				return fmt.Errorf("%s does not end", describeProcess(left[0].PID))
			}
			if err := newAdmin(f.Lab.Endpoint).deleteManagedService(cmd.Context(), name); err != nil {
				return fmt.Errorf("remove managed service %s: %w", name, err)
			}
			f.Servers = slices.DeleteFunc(f.Servers, func(s server) bool { return s.On == name })
			f.Lab.Outside = slices.DeleteFunc(f.Lab.Outside, func(o Outside) bool { return o.Name == name })
			if err := h.save(f); err != nil {
				return err
			}
			return a.print(map[string]string{"removed": name}, func(w io.Writer) { fmt.Fprintf(w, "%s is gone\n", strings.TrimSpace(name)) })
		},
	}
}
