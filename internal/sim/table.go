package sim

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Write prints the report for people: what was simulated, then a column per
// model.
func (r *Report) Write(w io.Writer) {
	c := &r.Config
	mode := "single addresses"
	if c.Prefixes {
		mode = "/28 prefixes"
	}
	fmt.Fprintf(w, "%s: %s nodes (%s) × %d pods, %d zones, %s, buckets %s, seed %d\n\n", c.Scenario, digits(c.Nodes), c.InstanceType, c.PodsPerNode, c.Zones, mode, c.Buckets, c.Seed)
	var rows [][]string
	row := func(name string, cell func(o *Outcome) string) {
		cells := []string{name}
		for i := range r.Outcomes {
			cells = append(cells, cell(&r.Outcomes[i]))
		}
		rows = append(rows, cells)
	}
	count := func(name string, n func(o *Outcome) int) {
		row(name, func(o *Outcome) string { return digits(n(o)) })
	}
	row("", func(o *Outcome) string { return o.Model })
	row("pods ready", func(o *Outcome) string { return digits(o.PodsReady) + " of " + digits(o.Pods) })
	row("last pod ready after", func(o *Outcome) string {
		if o.PodsReady < o.Pods {
			return "never"
		}
		return clockTime(o.LastReady)
	})
	if r.Minimum != nil {
		row("  × the least possible", func(o *Outcome) string {
			if o.PodsReady < o.Pods || r.Minimum.Seconds <= 0 {
				return "–"
			}
			return fmt.Sprintf("%.2f", float64(o.LastReady)/float64(r.Minimum.Seconds))
		})
	}
	row("pod wait, median", func(o *Outcome) string { return clockTime(o.WaitP50) })
	row("pod wait, 99 %", func(o *Outcome) string { return clockTime(o.WaitP99) })
	count("failed ADDs", func(o *Outcome) int { return o.FailedADDs })
	count("pods with failed ADDs", func(o *Outcome) int { return o.PodsFailed })
	count("EC2 calls", func(o *Outcome) int { return o.CallsTotal })
	row("  throttled", func(o *Outcome) string { return fmt.Sprintf("%.1f %%", 100*o.ThrottledShare()) })
	for a := range action(actions) {
		if r.calls(a) {
			row("  "+a.String(), func(o *Outcome) string {
				for _, n := range o.Calls {
					if n.Action == a.String() {
						return digits(n.Calls)
					}
				}
				return "0"
			})
		}
	}
	count("addresses held, peak", func(o *Outcome) int { return o.HeldPeak })
	count("  in use, peak", func(o *Outcome) int { return o.UsedPeak })
	count("addresses held, at the end", func(o *Outcome) int { return o.HeldEnd })
	count("  in use, at the end", func(o *Outcome) int { return o.UsedEnd })
	count("network address units, peak", func(o *Outcome) int { return o.NAUPeak })
	count("interfaces, peak", func(o *Outcome) int { return o.ENIsPeak })
	count("interfaces, at the end", func(o *Outcome) int { return o.ENIsEnd })
	count("interfaces leaked by dead nodes", func(o *Outcome) int { return o.LeakedENIs })
	for _, o := range r.Outcomes {
		if o.Unlaunched > 0 {
			count("nodes without an address to start", func(o *Outcome) int { return o.Unlaunched })
			break
		}
	}
	write(w, rows)
	fmt.Fprintln(w)
	if m := r.Minimum; m != nil {
		fmt.Fprintf(w, "The least possible is %s: %s.\n", clockTime(m.Seconds), m.explain(c))
	}
	for _, o := range r.Outcomes {
		if o.NAUPeak > nauMost {
			fmt.Fprintf(w, "%s needs more than the %s network address units that a VPC can have: use --prefixes (one unit per /28) or several VPCs.\n", o.Model, digits(nauMost))
		}
		if o.PodsReady < o.Pods {
			fmt.Fprintf(w, "%s: %s pods had no address when the scenario ended after %s.\n", o.Model, digits(o.Pods-o.PodsReady), clockTime(o.End))
		}
	}
}

// nauMost is the highest quota of network address units of a VPC, 256,000; the
// default is 64,000 (Amazon VPC user guide, "Network Address Usage").
const nauMost = 256_000

func (m *Minimum) explain(c *Config) string {
	var parts []string
	for _, n := range m.Calls {
		parts = append(parts, digits(n.Calls)+" "+n.Action)
	}
	s := "nobody can do with less than " + strings.Join(parts, ", ")
	if m.Binds == "" {
		return s + "; the account's buckets hold that much, latencies and the pods' own arrival decide"
	}
	size, _ := bucketSizes()
	for a := range action(actions) {
		if a.String() == m.Binds {
			s += fmt.Sprintf("; %s gets %d tokens per second, from %s of %d", m.Binds, size[a][1], map[Buckets]string{FullBuckets: "a full bucket", EmptyBuckets: "an empty bucket"}[c.Buckets], size[a][0])
		}
	}
	return s
}

func (r *Report) calls(a action) bool {
	for _, o := range r.Outcomes {
		for _, n := range o.Calls {
			if n.Action == a.String() {
				return true
			}
		}
	}
	return false
}

// write prints rows, the first column to the left and the others to the right.
func write(w io.Writer, rows [][]string) {
	width := make([]int, len(rows[0]))
	for _, r := range rows {
		for i, c := range r {
			width[i] = max(width[i], utf8.RuneCountInString(c))
		}
	}
	for _, r := range rows {
		var b strings.Builder
		for i, c := range r {
			pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(c))
			if i == 0 {
				b.WriteString(c + pad)
			} else {
				b.WriteString("  " + pad + c)
			}
		}
		fmt.Fprintln(w, strings.TrimRight(b.String(), " "))
	}
}

// digits prints n with its thousands apart.
func digits(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// clockTime prints a duration to three digits or whole seconds.
func clockTime(s seconds) string {
	d := time.Duration(s)
	switch {
	case d == 0:
		return "0 s"
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Round(time.Millisecond).Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d < time.Hour:
		return fmt.Sprintf("%d min %02d s", int(d.Minutes()), int(d.Seconds())%60)
	}
	return fmt.Sprintf("%d h %02d min", int(d.Hours()), int(d.Minutes())%60)
}
