package bench

import (
	"bytes"
	"fmt"
	"image/color"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// target is what a row is to reach.
type target struct {
	row     string
	what    string
	bound   float64 // 0: none, the row explains others
	atMost  bool    // lower is better
	isLevel bool    // 1 is to be within the interval, or the row better
}

// targets in the order of the table.
var targets = []target{
	{row: "pod-node/tcp1", what: "pod to pod across nodes: TCP, one core", bound: 0.95},
	{row: "pod-node/tcp2", what: "TCP, two cores", bound: 0.90},
	{row: "pod-node/rr", what: "TCP request and response", bound: 0.95},
	{row: "pod-node/crr", what: "TCP connect, request and response", bound: 0.95},
	{row: "pod-node/udp64", what: "UDP, 64 bytes", bound: 0.90},
	{row: "pod-node/rr-p99", what: "request and response, 99th percentile", bound: 1.10, atMost: true},
	{row: "pod-aws/tcp1", what: "against the AWS-style path: TCP", bound: 1.4},
	{row: "pod-aws/udp64", what: "UDP, 64 bytes", bound: 1.7},
	{row: "pod-aws/crr", what: "connect, request and response", bound: 1.3},
	{row: "pod-vxlan/tcp1", what: "against flannel-style VXLAN: TCP", bound: 1.8},
	{row: "pod-vxlan/udp64", what: "UDP, 64 bytes", bound: 2.5},
	{row: "samenode-veth/tcp1", what: "same node against a bare veth pair: TCP", bound: 0.92},
	{row: "samenode-veth/rr1", what: "request and response", bound: 0.92},
	{row: "samenode-veth/crr1", what: "connect, request and response", bound: 0.92},
	{row: "samenode-veth/udp64", what: "UDP, 64 bytes", bound: 0.92},
	{row: "clusterip-aws/tcp1", what: "through a ClusterIP against the AWS-style path: TCP", bound: 1},
	{row: "clusterip-aws/rr1", what: "request and response", bound: 1},
	{row: "clusterip-aws/crr1", what: "connect, request and response", bound: 1},
	{row: "pods250-one/rr1", what: "1 → 250 pods: request and response", bound: 1, isLevel: true},
	{row: "pods250-one/crr1", what: "connect, request and response", bound: 1, isLevel: true},
	{row: "pods250-one/udp64", what: "UDP, 64 bytes", bound: 1, isLevel: true},
	{row: "conns100000-one/rr1", what: "1 → 100,000 connections: request and response", bound: 1, isLevel: true},
	{row: "conns100000-one/crr1", what: "connect, request and response", bound: 1, isLevel: true},
	{row: "conns100000-one/udp64", what: "UDP, 64 bytes", bound: 1, isLevel: true},
	{row: "rules300-one/rr1", what: "1 → 300 rules in each gate: request and response", bound: 1, isLevel: true},
	{row: "rules300-one/crr1", what: "connect, request and response", bound: 1, isLevel: true},
	{row: "rules300-one/udp64", what: "UDP, 64 bytes", bound: 1, isLevel: true},
	{row: "peers10000-one/rr1", what: "10 → 10,000 peers: request and response", bound: 1, isLevel: true},
	{row: "peers10000-one/crr1", what: "connect, request and response", bound: 1, isLevel: true},
	{row: "peers10000-one/udp64", what: "UDP, 64 bytes", bound: 1, isLevel: true},
	{row: "group10000/replace", what: "a group of 10,000 members replaced, of 100 ms", bound: 1, atMost: true},
	{row: "pod-bare/tcp1", what: "pod to pod against nodes without netfilter: TCP, one core"},
	{row: "pod-bare/tcp2", what: "TCP, two cores"},
	{row: "pod-bare/rr1", what: "request and response, one core"},
	{row: "pod-bare/crr1", what: "connect, request and response, one core"},
	{row: "pod-bare/udp64", what: "UDP, 64 bytes"},
	{row: "pod-floor/tcp1", what: "pod to pod against BPF that only redirects: TCP, one core"},
	{row: "pod-floor/rr1", what: "request and response, one core"},
	{row: "pod-floor/crr1", what: "connect, request and response, one core"},
	{row: "pod-floor/udp64", what: "UDP, 64 bytes"},
	{row: "memory/pod", what: "memory of a pod, kernel and agent, of 400 KiB", bound: 1, atMost: true},
}

// met tells whether a row reaches its target.
func (t target) met(r Row) bool {
	switch {
	case t.isLevel:
		return r.High95 >= 1
	case t.atMost:
		return r.Ratio <= t.bound
	}
	return r.Ratio >= t.bound
}

func (t target) text() string {
	switch {
	case t.bound == 0:
		return ""
	case t.isLevel:
		return "1 within the interval"
	case t.atMost:
		return fmt.Sprintf("≤ %.2f", t.bound)
	}
	return fmt.Sprintf("≥ %.2f", t.bound)
}

// commit is what was measured. That other benchmarks have written their results does
// not change it.
func commit() string {
	out, err := exec.Command("git", "rev-parse", "--short=12", "HEAD").Output()
	if err != nil {
		return "unknown"
	}
	name := strings.TrimSpace(string(out))
	if exec.Command("git", "diff", "--quiet", "HEAD", "--", ":/", ":(exclude,top)docs/bench").Run() != nil {
		name += "-dirty"
	}
	return name
}

// report writes the rows of BenchmarkNode as a table and as a plot.
func report(rows []Row, table, picture string) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, `# The node's datapath, measured

Made by `+"`make bench`"+` (test/bench, BenchmarkNode); [latest.json](latest.json) has the rows. Everything is a veth pair between network namespaces of one machine: **no physical NIC**, so that what a card would do (offloads, interrupts, its own limits) is not in it, and what the kernel does weighs more than it would.

Linux %s, %s/%s, %d CPUs; commit %s; %s. %d turns of %s each, streams' of %s, in %d parts; all that a row compares in one run and part by part in turns; median of the turns' ratios, with the median's 95 %% interval. TCP with cubic. tcp1, rr1, crr1 and udp64 are on one CPU, and seconds are CPU time of all that is at work there; tcp2, rr and crr go by the clock, client and server on a CPU each. Pods' programs are where an agent has those of a pod that has been busy for some seconds, on TCX.

![ratios](node.svg)

| | ratio | 95 %% | target | | Underlay | base | |
|---|---|---|---|---|---|---|---|
`, kernelRelease(), runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), commit(), began.UTC().Format(time.DateOnly), *turns, *slice, streamParts**slice, parts)
	for _, t := range targets {
		i := slices.IndexFunc(rows, func(r Row) bool { return r.Name == t.row })
		if i < 0 {
			fmt.Fprintf(&b, "| %s (`%s`) | not measured | | %s | | | | |\n", t.what, t.row, t.text())
			continue
		}
		r := rows[i]
		verdict := "missed"
		switch {
		case t.bound == 0:
			verdict = ""
		case t.met(r):
			verdict = "met"
		}
		subject, floor, unit := figure(r.Subject, r.Unit), figure(r.Floor, r.Unit), ""
		subject, unit = cut(subject)
		floor, _ = cut(floor)
		fmt.Fprintf(&b, "| %s (`%s`) | **%.2f** | %.2f … %.2f | %s | %s | %s | %s | %s |\n", t.what, t.row, r.Ratio, r.Low95, r.High95, t.text(), verdict, subject, floor, unit)
	}
	b.WriteString("\nThe bases, all made by the benchmark itself with iproute2 and iptables:\n\n")
	var told []string
	for _, r := range rows {
		base, _, _ := strings.Cut(r.Base, "; ")
		name, _, _ := strings.Cut(r.Name, "/")
		if line := "- `" + name + "`: " + base; !slices.Contains(told, line) {
			told = append(told, line)
			b.WriteString(line + ".\n")
		}
	}
	if err := os.WriteFile(table, b.Bytes(), 0o644); err != nil {
		return err
	}
	svg, err := drawRows(rows)
	if err != nil {
		return err
	}
	return os.WriteFile(picture, svg, 0o644)
}

// figure is a median as people ask for it: what a packet takes, and a gigabit.
func figure(v float64, unit string) string {
	const gigabit = 1e9 / 8 // bytes
	switch unit {
	case measureTCP1.unit:
		return fmt.Sprintf("%.3f s/Gbit", gigabit/v)
	case measureUDP.unit:
		return fmt.Sprintf("%.0f ns/packet", 1e9/v)
	case measureRR1.unit:
		return fmt.Sprintf("%.1f µs/round trip", 1e6/v)
	case measureCRR.unit:
		return fmt.Sprintf("%.1f µs/connection", 1e6/v)
	case "s":
		return fmt.Sprintf("%.1f µs", 1e6*v)
	case "bytes":
		return fmt.Sprintf("%.0f KiB", v/1024)
	}
	return fmt.Sprintf("%.3g %s", v, unit)
}

func cut(s string) (value, unit string) {
	value, unit, _ = strings.Cut(s, " ")
	return value, unit
}

// The colours of Okabe and Ito, which people with colour blindness tell apart.
var (
	blue      = color.RGBA{R: 0, G: 114, B: 178, A: 255}
	vermilion = color.RGBA{R: 213, G: 94, B: 0, A: 255}
	grey      = color.RGBA{R: 120, G: 120, B: 120, A: 255}
)

// drawRows draws each row's ratio with its interval, and its target, as SVG.
func drawRows(rows []Row) ([]byte, error) {
	p := plot.New()
	for _, f := range []*font.Font{&p.Title.TextStyle.Font, &p.X.Label.TextStyle.Font, &p.X.Tick.Label.Font, &p.Y.Tick.Label.Font, &p.Legend.TextStyle.Font} {
		f.Typeface, f.Variant = "Liberation", "Sans"
	}
	p.Title.Text = "Underlay's datapath as a ratio (veth, no physical NIC)"
	p.Title.Padding = vg.Points(6)
	p.X.Label.Text = "ratio; bar: 95 % interval of the median; line: target"
	p.X.Min = 0
	p.Add(plotter.NewGrid())
	met, missed, told := ratios{style: blue}, ratios{style: vermilion}, ratios{style: grey}
	var marks plotter.XYs
	var names []plot.Tick
	drawn := 0
	for i := range targets {
		t := targets[len(targets)-1-i] // the first on top
		k := slices.IndexFunc(rows, func(r Row) bool { return r.Name == t.row })
		if k < 0 {
			continue
		}
		r, y := rows[k], float64(drawn)
		drawn++
		names = append(names, plot.Tick{Value: y, Label: t.row})
		to := &missed
		switch {
		case t.bound == 0:
			to = &told
		case t.met(r):
			to = &met
		}
		to.XYs = append(to.XYs, plotter.XY{X: r.Ratio, Y: y})
		to.XErrors = append(to.XErrors, struct{ Low, High float64 }{r.Ratio - r.Low95, r.High95 - r.Ratio})
		if t.bound != 0 {
			marks = append(marks, plotter.XY{X: t.bound, Y: y})
		}
	}
	p.Y.Min, p.Y.Max = -0.7, float64(drawn)-0.3
	p.Y.Tick.Marker = plot.ConstantTicks(names)
	for _, set := range []struct {
		name string
		ratios
	}{{"target met", met}, {"target missed", missed}, {"no target", told}} {
		if len(set.XYs) == 0 {
			continue
		}
		points, err := plotter.NewScatter(set.XYs)
		if err != nil {
			return nil, fmt.Errorf("draw the ratios: %w", err)
		}
		points.GlyphStyle = draw.GlyphStyle{Color: set.style, Radius: vg.Points(3), Shape: draw.CircleGlyph{}}
		bars, err := plotter.NewXErrorBars(set)
		if err != nil {
			return nil, fmt.Errorf("draw the intervals: %w", err)
		}
		bars.LineStyle = draw.LineStyle{Color: set.style, Width: vg.Points(1.2)}
		p.Add(bars, points)
		p.Legend.Add(set.name, points)
	}
	if len(marks) > 0 {
		points, err := plotter.NewScatter(marks)
		if err != nil {
			return nil, fmt.Errorf("draw the targets: %w", err)
		}
		points.GlyphStyle = draw.GlyphStyle{Color: grey, Radius: vg.Points(5), Shape: upright{}}
		p.Add(points)
		p.Legend.Add("target", points)
	}
	p.Legend.Top = true
	c := vgsvg.New(24*vg.Centimeter, vg.Length(drawn)*0.55*vg.Centimeter+4*vg.Centimeter)
	const margin = vg.Length(6)
	p.Draw(draw.Crop(draw.New(c), margin, -margin, margin, -margin))
	var b bytes.Buffer
	if _, err := c.WriteTo(&b); err != nil {
		return nil, fmt.Errorf("write SVG: %w", err)
	}
	return b.Bytes(), nil
}

// ratios are points with intervals, in one colour.
type ratios struct {
	plotter.XYs
	plotter.XErrors
	style color.Color
}

// upright is a mark that crosses a row.
type upright struct{}

func (upright) DrawGlyph(c *draw.Canvas, style draw.GlyphStyle, at vg.Point) {
	c.SetLineStyle(draw.LineStyle{Color: style.Color, Width: vg.Points(1.5)})
	var p vg.Path
	p.Move(vg.Point{X: at.X, Y: at.Y - style.Radius})
	p.Line(vg.Point{X: at.X, Y: at.Y + style.Radius})
	c.Stroke(p)
}
