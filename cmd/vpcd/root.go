package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"regexp"
	"runtime/debug"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/underlay-cni/underlay/internal/vpcd"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
)

// defaultListen is where the EC2 API is, for servers and for clients.
const defaultListen = "127.0.0.1:7424"

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "vpcd",
		Short: "A VPC in one process",
		Long: `vpcd is a VPC in one process: it speaks the EC2 API and IMDSv2, and moves real
packets between network namespaces as a VPC moves them between instances.`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	c.AddCommand(serveCommand(), destroyCommand(), chaosCommand(), versionCommand())
	return c
}

// labFlags are the flags that say which lab is meant.
func labFlags(c *cobra.Command, o *vpcd.Options) {
	f := c.Flags()
	f.StringVar(&o.Name, "name", "demo", "name of the lab; its network namespaces are called ul-NAME-…")
	f.StringVar(&o.Dir, "dir", "", "directory of the state (default /run/underlay/NAME/vpcd)")
	f.StringVar(&o.BPFFS, "bpffs", "", "directory in a mounted bpffs for what must outlive the process (default /run/underlay/NAME/bpf/vpcd)")
}

var labName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,19}$`)

// complete checks the lab flags and fills in what depends on the name.
func complete(o *vpcd.Options) error {
	if !labName.MatchString(o.Name) {
		return fmt.Errorf("--name %q: a lab's name has 1 to 20 of a-z, 0-9 and -, and begins with a letter", o.Name)
	}
	if o.Dir == "" {
		o.Dir = "/run/underlay/" + o.Name + "/vpcd"
	}
	if o.BPFFS == "" {
		o.BPFFS = "/run/underlay/" + o.Name + "/bpf/vpcd"
	}
	return nil
}

// needRoot says so before the kernel does.
func needRoot(what string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s needs root: it makes network namespaces and loads BPF programs; try sudo", what)
	}
	return nil
}

func logger(w io.Writer, level string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("--log-level %q: give debug, info, warn or error", level)
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: l})), nil
}

func serveCommand() *cobra.Command {
	var o vpcd.Options
	var level string
	c := &cobra.Command{
		Use:   "serve",
		Short: "Serve a VPC until SIGTERM",
		Long: `Serve the EC2 API on --listen, and make instances and their network as network
namespaces and BPF programs.

SIGTERM and SIGINT end the process and leave the fabric as it is: packets keep
flowing, and the next serve with the same --name, --dir and --bpffs takes it over.
SIGKILL does the same. vpcd destroy removes it all.

GET http://LISTEN/_vpcd/health answers 200 once everything stands.`,
		Example: `  # the API alone, for tests of EC2 clients; needs no root
  vpcd serve --no-fabric --dir /tmp/vpcd
  AWS_ENDPOINT_URL=http://127.0.0.1:7424 AWS_ACCESS_KEY_ID=x AWS_SECRET_ACCESS_KEY=x AWS_REGION=us-east-1 aws ec2 describe-vpcs

  # who may do what: others answer UnauthorizedOperation
  vpcd serve --no-fabric --dir /tmp/vpcd --iam-policy AKIAIOSFODNN7EXAMPLE=docs/reference/iam-policy.json

  # with packets
  mkdir -p /run/underlay/demo/bpf && mount -t bpf bpf /run/underlay/demo/bpf
  vpcd serve --name demo`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := complete(&o); err != nil {
				return err
			}
			if o.Zones < 1 || o.Zones > 6 {
				return fmt.Errorf("--zones %d: a region has 1 to 6 zones", o.Zones)
			}
			if len(o.Account) != 12 || strings.Trim(o.Account, "0123456789") != "" {
				return fmt.Errorf("--account %q: an account id has 12 digits", o.Account)
			}
			if o.FlowInterval < time.Second || o.FlowInterval > 10*time.Minute {
				return fmt.Errorf("--flow-interval %v: give 1s to 10m", o.FlowInterval)
			}
			if o.FileInterval < time.Second || o.FileInterval > time.Hour {
				return fmt.Errorf("--file-interval %v: give 1s to 1h", o.FileInterval)
			}
			if o.LinkLocalPPS == 0 || o.LinkLocalPPS < -1 {
				return fmt.Errorf("--linklocal-pps %d: give a number of packets above 0, or -1 for any number", o.LinkLocalPPS)
			}
			if o.ConntrackAllowance < 0 || o.ConntrackAllowance > math.MaxInt32 {
				return fmt.Errorf("--conntrack-allowance %d: give a number of flows above 0, or 0 for any number", o.ConntrackAllowance)
			}
			if err := o.Inferred.Check(); err != nil {
				return fmt.Errorf("%w; give one such as 30s", err)
			}
			if i := o.Inferred; min(i.TCPHandshake, i.TCPClosed, i.ICMP, i.Fragments) == 0 {
				return errors.New("a timeout of 0 would forget a flow at once; give 1s or more")
			}
			if !o.NoFabric {
				if err := needRoot("vpcd serve"); err != nil {
					return fmt.Errorf("%w, or --no-fabric for the API alone", err)
				}
			}
			log, err := logger(cmd.ErrOrStderr(), level)
			if err != nil {
				return err
			}
			o.Logger = log
			return vpcd.Run(cmd.Context(), o)
		},
	}
	labFlags(c, &o)
	f := c.Flags()
	f.StringVar(&o.Listen, "listen", defaultListen, "address of the EC2 API and of /_vpcd/; whoever reaches it may do everything")
	f.BoolVar(&o.NoFabric, "no-fabric", false, "serve the API alone: no namespaces, no packets, no IMDS")
	f.StringVar(&o.Region, "region", "us-east-1", "the region that this VPC is in")
	f.IntVar(&o.Zones, "zones", 3, "number of its availability zones")
	f.StringVar(&o.Account, "account", "123456789012", "the account that owns everything")
	f.StringVar(&o.S3Dir, "s3-dir", "", "folder that stands for S3: flow logs to arn:aws:s3:::BUCKET go to BUCKET in it (default s3 in --dir)")
	f.DurationVar(&o.FlowInterval, "flow-interval", time.Minute, "a flow record is of so long at most; 1s to 10m")
	f.DurationVar(&o.FileInterval, "file-interval", 5*time.Minute, "the files of flow logs are written so often; 1s to 1h")
	f.StringArrayVar(&o.Policies, "iam-policy", nil, "FILE with an IAM policy that calls must be allowed by, or ACCESSKEY=FILE for who signs with that key; repeatable")
	f.IntVar(&o.LinkLocalPPS, "linklocal-pps", 1024, "packets per second that an interface may send to link-local services: DNS, IMDS and NTP together; -1 for any number")
	f.IntVar(&o.ConntrackAllowance, "conntrack-allowance", 0, "flows that an instance may track at once, all its interfaces together; AWS publishes no number; 0 for as many as there is room for")
	f.DurationVar(&o.Inferred.TCPHandshake, "tcp-handshake-timeout", fabric.DefaultInferred.TCPHandshake, "how long a security group remembers a TCP connection that is not established")
	f.DurationVar(&o.Inferred.TCPClosed, "tcp-closed-timeout", fabric.DefaultInferred.TCPClosed, "… a TCP connection that is closed")
	f.DurationVar(&o.Inferred.ICMP, "icmp-timeout", fabric.DefaultInferred.ICMP, "… an ICMP query")
	f.DurationVar(&o.Inferred.Fragments, "fragment-timeout", fabric.DefaultInferred.Fragments, "… the first fragment of a datagram, which the later ones follow")
	f.BoolVar(&o.Inferred.ReceiverGroups, "egress-groups-by-receiver", false, "a group in an egress rule means the interface that receives the packet, a middlebox too, instead of the one that has its destination")
	f.StringVar(&level, "log-level", "info", "debug, info, warn or error; debug logs each request")
	return c
}

func destroyCommand() *cobra.Command {
	var o vpcd.Options
	c := &cobra.Command{
		Use:   "destroy",
		Short: "Remove a lab's network, instances and state",
		Long: `Remove what serve made and left: the fabric's namespace and pins, the namespaces
of instances and managed services, and the state. Processes in those namespaces
are not ended, but have no network any more. A lab that is served is refused.`,
		Example: `  vpcd destroy --name demo`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := complete(&o); err != nil {
				return err
			}
			if err := needRoot("vpcd destroy"); err != nil {
				return err
			}
			log, err := logger(cmd.ErrOrStderr(), "warn")
			if err != nil {
				return err
			}
			o.Logger = log
			return vpcd.Destroy(o)
		},
	}
	labFlags(c, &o)
	return c
}

// outputFlag adds -o to a command that prints data.
func outputFlag(c *cobra.Command, output *string) {
	c.Flags().StringVarP(output, "output", "o", "text", "text or json")
}

// printData writes data as -o asks: as JSON, or by text.
func printData(w io.Writer, output string, data any, text func(io.Writer)) error {
	switch output {
	case "json":
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(data)
	case "text":
		text(w)
		return nil
	}
	return fmt.Errorf("-o %q: give text or json", output)
}

type version struct {
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"`
	Go       string `json:"go"`
}

func versionCommand() *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:     "version",
		Short:   "Print the version",
		Example: `  vpcd version -o json`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			info, ok := debug.ReadBuildInfo()
			if !ok {
				return errors.New("read the version: this binary was built without module information")
			}
			v := version{Version: info.Main.Version, Go: info.GoVersion}
			for _, s := range info.Settings {
				if s.Key == "vcs.revision" {
					v.Revision = s.Value
				}
			}
			return printData(cmd.OutOrStdout(), output, v, func(w io.Writer) {
				fmt.Fprintln(w, "vpcd", v.Version, v.Revision, v.Go)
			})
		},
	}
	outputFlag(c, &output)
	return c
}
