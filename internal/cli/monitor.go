package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/underlay-cni/underlay/internal/agentapi"
)

// monitorOptions are the flags of "underlay monitor".
type monitorOptions struct {
	nodes                         []string
	pod, address, verdict, reason string
	rate, count                   int
}

func (a *App) monitorCommand() *cobra.Command {
	var o monitorOptions
	c := &cobra.Command{
		Use:   "monitor",
		Short: "Show verdicts of the nodes' programs as they fall",
		Long: `Shows what the nodes' programs decide, as it happens: the first packet of each
connection that they let through, and each packet that they drop, with the reason
and the rule. It goes on until it is interrupted.

The programs tell no more than --rate a second and node; what is left out is
counted and said. Without somebody who watches they tell nothing.`,
		Example: `  underlay monitor
  underlay monitor --verdict drop
  underlay monitor --pod web-1 --count 10
  underlay monitor --node node-1 -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			h := a.home()
			f, err := h.loadUp()
			if err != nil {
				return err
			}
			m, err := a.newMonitor(h, f, o)
			if err != nil {
				return err
			}
			return m.run(cmd.Context())
		},
	}
	fl := c.Flags()
	fl.StringSliceVar(&o.nodes, "node", nil, "only of these nodes")
	fl.StringVar(&o.pod, "pod", "", "only at this pod's interface")
	fl.StringVar(&o.address, "address", "", "only from or to an address or a CIDR block")
	fl.StringVar(&o.verdict, "verdict", "", "only allow, audit or drop")
	fl.StringVar(&o.reason, "reason", "", "only drops for this reason, as underlay status names them")
	fl.IntVar(&o.rate, "rate", agentapi.DefaultVerdicts, "how many verdicts a node tells in a second")
	fl.IntVarP(&o.count, "count", "c", 0, "end after so many; 0: never")
	_ = c.RegisterFlagCompletionFunc("verdict", cobra.FixedCompletions([]string{"allow", "audit", "drop"}, noFiles))
	_ = c.RegisterFlagCompletionFunc("pod", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return a.podNames(), noFiles
	})
	return c
}

// nodeMonitor watches the nodes of a lab.
type nodeMonitor struct {
	a     *App
	o     monitorOptions
	nodes []Node
	names *flowNames
	only  netip.Prefix

	// mu is held while something is printed.
	mu     sync.Mutex
	rows   rowPrinter
	shown  int
	finish context.CancelFunc
}

func (a *App) newMonitor(h home, f *labFile, o monitorOptions) (*nodeMonitor, error) {
	m := &nodeMonitor{a: a, o: o, names: &flowNames{read: func() map[netip.Addr]string { return labNames(h, f) }, now: a.now}}
	for _, n := range f.Lab.Nodes {
		if len(o.nodes) == 0 || slices.Contains(o.nodes, n.Name) {
			m.nodes = append(m.nodes, n)
		}
	}
	for _, name := range o.nodes {
		if !slices.ContainsFunc(m.nodes, func(n Node) bool { return n.Name == name }) {
			return nil, fmt.Errorf("--node %s: there is no such node; underlay status lists them", name)
		}
	}
	if o.verdict != "" && o.verdict != "allow" && o.verdict != "audit" && o.verdict != "drop" {
		return nil, fmt.Errorf("--verdict %q: give allow, audit or drop", o.verdict)
	}
	if o.reason != "" && o.verdict != "" && o.verdict != "drop" {
		return nil, errors.New("--reason is of drops")
	}
	if o.rate < 1 || o.rate > agentapi.MaxVerdicts {
		return nil, fmt.Errorf("--rate %d: give 1 to %d", o.rate, agentapi.MaxVerdicts)
	}
	if o.count < 0 {
		return nil, fmt.Errorf("--count %d: give how many verdicts, or 0", o.count)
	}
	q, err := flowOptions{address: o.address}.query(a.now(), nil)
	if err != nil {
		return nil, err
	}
	m.only = q.address
	if o.pod != "" {
		if _, err := m.names.addressOf(o.pod); err != nil {
			return nil, err
		}
	}
	// Room for what is typical, so that the first rows are not the narrowest.
	m.rows = rowPrinter{
		head:   []string{"TIME", "NODE", "VERDICT", "POD", "WAY", "PROTO", "SOURCE", "DESTINATION", "PATH", "REASON", "RULE"},
		widths: []int{12, 6, 7, 12, 7, 5, 28, 28, 6, 14, 4},
	}
	return m, nil
}

// run watches until it is interrupted, or has shown as many as were asked for.
func (m *nodeMonitor) run(ctx context.Context) error {
	ctx, m.finish = context.WithCancel(ctx)
	defer m.finish()
	errs := make([]error, len(m.nodes))
	var wg sync.WaitGroup
	for i, n := range m.nodes {
		wg.Go(func() {
			if errs[i] = m.watch(ctx, n); errs[i] != nil {
				m.finish()
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil { // none is of the end of ctx
			return err
		}
	}
	return nil
}

// watch shows one node's verdicts. It stays when its agent is away for a moment.
func (m *nodeMonitor) watch(ctx context.Context, n Node) error {
	client := &agentapi.Client{Socket: n.AgentSocket}
	var after uint64
	silent := false
	for ctx.Err() == nil {
		v, err := client.Monitor(ctx, agentapi.MonitorQuery{After: after, PerSecond: m.o.rate})
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, agentapi.ErrUnreachable):
			if !silent {
				m.say("the agent of %s does not answer, nothing is shown of it until it does; see: underlay logs %s%s", n.Name, n.Name, m.a.labFlag())
			}
			silent, after = true, 0
			select {
			case <-ctx.Done():
			case <-time.After(askAgain):
			}
			continue
		case err != nil:
			return fmt.Errorf("watch %s: %w", n.Name, err)
		}
		silent, after = false, v.Next
		if v.Lost > 0 {
			m.say("%s: %d verdicts were left out; more: --rate", n.Name, v.Lost)
		}
		for i := range v.Verdicts {
			if err := m.show(n, &v.Verdicts[i]); err != nil {
				return err
			}
		}
	}
	return nil
}

func (m *nodeMonitor) say(format string, args ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fmt.Fprintf(m.a.Err, format+"\n", args...)
}

// podName is what people call the pod of a verdict.
func podName(v *agentapi.Verdict) string {
	if v.Pod.Namespace != "" && v.Pod.Namespace != "default" {
		return v.Pod.Namespace + "/" + v.Pod.Name
	}
	return v.Pod.Name
}

func (m *nodeMonitor) wanted(v *agentapi.Verdict) bool {
	return (m.o.pod == "" || podName(v) == m.o.pod || v.Pod.Name == m.o.pod) &&
		(m.o.verdict == "" || v.Verdict == m.o.verdict) &&
		(m.o.reason == "" || v.Reason == m.o.reason) &&
		(!m.only.IsValid() || m.only.Contains(v.Src.Addr()) || m.only.Contains(v.Dst.Addr()))
}

func (m *nodeMonitor) show(n Node, v *agentapi.Verdict) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.wanted(v) || m.o.count > 0 && m.shown >= m.o.count {
		return nil
	}
	var err error
	if m.a.output == "json" {
		e := json.NewEncoder(m.a.Out)
		e.SetEscapeHTML(false)
		err = e.Encode(struct {
			Node string `json:"node"`
			*agentapi.Verdict
		}{n.Name, v})
	} else {
		err = m.rows.print(m.a.Out, m.cells(n, v))
	}
	if err != nil {
		return fmt.Errorf("print verdicts: %w", err)
	}
	if m.shown++; m.shown == m.o.count {
		m.finish()
	}
	return nil
}

func (m *nodeMonitor) cells(n Node, v *agentapi.Verdict) []cell {
	verdict := cell{text: v.Verdict, tone: good}
	if v.Verdict != "allow" {
		verdict.tone = bad
	}
	end := func(p netip.AddrPort) cell {
		if !p.IsValid() {
			return cell{}
		}
		s := p.Addr().String()
		if p.Port() != 0 {
			s = p.String()
		}
		if name := m.names.of(p.Addr()); name != "" {
			s += " (" + name + ")"
		}
		return text(s)
	}
	proto := ""
	if v.Src.IsValid() {
		if proto = protocols[int64(v.Protocol)]; proto == "" {
			proto = fmt.Sprint(v.Protocol)
		}
	}
	return []cell{{text: v.Time.Local().Format("15:04:05.000"), tone: dim}, {text: n.Name, tone: dim}, verdict, {text: podName(v), tone: strong},
		text(v.Direction), text(proto), end(v.Src), end(v.Dst), text(v.Path), {text: v.Reason, tone: bad}, text(strings.Join(v.Rules, ", "))}
}
