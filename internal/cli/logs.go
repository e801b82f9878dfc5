package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

func (a *App) logsCommand() *cobra.Command {
	var follow bool
	var lines int
	c := &cobra.Command{
		Use:   "logs [vpcd|poller|NODE[/PROGRAM]|VM|POD]…",
		Short: "Print logs: vpcd's, an agent's, a server's, a pod's process's",
		Long: `Prints the last lines of logs; without a name of vpcd and of every node's agent,
each line with its name in front. With -o json, one object per line.

In a lab with Kubernetes a node's log, or control-plane's, says which of its programs
began and ended; theirs are node-1/kubelet, node-1/agent, control-plane/etcd and so on.`,
		Example: `  underlay logs
  underlay logs vpcd -f
  underlay logs node-1 --lines 0     # all of it`,
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			names := slices.Concat(a.logNames(), a.podNames())
			return slices.DeleteFunc(names, func(n string) bool { return slices.Contains(args, n) }), noFiles
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			h := a.home()
			f, err := h.load()
			if err != nil {
				return err
			}
			if len(args) == 0 {
				args = []string{"vpcd"}
				if k := f.Lab.Kubernetes; k != nil {
					args = append(args, k.ControlPlane.Name)
				}
				for _, n := range f.Lab.Nodes {
					args = append(args, n.Name)
				}
			}
			var logs []*logFile
			width := 0
			for _, name := range args {
				path, err := h.logOf(f, name)
				if err != nil {
					return err
				}
				logs = append(logs, &logFile{name: name, path: path})
				width = max(width, len(name))
			}
			emit := func(name, line string) error {
				if a.json() {
					return writeJSONLine(a.Out, name, line)
				}
				if len(logs) > 1 {
					name = paint(fmt.Sprintf("%-*s │ ", width, name), dim, colored(a.Out))
					_, err := fmt.Fprintf(a.Out, "%s%s\n", name, line)
					return err
				}
				_, err := fmt.Fprintln(a.Out, line)
				return err
			}
			for _, l := range logs {
				if err := l.start(lines, emit); err != nil {
					return err
				}
				defer l.close()
			}
			if !follow {
				return nil
			}
			err = poll(cmd.Context(), 100*time.Millisecond, func() (bool, error) {
				for _, l := range logs {
					if err := l.drain(emit); err != nil {
						return false, err
					}
				}
				return !exists(h.dir()), nil // a lab that is down says no more
			})
			if errors.Is(err, context.Canceled) {
				return nil // Ctrl-C is how one leaves
			}
			return err
		},
	}
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on as lines are added")
	c.Flags().IntVarP(&lines, "lines", "n", 20, "how many lines of each; 0 is all")
	return c
}

// logOf returns the path of the log of vpcd, a machine or a pod.
func (h home) logOf(f *labFile, name string) (string, error) {
	if name == "vpcd" {
		return h.vpcdLog(), nil
	}
	if name == "poller" && h.hasPoller() {
		return h.pollerLog(), nil
	}
	for _, l := range h.kubernetesLogs(f) {
		if l.name == name {
			return l.path, nil
		}
	}
	for _, n := range f.Lab.Nodes {
		if n.Name == name {
			return h.agentLog(name), nil
		}
	}
	for _, o := range f.Lab.Outside {
		if o.Name == name {
			return h.outsideLog(name), nil
		}
	}
	if CheckPod(name) == nil {
		if p, err := h.loadPod(name); err == nil {
			if len(p.Command) == 0 {
				return "", fmt.Errorf("pod %s runs no process and has no log; give run a command after --", name)
			}
			return h.podLog(name), nil
		}
	}
	known := []string{"vpcd"}
	if h.hasPoller() {
		known = append(known, "poller")
	}
	for _, l := range h.kubernetesLogs(f) {
		known = append(known, l.name)
	}
	for _, n := range f.Lab.Nodes {
		if !slices.Contains(known, n.Name) {
			known = append(known, n.Name)
		}
	}
	for _, o := range f.Lab.Outside {
		known = append(known, o.Name)
	}
	return "", fmt.Errorf("nothing in lab %s that has a log is called %q; there are %s, and pods", h.name, name, strings.Join(known, ", "))
}

// logFile is read to its end again and again. A line without its end waits for
// the rest.
type logFile struct {
	name, path string
	f          *os.File
	r          *bufio.Reader
	part       string
}

// start prints the last n lines (all when n is 0).
func (l *logFile) start(n int, emit func(name, line string) error) error {
	f, err := os.Open(l.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // not written yet; drain looks again
	}
	if err != nil {
		return fmt.Errorf("read the log of %s: %w", l.name, err)
	}
	l.f, l.r = f, bufio.NewReader(f)
	var last []string
	if err := l.drain(func(_, line string) error {
		last = append(last, line)
		if n > 0 && len(last) > n {
			last = last[1:]
		}
		return nil
	}); err != nil {
		return err
	}
	for _, line := range last {
		if err := emit(l.name, line); err != nil {
			return err
		}
	}
	return nil
}

func (l *logFile) drain(emit func(name, line string) error) error {
	if l.f == nil {
		return l.start(0, emit)
	}
	for {
		s, err := l.r.ReadString('\n')
		l.part += s
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the log of %s: %w", l.name, err)
		}
		line := strings.TrimSuffix(l.part, "\n")
		l.part = ""
		if err := emit(l.name, line); err != nil {
			return err
		}
	}
}

func (l *logFile) close() {
	if l.f != nil {
		l.f.Close()
	}
}
