package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/agentapi/install"
	"github.com/underlay-cni/underlay/internal/datapath"
	"github.com/underlay-cni/underlay/internal/flowlog"
	"github.com/underlay-cni/underlay/internal/ipam"
)

// maxSocketPath is what fits into sockaddr_un.sun_path with its zero, unix(7).
const maxSocketPath = 107

type options struct {
	socket, bpffs, imds, cluster, metrics string
	nodeName, kubeconfig, procSysNet      string
	cniConf, cniBin, plugin               string
	hook                                  datapath.Hook
	snat                                  datapath.SNAT
	snatExclude, directExcept             []netip.Prefix
	direct                                bool
	level                                 slog.Level
	prefixes                              bool
	sweep, linger                         time.Duration
	groupsMode, groupsPoller              string
	flowDir, flowFormat                   string
	flowInterval                          time.Duration
	flows                                 *flowlog.Format // of flowFormat; nil: JSON

	uninstall, force, stay bool
}

// errUsage says that the command line was wrong, and that this was printed.
var errUsage = errors.New("wrong usage")

func parseFlags(args []string, stderr io.Writer) (options, error) {
	var o options
	if len(args) > 0 && args[0] == "uninstall" {
		o.uninstall, args = true, args[1:]
	}
	f := flag.NewFlagSet("underlay-agent", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&o.socket, "socket", "/run/underlay/agent.sock", "`path` of the unix socket for the CNI plugin")
	f.StringVar(&o.bpffs, "bpffs", "/sys/fs/bpf/underlay", "`directory` in a mounted BPF file system that outlives the agent")
	f.StringVar(&o.imds, "imds", "deny", "may pods reach the instance metadata: allow or deny")
	f.StringVar((*string)(&o.hook), "hook", string(datapath.Hooks[0]), "where the BPF programs stand: clsact, in place at once; tcx, which costs packets less, leaves the ingress qdisc to others, such as the CNI project's bandwidth plugin, and takes the kernel 10 to 50 ms for each pod; or auto, clsact on pods' devices until a pod is busy, and tcx then and on ENIs, where the kernel has it")
	f.StringVar((*string)(&o.snat), "snat", string(datapath.SNATs[0]), "by which address pods speak to the internet: eni, the primary one of their own interface; primary, that of the node's first, for public subnets, where no other interface has a public address; or none of the node, but their own, where somebody else translates")
	f.Func("snat-exclude", "`ranges` of public addresses that pods speak to under their own, such as a peered VPC's: CIDR,CIDR; may be repeated. The VPC's ranges, as they change, RFC 1918, RFC 6598 and link-local always are", func(s string) error {
		more, err := parseRanges(s)
		o.snatExclude = append(o.snatExclude, more...)
		return err
	})
	f.BoolVar(&o.direct, "direct", true, "let connections within the VPC's ranges bypass the kernel's stack where it would only route them; false: every packet takes the stack")
	f.Func("direct-except", "`ranges` within the VPC's for which every packet takes the stack: addresses that somebody on the node translates, as those of Kubernetes' Services, if they are of the VPC's ranges: CIDR,CIDR; may be repeated", func(s string) error {
		more, err := parseRanges(s)
		o.directExcept = append(o.directExcept, more...)
		return err
	})
	f.StringVar(&o.cluster, "cluster", "default", "`name` of the cluster, in the tags of the interfaces that the agent makes")
	f.BoolVar(&o.prefixes, "prefixes", false, "take addresses as /28 prefixes, sixteen at a time, where instance type and subnet allow it")
	f.DurationVar(&o.sweep, "sweep", 0, "`time` between deletions of the interfaces that dead nodes of the cluster left, e.g. 10m; set it on one agent of a cluster; 0: never")
	f.StringVar(&o.groupsMode, "security-groups-mode", agentapi.GroupsVPC, "who judges by pods' security groups, unless a pod says: vpc, by an interface with exactly these groups, and the node what the VPC does not see; or host, the node alone: to the VPC such pods have the node's groups")
	f.StringVar(&o.groupsPoller, "security-groups-poller", "", "`path` of the unix socket of a poller (underlay-agent poller), which reads the rules of security groups for many agents; while it is away the agent reads them itself; empty: it always does")
	f.DurationVar(&o.linger, "security-groups-linger", ipam.Default().SetLinger, "`time` that the interface of a set of security groups is kept after its last pod: to make and attach one takes seconds, and while it is kept no other set can have its place")
	f.StringVar(&o.metrics, "metrics-listen", "", "`address` for /metrics (Prometheus), /livez and /readyz, e.g. 127.0.0.1:9464; empty: none")
	f.StringVar(&o.flowDir, "flow-dir", "", "`directory` for files of flow records; empty: none are written, and underlay flows has the latest all the same")
	f.StringVar(&o.flowFormat, "flow-format", flowlog.Default, "`fields` of a record, as VPC flow logs have them, and pod, namespace, node, direction, verdict, rule; or json")
	f.DurationVar(&o.flowInterval, "flow-interval", time.Minute, "how long a flow record collects, from 1s to 10m")
	f.StringVar(&o.nodeName, "node-name", "", "`name` of the node in Kubernetes: the agent then takes the taint underlay.dev/agent-not-ready off, publishes how many pods the node has addresses for, and posts events on pods; empty: there is no Kubernetes")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "`file` by which the API server is found; empty: as a pod of the cluster finds it")
	f.StringVar(&o.cniConf, "cni-conf", "", "`file` to write the CNI configuration list to when the agent serves, e.g. /etc/cni/net.d/10-underlay.conflist; with --cni-bin; empty: somebody else installs")
	f.StringVar(&o.cniBin, "cni-bin", "", "`directory` to copy the CNI plugin to when the agent serves, e.g. /opt/cni/bin")
	f.StringVar(&o.plugin, "plugin", "", "`file` of the CNI plugin to copy; empty: underlay-cni beside this program")
	f.StringVar(&o.procSysNet, "proc-sys-net", datapath.ProcSysNet, "`directory` where the host's /proc/sys/net can be written, for containers whose own is read-only")
	if o.uninstall {
		f.BoolVar(&o.force, "force", false, "go on while pods have their network from here: it is cut off")
		f.BoolVar(&o.stay, "stay", false, "do not end when all is done, for a container that would be started again")
	}
	f.TextVar(&o.level, "log-level", slog.LevelInfo, "debug, info, warn or error")
	f.Usage = func() {
		fmt.Fprint(stderr, `underlay-agent holds a node's addresses in EC2 and makes its pods' endpoints.

It runs as root in the node's network namespace. EC2 and its credentials are
found as the AWS SDK documents it (AWS_ENDPOINT_URL_EC2, the instance's role, …).
The AWS VPC CNI's WARM_IP_TARGET, MINIMUM_IP_TARGET, WARM_PREFIX_TARGET,
WARM_ENI_TARGET, MAX_ENI, IP_COOLDOWN_PERIOD and ENABLE_PREFIX_DELEGATION keep
their meaning in the environment; without them one address is kept free. So do
AWS_VPC_K8S_CNI_EXTERNALSNAT (--snat=none) and AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS
(--snat-exclude).

underlay-agent uninstall, with the same flags, takes a node on which no agent
and no pod runs any more back to what it was: config list and plugin, rules,
routes, nftables, pins, and what the node holds in EC2. It may be repeated.

underlay-agent poller reads for many agents what each would have to read of
security groups for itself; see underlay-agent poller --help.

Usage:
  underlay-agent [flags]
  underlay-agent uninstall [--force] [flags]
  underlay-agent poller --listen PATH [flags]

Example:
  underlay-agent --socket /run/underlay/agent.sock --bpffs /sys/fs/bpf/underlay --cluster prod

Flags:
`)
		f.PrintDefaults()
	}
	err := f.Parse(args)
	if err == nil {
		given := false
		f.Visit(func(f *flag.Flag) { given = given || f.Name == "snat" })
		err = snatKnobs(os.LookupEnv, given, &o)
		if err != nil {
			fmt.Fprintf(stderr, "underlay-agent: %v\n", err)
		}
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
		return o, err
	case err != nil:
		return o, errUsage // the flag set has said what
	case f.NArg() > 0:
		err = fmt.Errorf("unexpected argument %q", f.Arg(0))
	case o.imds != "allow" && o.imds != "deny":
		err = fmt.Errorf("--imds is %q, want allow or deny", o.imds)
	case !slices.Contains(datapath.Hooks, o.hook):
		err = fmt.Errorf("--hook is %q, want one of %v", o.hook, datapath.Hooks)
	case !slices.Contains(datapath.SNATs, o.snat):
		err = fmt.Errorf("--snat is %q, want one of %v", o.snat, datapath.SNATs)
	case o.cluster == "" || len(o.cluster) > 256: // EC2's limit for a tag's value
		err = errors.New("--cluster wants a name of 1 to 256 characters")
	case !filepath.IsAbs(o.socket) || len(o.socket) > maxSocketPath:
		err = fmt.Errorf("--socket is %q, want an absolute path of at most %d bytes", o.socket, maxSocketPath)
	case o.sweep < 0 || o.sweep > 0 && o.sweep < time.Second:
		err = fmt.Errorf("--sweep is %s, want 0 or at least 1s", o.sweep)
	case o.groupsMode != agentapi.GroupsVPC && o.groupsMode != agentapi.GroupsHost:
		err = fmt.Errorf("--security-groups-mode is %q, want vpc or host", o.groupsMode)
	case o.groupsPoller != "" && (!filepath.IsAbs(o.groupsPoller) || len(o.groupsPoller) > maxSocketPath):
		err = fmt.Errorf("--security-groups-poller is %q, want an absolute path of at most %d bytes", o.groupsPoller, maxSocketPath)
	case o.linger < 0:
		err = fmt.Errorf("--security-groups-linger is %s, want 0 or more", o.linger)
	case !filepath.IsAbs(o.bpffs):
		err = fmt.Errorf("--bpffs is %q, want an absolute path", o.bpffs)
	case !filepath.IsAbs(o.procSysNet):
		err = fmt.Errorf("--proc-sys-net is %q, want an absolute path", o.procSysNet)
	case (o.cniConf == "") != (o.cniBin == ""):
		err = errors.New("--cni-conf and --cni-bin go together")
	case o.cniConf != "" && (!filepath.IsAbs(o.cniConf) || !filepath.IsAbs(o.cniBin)):
		err = fmt.Errorf("--cni-conf is %q and --cni-bin %q, want absolute paths", o.cniConf, o.cniBin)
	case o.cniConf != "" && filepath.Ext(o.cniConf) != ".conflist": // libcni reads lists from no other
		err = fmt.Errorf("--cni-conf is %q, want a name that ends with .conflist: runtimes read no other list", o.cniConf)
	case o.flowDir != "" && !filepath.IsAbs(o.flowDir):
		err = fmt.Errorf("--flow-dir is %q, want an absolute path", o.flowDir)
	case o.flowInterval < time.Second || o.flowInterval > 10*time.Minute:
		err = fmt.Errorf("--flow-interval is %s, want 1s to 10m", o.flowInterval)
	case o.kubeconfig != "" && o.nodeName == "":
		err = errors.New("--kubeconfig wants --node-name")
	}
	if err == nil && o.flowFormat != "json" {
		var format flowlog.Format
		if format, err = flowlog.ParseFormat(o.flowFormat); err != nil {
			err = fmt.Errorf("--flow-format: %w", err)
		}
		o.flows = &format
	}
	if err != nil {
		fmt.Fprintf(stderr, "underlay-agent: %v; see underlay-agent --help\n", err)
		return o, errUsage
	}
	return o, nil
}

// preflight looks for what would fail later with less to say.
func preflight(o options) error {
	if os.Geteuid() != 0 {
		return errors.New("the agent makes network devices and loads BPF programs; run it as root")
	}
	dir := filepath.Dir(o.socket)
	switch st, err := os.Stat(dir); {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("the socket's directory %s is missing; make it (mkdir -p %s) or choose another --socket", dir, dir)
	case err != nil:
		return fmt.Errorf("look at the socket's directory: %w; choose another --socket", err)
	case !st.IsDir():
		return fmt.Errorf("%s is no directory; choose another --socket", dir)
	}
	if o.cniConf != "" {
		if err := checkInstall(o); err != nil {
			return err
		}
	}
	return checkBPFFS(o.bpffs)
}

// checkInstall looks for what the installation needs.
func checkInstall(o options) error {
	t, err := o.target()
	if err != nil {
		return err
	}
	if _, err := os.Stat(t.Plugin); err != nil {
		return fmt.Errorf("look for the CNI plugin: %w; name it with --plugin, or leave --cni-conf and --cni-bin out", err)
	}
	for flag, dir := range map[string]string{"--cni-conf": filepath.Dir(o.cniConf), "--cni-bin": o.cniBin} {
		if st, err := os.Stat(dir); err != nil || !st.IsDir() {
			return fmt.Errorf("the directory %s of %s is missing; make it (mkdir -p %s), or mount the host's", dir, flag, dir)
		}
	}
	return nil
}

// target is the runtime's place for plugins.
func (o options) target() (install.Target, error) {
	t := install.Target{ConfList: o.cniConf, Bin: o.cniBin, Plugin: o.plugin, Socket: o.socket}
	if t.Plugin == "" {
		self, err := os.Executable()
		if err != nil {
			return t, fmt.Errorf("find the CNI plugin: %w; name it with --plugin", err)
		}
		t.Plugin = filepath.Join(filepath.Dir(self), "underlay-cni")
	}
	return t, nil
}

// checkBPFFS reports whether path lies, or can be made, in a BPF file system.
func checkBPFFS(path string) error {
	at := path
	for {
		var st unix.Statfs_t
		err := unix.Statfs(at, &st)
		if err == nil {
			if st.Type != unix.BPF_FS_MAGIC {
				return fmt.Errorf("%s is on no BPF file system; mount one (mount -t bpf bpf /sys/fs/bpf) outside the agent's lifetime, and name a directory in it with --bpffs", path)
			}
			return nil
		}
		if !errors.Is(err, unix.ENOENT) || at == "/" {
			return fmt.Errorf("look at %s: %w; choose another --bpffs", at, err)
		}
		at = filepath.Dir(at)
	}
}
