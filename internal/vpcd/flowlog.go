package vpcd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

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

	// maxKeptIntervals is how many intervals wait in the kernel when vpcd's own
	// folder cannot be written to. Then the oldest is given up, and flow logs say
	// SKIPDATA. When more wait, the interval that runs goes on.
	maxKeptIntervals = 10

	// Of what waits in the kernel a vpcd that starts leaves so many intervals for
	// later, if it gets rid of the others within the time: it does not serve before.
	leftIntervals = 3
	catchUpTime   = 250 * time.Millisecond
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
// interval is discarded when it is in a file of vpcd's own (keptFlows); until
// then the kernel keeps it, so that a process that dies loses none. From there
// records come into the files of flow logs, a window of several intervals at a
// time: what a process that died has left of them the next one writes, the same.
//
// One goroutine ends intervals and another delivers them, so that however much
// there is to deliver, the next interval ends in time.
type flowLogger struct {
	net             recorder
	store           *store.Store
	interval        func() time.Duration // of a record
	window          func() time.Duration // of a file
	account, region string
	zoneIDs         map[string]string // by name
	log             *slog.Logger
	kept            *keptFlows
	files           *delivery
	recent          *recentFlows
	ended           chan struct{} // of size 1: there is something to deliver

	// Of the goroutine that delivers.
	told map[uint64]bool // intervals that recent has and that are not discarded
}

// Run works until ctx ends.
func (l *flowLogger) Run(ctx context.Context) error {
	defer l.recent.close()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return l.endIntervals(ctx) })
	group.Go(func() error { return l.deliverIntervals(ctx) })
	return group.Wait()
}

// endIntervals ends each interval when it is due.
func (l *flowLogger) endIntervals(ctx context.Context) error {
	tick := time.NewTicker(flowPoll)
	defer tick.Stop()
	trouble := lastError{log: func(err error) { l.log.Error("flow interval not ended", "err", err) }}
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			trouble.report(l.endDue(now))
		}
	}
}

// deliverIntervals delivers what the process before has left, and then what ends.
func (l *flowLogger) deliverIntervals(ctx context.Context) error {
	trouble := lastError{log: func(err error) { l.log.Error("flow records not delivered", "err", err) }}
	trouble.report(l.begin())
	for {
		trouble.report(l.deliver())
		select {
		case <-ctx.Done():
			return nil
		case <-l.ended:
		}
	}
}

// begin tells recent what was recorded before.
func (l *flowLogger) begin() error {
	l.told = map[uint64]bool{}
	before, err := l.kept.latest(maxRecentFlows)
	l.recent.add(before)
	return err
}

// lastError logs errors of something that is done again and again, each when it
// is new.
type lastError struct {
	log  func(error)
	text string // "": it was none
}

func (e *lastError) report(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text != "" && text != e.text {
		e.log(err)
	}
	e.text = text
}

// catchUp keeps intervals that wait in the kernel, one at least if there are many. A
// vpcd does it first of all: those that die again and again before they have delivered
// anything would end more intervals than they take away.
func (l *flowLogger) catchUp() error {
	begun := time.Now()
	for waiting := l.net.EndedIntervals(); len(waiting) > leftIntervals; waiting = waiting[1:] {
		i, err := l.net.ReadInterval(waiting[0])
		if err == nil {
			err = l.kept.add(i, l.records(i))
		}
		if err == nil {
			err = l.net.DiscardInterval(i.Number)
		}
		if err != nil || time.Since(begun) > catchUpTime {
			return err
		}
	}
	return nil
}

// endDue ends the running interval if it is due, and has it delivered. A vpcd
// does it before it serves: one that dies again and again before flowPoll is over
// would never end an interval, and its room would be used up.
func (l *flowLogger) endDue(now time.Time) error {
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
	defer func() {
		select {
		case l.ended <- struct{}{}:
		default:
		}
	}()
	if n := len(l.net.EndedIntervals()); n > maxKeptIntervals {
		return fmt.Errorf("%d intervals wait to be written, so the one that runs goes on, and what finds no room in it is SKIPDATA; see that vpcd has CPU time and a disk that is fast enough", n)
	}
	return l.net.EndInterval()
}

// deliver brings all intervals that have ended to where they are wanted, oldest
// first: to who asks, into vpcd's own folder and out of the kernel, and what is
// due into the files of flow logs.
func (l *flowLogger) deliver() error {
	since, err := l.keep()
	if e := l.kept.closeWindows(since, l.window(), l.longInterval()); e != nil {
		return errors.Join(err, e)
	}
	return errors.Join(err, l.files.deliver(l.kept, l.store.View(), l.log))
}

// keep takes the intervals that have ended from the fabric, and returns when what
// it has not taken began. Others may end meanwhile.
func (l *flowLogger) keep() (since time.Time, failed error) {
	since = l.net.RunningSince()
	for _, n := range l.net.EndedIntervals() {
		if failed != nil && l.told[n] {
			continue
		}
		i, err := l.net.ReadInterval(n)
		if err != nil {
			return since, err
		}
		if failed == nil {
			since = i.Start
		}
		records := l.records(i)
		if !l.told[n] && !l.kept.has(i) {
			l.recent.add(records)
		}
		l.told[n] = true
		if failed == nil {
			failed = l.kept.add(i, records)
		}
		if failed != nil {
			continue
		}
		since = i.End
		if err := l.discard(n); err != nil {
			return since, err
		}
	}
	for numbers := l.net.EndedIntervals(); failed != nil && len(numbers) > maxKeptIntervals; numbers = numbers[1:] {
		i, err := l.net.ReadInterval(numbers[0])
		if err != nil {
			return since, err
		}
		since = i.End
		l.kept.giveUp(i.Start, i.End, l.store.View(), nil)
		l.log.Error("flow records lost", "interval", i.Number, "start", i.Start, "end", i.End, "err", failed)
		if err := l.discard(i.Number); err != nil {
			return since, err
		}
	}
	return since, failed
}

func (l *flowLogger) discard(number uint64) error {
	delete(l.told, number)
	return l.net.DiscardInterval(number)
}

// shownRecord is a record, and what people call the machine that it is of.
type shownRecord struct {
	flow.Record
	Machine string
	// Long says that a record of this interface may be of ten minutes: it is not
	// of a Nitro instance.
	Long    bool
	running bool // its interval has not ended
}

// records are what an interval says: records by their time, then those of
// interfaces of which something was skipped, or of which there is nothing. As AWS
// tells them apart, what groups refused and what an ACL did is one REJECT.
func (l *flowLogger) records(i *fabric.Interval) []shownRecord {
	state := l.store.View()
	out := make([]shownRecord, 0, len(i.Records))
	var refused []shownRecord
	seen := map[vpc.ENIID]bool{}
	for _, r := range i.Records {
		s := l.about(state, r.Interface)
		s.Start, s.End, s.Status, s.Egress, s.Source, s.Destination = r.First, r.Last, flow.OK, r.Egress, r.Source, r.Destination
		s.SourcePort, s.DestinationPort, s.Protocol = int(r.SourcePort), int(r.DestinationPort), int(r.Protocol)
		s.Packets, s.Bytes, s.TCPFlags, s.TrafficPath = int64(r.Packets), int64(r.Bytes), r.TCPFlags, r.Path
		s.Action, s.RefusedBy, s.running = flow.Accept, string(r.Refused), i.End.IsZero()
		seen[r.Interface.ENI] = true
		if r.Refused == fabric.Accepted {
			out = append(out, s)
			continue
		}
		s.Action = flow.Reject
		refused = append(refused, s)
	}
	out = append(out, merged(refused)...)
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
	s.Long = !nitro(state, e.Instance)
	if e.Instance != "" {
		s.Machine = state.TagsOf(string(e.Instance))["Name"]
	} else if x := state.ENI(e.ENI); x != nil {
		s.Machine = cmp.Or(x.Service, string(x.NAT))
	}
	return s
}
