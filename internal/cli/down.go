package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/cli/cluster"
	"github.com/underlay-cni/underlay/internal/nl"
)

func (a *App) downCommand() *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use:   "down",
		Short: "Take a lab down; leaves nothing",
		Long: `Takes a lab down: its processes (also those inside its network namespaces), its
namespaces, mounts, pins and directory. Works on a half-made lab, after crashes,
and when there is nothing; ends no process that is not the lab's.`,
		Example:     "  underlay down\n  underlay down --name other\n  underlay down --all",
		Args:        cobra.NoArgs,
		Annotations: rootBecause("removes network namespaces and mounts"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			names := []string{a.lab}
			if all {
				if cmd.Flags().Changed("name") {
					return errors.New("give --all or --name, not both")
				}
				var err error
				if names, err = everyLab(a.run); err != nil {
					return err
				}
			}
			type result struct {
				Name  string `json:"name"`
				Found bool   `json:"found"`
			}
			results := []result{}
			var errs []error
			for _, name := range names {
				h := home{run: a.run, name: name}
				found, err := a.down(cmd.Context(), h)
				if err != nil {
					errs = append(errs, fmt.Errorf("take down lab %s: %w", name, err))
					continue
				}
				results = append(results, result{name, found})
			}
			err := a.print(results, func(w io.Writer) {
				for _, r := range results {
					if r.Found {
						fmt.Fprintf(w, "lab %s is down\n", r.Name)
					} else {
						fmt.Fprintf(w, "lab %s is not up; nothing to do\n", r.Name)
					}
				}
				if all && len(names) == 0 {
					fmt.Fprintln(w, "no lab is up; nothing to do")
				}
			})
			return errors.Join(append(errs, err)...)
		},
	}
	c.Flags().BoolVar(&all, "all", false, "every lab on this machine")
	return c
}

// everyLab returns the labs that left anything: a directory or a namespace.
func everyLab(run string) ([]string, error) {
	names, err := labs(run)
	if err != nil {
		return nil, err
	}
	for _, n := range netnsNames() {
		if lab, _, _, ok := labOfNetns(n); ok {
			names = append(names, lab)
		}
	}
	if run == runDir {
		names = append(names, cluster.Labs()...)
		left, err := labs(filepath.Dir(home{run: run}.data()))
		if err != nil {
			return nil, err
		}
		names = append(names, left...)
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// down takes a lab down and reports whether there was anything of it.
func (a *App) down(ctx context.Context, h home) (found bool, err error) {
	found = h.found()
	if !found && !exists(h.lockFile()) {
		return false, nil
	}
	l, err := h.lockAgainst(ctx, a.Err)
	if err != nil {
		return found, err
	}
	done := func(string) {}
	if found {
		done = newProgress(a.Err, a.now).step("taking down lab " + h.name)
	}
	if err := h.takeDown(ctx); err != nil {
		l.release("")
		return found, err
	}
	l.release(h.lockFile())
	done("processes, namespaces, mounts and files of lab " + h.name + " are gone")
	return found, nil
}

// found reports whether anything of the lab is there.
func (h home) found() bool {
	return exists(h.dir()) || len(h.namespaces()) > 0 || exists(h.data()) || h.hasCgroups()
}

// hasCgroups reports whether the lab has a cgroup subtree. Labs of a test's own
// directory have none, whatever their names.
func (h home) hasCgroups() bool { return h.run == runDir && cluster.HasCgroups(h.name) }

// inCgroups returns the pids in the lab's cgroup subtree.
func (h home) inCgroups() []int {
	if !h.hasCgroups() {
		return nil
	}
	return cluster.CgroupProcesses(h.name)
}

// lockAgainst takes the exclusive lock. A command that holds it for longer
// than a moment is asked to end as by Ctrl-C: who says down means it.
func (h home) lockAgainst(ctx context.Context, tell io.Writer) (*lock, error) {
	brief, cancel := context.WithTimeoutCause(ctx, 2*time.Second, errors.New("it is busy"))
	defer cancel()
	l, err := h.lockLab(brief, true)
	if err == nil || ctx.Err() != nil {
		return l, err
	}
	for _, pid := range h.holderPIDs() {
		if args := arguments(pid); pid == os.Getpid() || len(args) == 0 || !isUnderlay(args[0]) {
			continue
		}
		fmt.Fprintf(tell, "  ending %s\n", describeProcess(pid))
		if p, err := procOf(pid); err == nil {
			_ = p.signal(unix.SIGTERM) // seen below, when the lock is not free
		}
	}
	longer, cancel := context.WithTimeoutCause(ctx, 70*time.Second, errors.New("it does not end"))
	defer cancel()
	return h.lockLab(longer, true)
}

func isUnderlay(path string) bool {
	return path == "underlay" || strings.HasSuffix(path, "/underlay")
}

// namespaces returns the names of the lab's network namespaces.
func (h home) namespaces() []string {
	var mine []string
	for _, n := range netnsNames() {
		if lab, _, _, ok := labOfNetns(n); ok && lab == h.name {
			mine = append(mine, n)
		}
	}
	return mine
}

func netnsNames() []string {
	entries, err := os.ReadDir(nl.NetnsDir)
	if err != nil {
		return nil // nobody has made one yet
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// takeDown removes everything of the lab. It goes on where it can, looks again
// at the end, and names what is left. The caller holds the exclusive lock.
func (h home) takeDown(ctx context.Context) error {
	skip := ourselves()
	ids := []nsID{}
	for _, n := range h.namespaces() {
		if id, ok := netnsID(nl.Path(n)); ok {
			ids = append(ids, id)
		}
	}
	if own, ok := netnsID("/proc/self/ns/net"); ok && slices.Contains(ids, own) {
		return errors.New("this shell is inside the lab; leave it first (exit), then try again")
	}

	// Whoever forks while we look is seen in the next round.
	var left []proc
	for range 5 {
		procs := processesIn(ids, skip)
		procs = append(procs, processesOfDir(h.dir(), skip)...)
		procs = append(procs, h.recorded(skip)...)
		procs = append(procs, processesOf(h.inCgroups(), skip)...)
		slices.SortFunc(procs, func(a, b proc) int { return a.PID - b.PID })
		procs = slices.Compact(procs)
		if len(procs) == 0 {
			left = nil
			break
		}
		left = end(ctx, procs, 3*time.Second)
	}
	var errs []error
	for _, p := range left {
		errs = append(errs, fmt.Errorf("%s does not end", describeProcess(p.PID)))
	}

	// vpcd knows best what its fabric has made. What it does not remove (or
	// when it is not there any more) goes with the pins and the namespaces.
	if exists(h.vpcd()) {
		if vpcd, err := program("vpcd"); err == nil {
			dctx, cancel := context.WithTimeout(ctx, 30*time.Second)
			cmd := exec.CommandContext(dctx, vpcd, "destroy", "--name", h.name, "--dir", h.vpcd(), "--bpffs", h.bpf("vpcd"))
			cmd.Env = cleanEnv()
			_ = cmd.Run() // what it left is removed and reported below
			cancel()
		}
	}
	for _, n := range h.namespaces() {
		if err := nl.DeleteNamed(n); err != nil {
			errs = append(errs, err)
		}
	}
	if err := unmountBelow(h.dir()); err != nil {
		errs = append(errs, err)
	}
	if h.hasCgroups() {
		if err := cluster.RemoveCgroups(ctx, h.name, ""); err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) == 0 { // else the files still explain what is left
		for _, dir := range []string{h.data(), h.dir()} {
			if err := os.RemoveAll(dir); err != nil {
				errs = append(errs, fmt.Errorf("remove the lab's directory: %w", err))
			}
		}
		_ = os.Remove(filepath.Dir(h.data())) // when it was the last one there
	}
	for _, n := range h.namespaces() {
		errs = append(errs, fmt.Errorf("network namespace %s is still there", n))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%w; try again: underlay down --name %s", err, h.name)
	}
	return nil
}

// recorded returns the processes of lab.json and the node and pod files that
// still run.
func (h home) recorded(skip []int) []proc {
	var procs []proc
	for _, file := range []string{h.vpcdPID(), h.forwardPID(), h.pollerPID()} {
		if p, err := readProc(file); err == nil {
			procs = append(procs, p)
		}
	}
	if f, err := h.load(); err == nil {
		for _, s := range f.Servers {
			procs = append(procs, s.Proc)
		}
	}
	entries, err := os.ReadDir(h.node(""))
	if err == nil {
		for _, e := range entries {
			for _, file := range []string{h.agentPID(e.Name()), h.initPID(e.Name())} {
				if p, err := readProc(file); err == nil {
					procs = append(procs, p)
				}
			}
		}
	}
	pods, err := h.loadPods()
	if err == nil {
		for _, p := range pods {
			procs = append(procs, p.Proc)
		}
	}
	return slices.DeleteFunc(procs, func(p proc) bool { return !p.alive() || slices.Contains(skip, p.PID) })
}

// unmountBelow unmounts everything at and below dir, the deepest first.
func unmountBelow(dir string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	points := mountsBelow(string(b), dir)
	for _, p := range slices.Backward(points) {
		if err := unix.Unmount(p, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s: %w", p, err)
		}
	}
	return nil
}

// mountsBelow returns the mount points at and below dir in the order of
// /proc/self/mountinfo, where what lies above comes later.
func mountsBelow(mountinfo, dir string) []string {
	var points []string
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for line := range strings.Lines(mountinfo) {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		if p := unescape.Replace(f[4]); within(p, dir) {
			points = append(points, p)
		}
	}
	return points
}
