package sim

import (
	"bytes"
	"fmt"
	"image/color"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// The colours of Okabe and Ito, which people with colour blindness tell apart.
var (
	blue   = color.RGBA{R: 0, G: 114, B: 178, A: 255}
	orange = color.RGBA{R: 213, G: 94, B: 0, A: 255}
)

// Plot draws the course of the report as SVG: pods, addresses, calls and
// interfaces over time.
func (r *Report) Plot() ([]byte, error) {
	unit, per := "seconds", time.Second
	for _, o := range r.Outcomes {
		if time.Duration(o.End) > 10*time.Minute {
			unit, per = "minutes", time.Minute
		}
	}
	panel := func(title, y string) *plot.Plot {
		p := plot.New()
		sans := func(f *font.Font) { f.Typeface, f.Variant = "Liberation", "Sans" }
		for _, f := range []*font.Font{&p.Title.TextStyle.Font, &p.X.Label.TextStyle.Font, &p.Y.Label.TextStyle.Font, &p.X.Tick.Label.Font, &p.Y.Tick.Label.Font, &p.Legend.TextStyle.Font} {
			sans(f)
		}
		p.Title.Text, p.X.Label.Text, p.Y.Label.Text = title, unit+" since the start", y
		p.Title.Padding = vg.Points(6)
		p.X.Min, p.Y.Min = 0, 0
		p.Y.Tick.Marker = thousands{}
		p.Legend.Padding = vg.Points(2)
		p.Add(plotter.NewGrid())
		return p
	}
	pods, held := panel("Pods with an address", "pods"), panel("Addresses of the VPC", "addresses")
	calls, enis := panel("EC2 calls (dashed: throttled)", "calls per second"), panel("Network interfaces", "interfaces")
	held.Legend.Top, pods.Legend.Top = false, false
	calls.Legend.Top = true
	for i := range r.Outcomes {
		o := &r.Outcomes[i]
		style := draw.LineStyle{Color: blue, Width: vg.Points(1.6)}
		if o.Model != Underlay {
			style.Color = orange
		}
		dashed := style
		dashed.Dashes = []vg.Length{vg.Points(4), vg.Points(3)}
		used := dashed
		used.Dashes = []vg.Length{vg.Points(1.5), vg.Points(2)}
		line := func(p *plot.Plot, name string, s draw.LineStyle, y func(k int) float64) error {
			pts := make(plotter.XYs, len(o.Series))
			for k, at := range o.Series {
				pts[k] = plotter.XY{X: float64(at.T) / float64(per), Y: y(k)}
			}
			l, err := plotter.NewLine(pts)
			if err != nil {
				return fmt.Errorf("draw %s: %w", name, err)
			}
			l.LineStyle = s
			p.Add(l)
			p.Legend.Add(name, l)
			return nil
		}
		rate := func(count func(*Sample) int) func(k int) float64 {
			return func(k int) float64 {
				if k == 0 {
					return 0
				}
				a, b := &o.Series[k-1], &o.Series[k]
				return float64(count(b)-count(a)) / max(1e-9, time.Duration(b.T-a.T).Seconds())
			}
		}
		for _, err := range []error{
			line(pods, o.Model, style, func(k int) float64 { return float64(o.Series[k].Pods) }),
			line(held, o.Model+", held", style, func(k int) float64 { return float64(o.Series[k].Held) }),
			line(held, o.Model+", in use", used, func(k int) float64 { return float64(o.Series[k].Pods) }),
			line(calls, o.Model, style, rate(func(s *Sample) int { return s.Calls })),
			line(calls, o.Model+", throttled", dashed, rate(func(s *Sample) int { return s.Throttled })),
			line(enis, o.Model, style, func(k int) float64 { return float64(o.Series[k].ENIs) }),
		} {
			if err != nil {
				return nil, err
			}
		}
	}
	const width, height = 30 * vg.Centimeter, 20 * vg.Centimeter
	c := vgsvg.New(width, height)
	dc := draw.New(c)
	title := pods.Title.TextStyle
	title.Font.Size = vg.Points(13)
	title.YAlign = -1
	head := vg.Points(26)
	cfg := &r.Config
	dc.FillText(title, vg.Point{X: width / 2, Y: height - vg.Points(8)},
		fmt.Sprintf("%s: %s nodes (%s) × %d pods", cfg.Scenario, digits(cfg.Nodes), cfg.InstanceType, cfg.PodsPerNode))
	tiles := draw.Tiles{Rows: 2, Cols: 2, PadX: vg.Points(16), PadY: vg.Points(16), PadTop: head, PadBottom: vg.Points(6), PadLeft: vg.Points(6), PadRight: vg.Points(14)}
	grid := [][]*plot.Plot{{pods, held}, {calls, enis}}
	canvases := plot.Align(grid, tiles, dc)
	for i, row := range grid {
		for k, p := range row {
			p.Draw(canvases[i][k])
		}
	}
	var b bytes.Buffer
	if _, err := c.WriteTo(&b); err != nil {
		return nil, fmt.Errorf("write SVG: %w", err)
	}
	return b.Bytes(), nil
}

// thousands labels an axis with whole numbers, their thousands apart.
type thousands struct{}

func (thousands) Ticks(low, high float64) []plot.Tick {
	ticks := plot.DefaultTicks{}.Ticks(low, high)
	for i := range ticks {
		if ticks[i].Label == "" {
			continue
		}
		if v := ticks[i].Value; v == float64(int(v)) {
			ticks[i].Label = digits(int(v))
		}
	}
	return ticks
}
