package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// flowRecord is one record of a flow log: fields by AWS's names (pkt-srcaddr),
// without those that do not apply, and what its source tells beyond them:
// machine, refused-by, running.
type flowRecord map[string]any

// flowQuery says which records are wanted; what is zero does not matter.
type flowQuery struct {
	eni     string
	action  string // ACCEPT or REJECT
	address netip.Prefix
	since   time.Time
	follow  bool // and go on, until the context ends
}

// flowSource tells flow records of a lab, each by a call of emit, in the order
// of their intervals. It returns an error of emit's as it is.
type flowSource func(ctx context.Context, q flowQuery, emit func(flowRecord) error) error

func (r flowRecord) text(field string) string {
	switch v := r[field].(type) {
	case nil:
		return "-"
	case string:
		return v
	case float64:
		return strconv.FormatFloat(v, 'f', -1, 64)
	default:
		return fmt.Sprint(v)
	}
}

func (r flowRecord) number(field string) int64 {
	v, _ := r[field].(float64)
	return int64(v)
}

func (r flowRecord) address(field string) netip.Addr {
	a, _ := netip.ParseAddr(r.text(field))
	return a
}

const defaultFlowFormat = "${version} ${account-id} ${interface-id} ${srcaddr} ${dstaddr} ${srcport} ${dstport} ${protocol}" +
	" ${packets} ${bytes} ${start} ${end} ${action} ${log-status}"

func (a *App) flowsCommand() *cobra.Command {
	var o flowOptions
	c := &cobra.Command{
		Use:   "flows",
		Short: "Show flow log records: who talked to whom, and what was refused",
		Long: `Shows flow records: those of the VPC, of what passed each network interface, or was
refused there by a security group or a network ACL; and those of the nodes, of what
passed each pod's interface, or was refused there, between pods of one node as well.
A packet between two interfaces is in a record of each: egress at the sender's,
ingress at the receiver's. --by vpc or --by nodes shows the one kind alone.

Records are there at once; those whose interval has not ended count on (a + behind
their packets). With --follow a record comes when its interval has ended, a minute
at most: underlay vpcd chaos set -- --flow-interval 1s makes it a second.

-o aws prints the lines of a flow log, -o json an object per line, -o wide all that
helps to find out why.`,
		Example: `  underlay flows
  underlay flows --action REJECT --follow
  underlay flows --pod web-1 --since 5m
  underlay flows -o aws --format '${interface-id} ${pkt-srcaddr} ${pkt-dstaddr} ${action}'`,
		Args:        cobra.NoArgs,
		Annotations: map[string]string{moreOutputs: "aws wide"},
		RunE: func(cmd *cobra.Command, _ []string) error {
			h := a.home()
			f, err := h.loadUp()
			if err != nil {
				return err
			}
			p, q, err := a.flowPrinter(h, f, o)
			if err != nil {
				return err
			}
			sources := map[string]flowSource{"vpc": a.vpcFlows(f), "nodes": a.nodeFlows(f)}
			if o.by == "" {
				return a.showFlows(cmd.Context(), []flowSource{sources["vpc"], sources["nodes"]}, q, p)
			}
			source, ok := sources[o.by]
			if !ok {
				return fmt.Errorf("--by %q: give vpc or nodes", o.by)
			}
			return a.showFlows(cmd.Context(), []flowSource{source}, q, p)
		},
	}
	fl := c.Flags()
	fl.BoolVarP(&o.follow, "follow", "f", false, "go on as records come")
	fl.StringVar(&o.by, "by", "", "only those of the vpc, or of the nodes")
	fl.StringVar(&o.eni, "eni", "", "only of this network interface")
	fl.StringVar(&o.action, "action", "", "only ACCEPT or REJECT")
	fl.StringVar(&o.address, "address", "", "only from or to an address or a CIDR block")
	fl.StringVar(&o.pod, "pod", "", "only from or to a pod")
	fl.StringVar(&o.since, "since", "", "only since a time (2026-01-02T03:04:05Z) or a while ago (5m)")
	fl.IntVarP(&o.lines, "lines", "n", 0, "only the latest so many; 0 is all that is still known")
	fl.StringVar(&o.format, "format", "", "with -o aws: the fields, as CreateFlowLogs takes them (default the default format)")
	_ = c.RegisterFlagCompletionFunc("by", cobra.FixedCompletions([]string{"vpc", "nodes"}, noFiles))
	_ = c.RegisterFlagCompletionFunc("action", cobra.FixedCompletions([]string{"ACCEPT", "REJECT"}, noFiles))
	_ = c.RegisterFlagCompletionFunc("pod", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return a.podNames(), noFiles
	})
	_ = c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "wide", "json", "aws"}, noFiles))
	return c
}

// flowOptions are the flags of "underlay flows".
type flowOptions struct {
	follow                                       bool
	by, eni, action, address, pod, since, format string
	lines                                        int
}

// query reads the flags that choose records.
func (o flowOptions) query(now time.Time, podAddress func(string) (netip.Addr, error)) (flowQuery, error) {
	q := flowQuery{eni: o.eni, action: strings.ToUpper(o.action), follow: o.follow}
	if q.eni != "" {
		if err := vpc.CheckID("eni", q.eni); err != nil {
			return q, fmt.Errorf("--eni: %w; underlay status lists them", err)
		}
	}
	if q.action != "" && q.action != "ACCEPT" && q.action != "REJECT" {
		return q, fmt.Errorf("--action %q: give ACCEPT or REJECT", o.action)
	}
	switch {
	case o.pod != "" && o.address != "":
		return q, errors.New("give --pod or --address, not both")
	case o.pod != "":
		addr, err := podAddress(o.pod)
		if err != nil {
			return q, err
		}
		q.address = netip.PrefixFrom(addr, addr.BitLen())
	case o.address != "":
		p, err := netip.ParsePrefix(o.address)
		if addr, e := netip.ParseAddr(o.address); e == nil {
			p, err = netip.PrefixFrom(addr, addr.BitLen()), nil
		}
		if err != nil {
			return q, fmt.Errorf("--address %q: give an address or a CIDR block", o.address)
		}
		q.address = p
	}
	if o.since != "" {
		t, err := time.Parse(time.RFC3339, o.since)
		if d, e := time.ParseDuration(o.since); e == nil && d >= 0 {
			t, err = now.Add(-d), nil
		}
		if err != nil {
			return q, fmt.Errorf("--since %q: give a time as in 2026-01-02T03:04:05Z or a duration as in 5m", o.since)
		}
		q.since = t
	}
	return q, nil
}

// vpcFlows is vpcd's fabric as a source.
func (a *App) vpcFlows(f *labFile) flowSource {
	return func(ctx context.Context, q flowQuery, emit func(flowRecord) error) error {
		v := url.Values{}
		for name, value := range map[string]string{"eni": q.eni, "action": q.action} {
			if value != "" {
				v.Set(name, value)
			}
		}
		if q.address.IsValid() {
			v.Set("address", q.address.String())
		}
		if !q.since.IsZero() {
			v.Set("since", q.since.Format(time.RFC3339Nano))
		}
		if q.follow {
			v.Set("follow", "true")
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, f.Lab.Endpoint+"/_vpcd/flows?"+v.Encode(), nil)
		if err != nil {
			return fmt.Errorf("ask vpcd for flows: %w", err)
		}
		client := newAdmin(f.Lab.Endpoint).client
		client.Timeout = 0 // who follows stays
		resp, err := client.Do(req)
		if err != nil {
			return fmt.Errorf("ask vpcd for flows: %w; is it well? underlay status%s", err, a.labFlag())
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			b, _ := io.ReadAll(io.LimitReader(resp.Body, 500))
			return fmt.Errorf("ask vpcd for flows: %s: %s", resp.Status, strings.TrimSpace(string(b)))
		}
		if d := resp.Header.Get("X-Vpcd-Flow-Interval"); q.follow && d != "" && isTerminal(a.Err) {
			fmt.Fprintln(a.Err, paint("a record comes when its interval ends, after "+d+" at most; sooner: underlay vpcd chaos set"+a.labFlag()+" -- --flow-interval 1s", dim, colored(a.Err)))
		}
		for d := json.NewDecoder(resp.Body); ; {
			var r flowRecord
			err := d.Decode(&r)
			switch {
			case errors.Is(err, io.EOF) && q.follow:
				return errors.New("vpcd ended while its flows were followed; see: underlay logs vpcd" + a.labFlag())
			case errors.Is(err, io.EOF):
				return nil
			case err != nil:
				return fmt.Errorf("read vpcd's flows: %w", err)
			}
			if err := emit(r); err != nil {
				return err
			}
		}
	}
}

// showFlows prints what the sources tell: sorted by time, or as it comes if the
// query follows.
func (a *App) showFlows(ctx context.Context, sources []flowSource, q flowQuery, p *flowPrinter) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		mu  sync.Mutex
		all []flowRecord
		wg  sync.WaitGroup
	)
	errs := make([]error, len(sources))
	for i, source := range sources {
		wg.Go(func() {
			errs[i] = source(ctx, q, func(r flowRecord) error {
				mu.Lock()
				defer mu.Unlock()
				if q.follow {
					return p.print(r)
				}
				all = append(all, r)
				return nil
			})
			if errs[i] != nil {
				cancel()
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		if q.follow && errors.Is(err, context.Canceled) {
			continue // Ctrl-C is how one leaves
		}
		if err != nil {
			return err
		}
	}
	if q.follow {
		return nil
	}
	slices.SortStableFunc(all, func(x, y flowRecord) int { return cmp.Compare(x.number("start"), y.number("start")) })
	return p.printAll(all)
}

// flowPrinter prints records as -o says.
type flowPrinter struct {
	app    *App
	names  *flowNames
	format []vpc.FlowField // of -o aws
	table  table
	rows   rowPrinter
	lines  int // of what there is, only the latest so many; 0 is all
}

func (a *App) flowPrinter(h home, f *labFile, o flowOptions) (*flowPrinter, flowQuery, error) {
	names := &flowNames{read: func() map[netip.Addr]string { return labNames(h, f) }, now: a.now}
	q, err := o.query(a.now(), names.addressOf)
	if err != nil {
		return nil, q, err
	}
	p := &flowPrinter{app: a, names: names, lines: o.lines}
	switch {
	case o.lines < 0:
		return nil, q, fmt.Errorf("--lines %d: give how many records, or 0 for all", o.lines)
	case o.lines > 0 && o.follow:
		return nil, q, errors.New("--lines is not for --follow; choose by --since")
	}
	if o.format != "" && a.output != "aws" {
		return nil, q, errors.New("--format is for -o aws")
	}
	if p.format, err = flowFormat(cmp.Or(o.format, defaultFlowFormat)); err != nil {
		return nil, q, err
	}
	p.table.head = []string{"TIME", "BY", "ACTION", "INTERFACE", "MACHINE", "WAY", "PROTO", "SOURCE", "DESTINATION", "PACKETS", "BYTES", "FLAGS", "REFUSED BY"}
	if a.output == "wide" {
		p.table.head = append(p.table.head, "SRCADDR", "DSTADDR", "PATH", "UNTIL", "INSTANCE", "SUBNET")
	}
	// Room for what is typical, so that the first rows are not the narrowest.
	p.rows = rowPrinter{head: p.table.head, widths: []int{8, 6, 6, 21, 12, 7, 5, 30, 30, 7, 9, 9, 14}}
	return p, q, nil
}

// flowFormat reads ${field} ${field} …, with any number of blanks between them.
func flowFormat(s string) ([]vpc.FlowField, error) {
	out, err := vpc.ParseFlowFormat(strings.Join(strings.Fields(s), " "))
	if err != nil {
		return nil, fmt.Errorf("--format: %w; there are %s", err, strings.Join(slices.Sorted(maps.Keys(vpc.FlowFields())), ", "))
	}
	return out, nil
}

// print prints one record of many that come one after the other.
func (p *flowPrinter) print(r flowRecord) error {
	var err error
	switch p.app.output {
	case "json":
		p.names.add(r)
		e := json.NewEncoder(p.app.Out)
		e.SetEscapeHTML(false)
		err = e.Encode(r)
	case "aws":
		_, err = fmt.Fprintln(p.app.Out, awsLine(p.format, r))
	default:
		err = p.rows.print(p.app.Out, p.cells(r))
	}
	if err != nil {
		return fmt.Errorf("print flows: %w", err)
	}
	return nil
}

// printAll prints all records that there are.
func (p *flowPrinter) printAll(all []flowRecord) error {
	if p.lines > 0 && len(all) > p.lines {
		all = all[len(all)-p.lines:]
	}
	if p.app.output == "json" || p.app.output == "aws" {
		for _, r := range all {
			if err := p.print(r); err != nil {
				return err
			}
		}
		return nil
	}
	if len(all) == 0 {
		fmt.Fprintf(p.app.Out, "no flow records (that match); make some: underlay exec POD -- ping -c1 ADDRESS%s\n", p.app.labFlag())
		return nil
	}
	for _, r := range all {
		p.table.row(p.cells(r)...)
	}
	p.table.write(p.app.Out, "", colored(p.app.Out))
	return nil
}

var protocols = map[int64]string{1: "icmp", 6: "tcp", 17: "udp", 132: "sctp"}

func (p *flowPrinter) cells(r flowRecord) []cell {
	clock := func(field string) string {
		return time.Unix(r.number(field), 0).Local().Format("15:04:05")
	}
	action := cell{text: r.text("action"), tone: good}
	switch {
	case r.text("action") == "REJECT":
		action.tone = bad
	case r.text("log-status") != "OK":
		action = cell{text: r.text("log-status"), tone: bad}
	}
	machine := ""
	if m := r.text("machine"); m != "-" {
		machine = m
	}
	by := "vpc"
	if node := r.text("seen-by"); node != "-" {
		by = node
	}
	out := []cell{{text: clock("start"), tone: dim}, {text: by, tone: dim}, action, text(r.text("interface-id")), {text: machine, tone: strong}}
	if r.text("log-status") != "OK" {
		return append(out, cell{}, cell{}, cell{}, cell{}, cell{}, cell{}, cell{}, text("records are missing until "+clock("end")))
	}
	proto := cmp.Or(protocols[r.number("protocol")], r.text("protocol"))
	end := func(address, port string) cell {
		a := r.address(address)
		s := a.String()
		if n := r.number(port); n > 0 {
			s += ":" + strconv.FormatInt(n, 10)
		}
		if name := p.names.of(a); name != "" {
			s += " (" + name + ")"
		}
		return text(s)
	}
	packets := cell{text: r.text("packets"), right: true}
	if r["running"] == true {
		packets.text += "+"
	}
	refused := ""
	if by := r.text("refused-by"); by != "-" {
		refused = by
	}
	out = append(out, text(r.text("flow-direction")), text(proto), end("pkt-srcaddr", "srcport"), end("pkt-dstaddr", "dstport"),
		packets, cell{text: r.text("bytes"), right: true}, text(tcpFlags(r)), cell{text: refused, tone: bad})
	if p.app.output == "wide" {
		out = append(out, text(r.text("srcaddr")), text(r.text("dstaddr")), text(r.text("traffic-path")), text(clock("end")), text(r.text("instance-id")), text(r.text("subnet-id")))
	}
	return out
}

// tcpFlags are the flags of a record as people call them: SYN, SYN-ACK, FIN, RST.
func tcpFlags(r flowRecord) string {
	n := r.number("tcp-flags")
	var out []string
	switch {
	case n&18 == 18: // it includes SYN's number: whether that came alone, too, is not told
		out = append(out, "SYN-ACK")
	case n&2 != 0:
		out = append(out, "SYN")
	}
	if n&1 != 0 {
		out = append(out, "FIN")
	}
	if n&4 != 0 {
		out = append(out, "RST")
	}
	return strings.Join(out, ",")
}

// awsLine is a record as a text flow log has it.
func awsLine(format []vpc.FlowField, r flowRecord) string {
	version := 0
	for _, f := range format {
		version = max(version, f.Version)
	}
	words := make([]string, len(format))
	for i, f := range format {
		words[i] = r.text(f.Name)
		if f.Name == "version" {
			words[i] = strconv.Itoa(version)
		}
	}
	return strings.Join(words, " ")
}
