package vpcd

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
	"github.com/underlay-cni/underlay/internal/vpcd/flow"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

const (
	// defaultFlowInterval is AWS's on Nitro instances: a minute at most,
	// whatever a flow log's MaxAggregationInterval (VPC User Guide, "Flow log
	// basics").
	defaultFlowInterval = time.Minute

	// flowPoll is how often the running interval is looked at: whether its time
	// has come, or its room is short.
	flowPoll = 250 * time.Millisecond

	// maxKeptIntervals is how many intervals wait for a flow log that cannot be
	// delivered. Then the oldest is given up, and the flow log says SKIPDATA.
	maxKeptIntervals = 10
)

// recorder is what the flow logger needs of a *fabric.Fabric.
type recorder interface {
	RunningSince() time.Time
	EndInterval() error
	EndedIntervals() []uint64
	ReadInterval(number uint64) (*fabric.Interval, error)
	DiscardInterval(number uint64) error
	RunningInterval() (*fabric.Interval, error)
	IntervalFill() (records, room int, err error)
}

// flowLogger ends the fabric's intervals of flow records and brings the records
// to those who want them: the files of flow logs, and whoever asks vpcd. An
// interval is discarded when it is in all files; until then the kernel keeps it,
// so that a process that dies loses none: the next one writes the same files
// again.
type flowLogger struct {
	net             recorder
	store           *store.Store
	interval        func() time.Duration
	account, region string
	zoneIDs         map[string]string // by name
	log             *slog.Logger
	files           *delivery
	recent          *recentFlows

	told    map[uint64]bool // intervals that recent has
	trouble string          // the last error, to log it once
}

// Run works until ctx ends.
func (l *flowLogger) Run(ctx context.Context) error {
	l.told = map[uint64]bool{}
	defer l.recent.close()
	tick := time.NewTicker(flowPoll)
	defer tick.Stop()
	l.report(l.deliver()) // what the process before has left
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			l.report(l.once(now))
		}
	}
}

// report logs an error when it is new.
func (l *flowLogger) report(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text != "" && text != l.trouble {
		l.log.Error("flow records not delivered", "err", err)
	}
	l.trouble = text
}

// once ends the running interval if it is due, and delivers it.
func (l *flowLogger) once(now time.Time) error {
	start := l.net.RunningSince()
	records, room, err := l.net.IntervalFill()
	if err != nil {
		return err
	}
	length := l.interval()
	// By the clock, so that intervals of a minute are its minutes. What fills up
	// ends early: an interval is a maximum.
	if now.Before(start.Truncate(length).Add(length)) && records <= room/2 {
		return nil
	}
	if err := l.net.EndInterval(); err != nil {
		return err
	}
	return l.deliver()
}

// deliver brings all intervals that have ended to where they are wanted, oldest
// first, and discards those that are.
func (l *flowLogger) deliver() error {
	numbers := l.net.EndedIntervals()
	var failed error
	for at, n := range numbers {
		if l.told[n] && l.files.has(n, l.store.View()) {
			continue
		}
		i, err := l.net.ReadInterval(n)
		if err != nil {
			return err
		}
		records := l.records(i)
		if !l.told[n] {
			l.told[n] = true
			l.recent.add(records)
		}
		if err := l.files.write(i, records, l.store.View()); err != nil {
			failed = err
			if len(numbers)-at > maxKeptIntervals {
				l.files.giveUp(i, l.store.View())
				l.log.Error("flow records lost", "interval", n, "start", i.Start, "end", i.End, "err", err)
			}
		}
	}
	for _, n := range numbers {
		if !l.files.has(n, l.store.View()) {
			break
		}
		if err := l.net.DiscardInterval(n); err != nil {
			return err
		}
		delete(l.told, n)
		l.files.forget(n)
	}
	return failed
}

// shownRecord is a record, and what people call the machine that it is of.
type shownRecord struct {
	flow.Record
	machine string
	running bool // its interval has not ended
}

// records are what an interval says: records by their time, then those of
// interfaces of which something was skipped, or of which there is nothing.
func (l *flowLogger) records(i *fabric.Interval) []shownRecord {
	state := l.store.View()
	out := make([]shownRecord, 0, len(i.Records))
	seen := map[vpc.ENIID]bool{}
	for _, r := range merged(i.Records) {
		s := l.about(state, r.Interface)
		s.Start, s.End, s.Status, s.Egress, s.Source, s.Destination = r.First, r.Last, flow.OK, r.Egress, r.Source, r.Destination
		s.SourcePort, s.DestinationPort, s.Protocol = int(r.SourcePort), int(r.DestinationPort), int(r.Protocol)
		s.Packets, s.Bytes, s.TCPFlags, s.TrafficPath = int64(r.Packets), int64(r.Bytes), r.TCPFlags, r.Path
		s.Action, s.RefusedBy = flow.Accept, string(r.Refused)
		if r.Refused != fabric.Accepted {
			s.Action = flow.Reject
		}
		s.running = i.End.IsZero()
		out = append(out, s)
		seen[r.Interface.ENI] = true
	}
	slices.SortStableFunc(out, func(a, b shownRecord) int { return a.Start.Compare(b.Start) })
	if i.End.IsZero() {
		return out
	}
	mark := func(e *fabric.Logged, status string) {
		s := l.about(state, e)
		s.Start, s.End, s.Status = i.Start, i.End, status
		out = append(out, s)
		seen[e.ENI] = true
	}
	skipped := map[vpc.ENIID]bool{}
	for _, k := range i.Skipped {
		if !skipped[k.Interface.ENI] {
			skipped[k.Interface.ENI] = true
			mark(k.Interface, flow.SkipData)
		}
	}
	slices.SortFunc(i.Attached, func(a, b *fabric.Logged) int { return cmp.Compare(a.ENI, b.ENI) })
	for _, e := range i.Attached {
		if !seen[e.ENI] {
			mark(e, flow.NoData)
		}
	}
	return out
}

// about is a record that says nothing yet but which interface it is of.
func (l *flowLogger) about(state *store.State, e *fabric.Logged) shownRecord {
	s := shownRecord{Record: flow.Record{
		Account: l.account, Region: l.region, ZoneID: l.zoneIDs[e.Zone], Interface: e.ENI, VPC: e.VPC, Subnet: e.Subnet, Instance: e.Instance, Primary: e.Primary,
	}}
	if e.Instance != "" {
		s.machine = state.TagsOf(string(e.Instance))["Name"]
	} else if x := state.ENI(e.ENI); x != nil {
		s.machine = cmp.Or(x.Service, string(x.NAT))
	}
	return s
}

// merged are records as AWS tells them apart: one that groups refused and one
// that an ACL did are one REJECT.
func merged(records []fabric.Record) []fabric.Record {
	type key struct {
		eni      vpc.ENIID
		egress   bool
		tuple    string
		protocol uint8
	}
	at := map[key]int{}
	out := make([]fabric.Record, 0, len(records))
	for _, r := range records {
		if r.Refused == fabric.Accepted {
			out = append(out, r)
			continue
		}
		k := key{r.Interface.ENI, r.Egress, fmt.Sprint(r.Source, r.SourcePort, r.Destination, r.DestinationPort, r.Path), r.Protocol}
		i, ok := at[k]
		if !ok {
			at[k] = len(out)
			out = append(out, r)
			continue
		}
		o := &out[i]
		o.Packets, o.Bytes, o.TCPFlags = o.Packets+r.Packets, o.Bytes+r.Bytes, o.TCPFlags|r.TCPFlags
		if r.First.Before(o.First) {
			o.First = r.First
		}
		if r.Last.After(o.Last) {
			o.Last = r.Last
		}
		o.Refused += "," + r.Refused
	}
	return out
}
