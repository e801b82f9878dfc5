package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// App is one run of the command.
type App struct {
	In       io.Reader
	Out, Err io.Writer

	run    string // runDir; tests have another
	lab    string // --name
	output string // -o: "text" or "json"
	euid   int
	now    func() time.Time
	more   []Command
}

// Command makes a command of a room that this package may not import;
// cmd/underlay hands it in.
type Command func(*App) *cobra.Command

// exitError ends the program with a code and without a message of its own:
// what there is to say has been said.
type exitError struct{ code int }

func (e exitError) Error() string { return fmt.Sprintf("exit code %d", e.code) }

// Main runs the command, with more commands beside its own, and returns the
// exit code. The first SIGINT or SIGTERM ends the context, so that what runs
// can clean up after itself; a second one ends the program.
func Main(args []string, more ...Command) int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)
	a := &App{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, run: runDir, euid: os.Geteuid(), now: time.Now, more: more}
	return a.Run(ctx, args)
}

// Run runs the command with args and returns the exit code.
func (a *App) Run(ctx context.Context, args []string) int {
	cmd := a.command()
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(ctx)
	var exit exitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.code
	}
	hint := ""
	if strings.HasPrefix(err.Error(), "unknown command") { // cobra's, which knows no next step
		hint = "; see: underlay --help"
	}
	fmt.Fprintf(a.Err, "underlay: %s%s\n", strings.TrimSpace(err.Error()), hint)
	return 1
}

const rootHelp = `Underlay gives every container its own address in the VPC: no overlay, no NAT.

This command builds labs on one Linux machine: a VPC that speaks the EC2 API and
carries real packets, nodes with an agent each, and pods. No cloud account is
needed and nothing of the machine's own network is changed.`

const rootExample = `  underlay demo                      # everything once, each fact with its proof
  underlay up                        # a VPC, two nodes, a VM and a database
  underlay run web --count 3         # three pods, with CNI
  underlay exec web-1 -- ip addr     # inside a pod
  eval "$(underlay env)"             # aws ec2 describe-network-interfaces
  underlay status
  underlay down`

func (a *App) command() *cobra.Command {
	root := &cobra.Command{
		Use:           "underlay",
		Short:         "VPC-native container networking, in a lab on this machine",
		Long:          rootHelp,
		Example:       rootExample,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			outputs := append([]string{"text", "json"}, strings.Fields(cmd.Annotations[moreOutputs])...)
			if !slices.Contains(outputs, a.output) {
				return fmt.Errorf("-o %q is not known; use -o %s", a.output, strings.Join(outputs, " or -o "))
			}
			if err := CheckLab(a.lab); err != nil {
				return err
			}
			if why := cmd.Annotations[needsRoot]; why != "" && a.euid != 0 {
				return fmt.Errorf("%s needs root: it %s; run it with sudo", cmd.CommandPath(), why)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetIn(a.In)
	root.SetOut(a.Out)
	root.SetErr(a.Err)
	root.PersistentFlags().StringVar(&a.lab, "name", defaultLab, "the lab")
	root.PersistentFlags().StringVarP(&a.output, "output", "o", "text", "how to print: text or json")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w; see: %s --help", err, cmd.CommandPath())
	})
	_ = root.RegisterFlagCompletionFunc("name", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		names, _ := labs(a.run)
		return names, cobra.ShellCompDirectiveNoFileComp
	})
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))

	root.AddGroup(
		&cobra.Group{ID: "lab", Title: "The lab:"},
		&cobra.Group{ID: "pods", Title: "Pods and machines:"},
		&cobra.Group{ID: "look", Title: "Look at it:"},
		&cobra.Group{ID: GroupAhead, Title: "Look ahead:"},
	)
	add := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add("lab", a.upCommand(), a.downCommand(), a.demoCommand(), a.kubernetesCommand())
	add("pods", a.runCommand(), a.rmCommand(), a.execCommand(), a.nodeCommand(), a.serviceCommand(), a.vpcdCommand(), a.pollerCommand())
	add("look", a.statusCommand(), a.podsCommand(), a.flowsCommand(), a.monitorCommand(), a.logsCommand(), a.envCommand())
	add(GroupAhead, a.planCommand())
	root.AddCommand(a.versionCommand(), a.serveTCPCommand(), a.serveBalancerCommand(), a.nodeInitCommand(), a.forwardCommand())
	for _, make := range a.more {
		root.AddCommand(make(a))
	}
	return root
}

// needsRoot is an annotation: what a command does that takes root.
const needsRoot = "underlay/needs-root"

// moreOutputs is an annotation: what -o takes beside text and json.
const moreOutputs = "underlay/outputs"

func rootBecause(why string) map[string]string { return map[string]string{needsRoot: why} }

func (a *App) home() home { return home{run: a.run, name: a.lab} }

func (a *App) json() bool { return a.output == "json" }

// GroupAhead is the group of the commands that need no lab and tell what would
// be.
const GroupAhead = "ahead"

// Print writes v as JSON if -o says so, else it calls text.
func (a *App) Print(v any, text func(w io.Writer)) error { return a.print(v, text) }

// print writes v as JSON, or calls text.
func (a *App) print(v any, text func(w io.Writer)) error {
	if !a.json() {
		text(a.Out)
		return nil
	}
	e := json.NewEncoder(a.Out)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return fmt.Errorf("print JSON: %w", err)
	}
	return nil
}

// labFlag is how --name has to be given in a command that is shown to a person.
func (a *App) labFlag() string {
	if a.lab == defaultLab {
		return ""
	}
	return " --name " + a.lab
}

func (a *App) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			v := buildVersion()
			return a.print(v, func(w io.Writer) { fmt.Fprintf(w, "underlay %s (%s)\n", v.Version, v.Go) })
		},
	}
}

type version struct {
	Version string `json:"version"`
	Go      string `json:"go"`
}

func buildVersion() version {
	v := version{Version: "unknown"}
	if bi, ok := debug.ReadBuildInfo(); ok {
		v.Version, v.Go = bi.Main.Version, bi.GoVersion
	}
	return v
}

// isTerminal reports whether w is a terminal.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// colored reports whether colour is welcome on w (https://no-color.org).
func colored(w io.Writer) bool {
	return isTerminal(w) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}
