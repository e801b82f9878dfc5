package vpcd

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/flow"
)

// maxRecentFlows is how many flow records are kept for who asks.
const maxRecentFlows = 20_000

// recentFlows are the latest records, and who waits for more. It is safe for
// concurrent use.
type recentFlows struct {
	mu      sync.Mutex
	records []shownRecord
	first   uint64        // number of records[0], counted from the start
	more    chan struct{} // closed when there are more, or none ever
	closed  bool
}

func newRecentFlows() *recentFlows { return &recentFlows{more: make(chan struct{})} }

// add keeps records, but for those that say that there is nothing.
func (f *recentFlows) add(records []shownRecord) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range records {
		if r.Status != flow.NoData {
			f.records = append(f.records, r)
		}
	}
	if drop := len(f.records) - maxRecentFlows; drop > 0 {
		f.records = slices.Clone(f.records[drop:])
		f.first += uint64(drop)
	}
	if !f.closed {
		close(f.more)
		f.more = make(chan struct{})
	}
}

// close ends the waiting of everybody.
func (f *recentFlows) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	close(f.more)
}

// since returns the records from a number on, the number of the next, and what
// is closed when there are more; nil if there never will be.
func (f *recentFlows) since(n uint64) (records []shownRecord, next uint64, more <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	next = f.first + uint64(len(f.records))
	if n < next {
		records = slices.Clone(f.records[max(n, f.first)-f.first:])
	}
	if !f.closed {
		more = f.more
	}
	return records, next, more
}

// FlowIntervalHeader tells, of an answer to GET /_vpcd/flows, how long a record
// is gathered at most.
const FlowIntervalHeader = "X-Vpcd-Flow-Interval"

// flowFilter is what GET /_vpcd/flows asks for.
type flowFilter struct {
	eni     vpc.ENIID
	action  string
	address netip.Prefix
	since   time.Time
	follow  bool
}

func parseFlowFilter(r *http.Request) (flowFilter, error) {
	q := r.URL.Query()
	f := flowFilter{eni: vpc.ENIID(q.Get("eni")), action: q.Get("action"), follow: q.Get("follow") == "true"}
	for name := range q {
		if !slices.Contains([]string{"eni", "action", "address", "since", "follow"}, name) {
			return f, fmt.Errorf("there is no parameter %q; there are eni, action, address, since, follow", name)
		}
	}
	if f.eni != "" {
		if err := vpc.CheckID("eni", string(f.eni)); err != nil {
			return f, err
		}
	}
	if f.action != "" && f.action != flow.Accept && f.action != flow.Reject {
		return f, fmt.Errorf("action is %q: give %s or %s", f.action, flow.Accept, flow.Reject)
	}
	if s := q.Get("address"); s != "" {
		p, err := netip.ParsePrefix(s)
		if a, e := netip.ParseAddr(s); e == nil {
			p, err = single(a), nil
		}
		if err != nil {
			return f, fmt.Errorf("address is %q: give an address or a block of them", s)
		}
		f.address = p
	}
	if s := q.Get("since"); s != "" {
		t, err := time.Parse(time.RFC3339Nano, s)
		if err != nil {
			return f, fmt.Errorf("since is %q: give a time as in 2026-01-02T03:04:05Z", s)
		}
		f.since = t
	}
	return f, nil
}

func (f *flowFilter) wants(r *shownRecord) bool {
	return (f.eni == "" || r.Interface == f.eni) && (f.action == "" || r.Action == f.action) && !r.End.Before(f.since) &&
		(!f.address.IsValid() || r.Status == flow.OK && (f.address.Contains(r.Source) || f.address.Contains(r.Destination)))
}

// flows answers GET /_vpcd/flows: a JSON object a line. With follow it goes on
// until the client has enough; without, records of the running interval come
// last.
func (a *admin) flows(w http.ResponseWriter, r *http.Request) {
	f, err := parseFlowFilter(r)
	if err != nil {
		a.respond(w, r, nil, httpError{http.StatusBadRequest, err})
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	if a.flow == nil { // no fabric, no flows
		return
	}
	w.Header().Set(FlowIntervalHeader, a.flow.interval().String())
	out := json.NewEncoder(w)
	control := http.NewResponseController(w)
	write := func(records []shownRecord) error {
		for i := range records {
			if !f.wants(&records[i]) {
				continue
			}
			if err := out.Encode(flowLine(&records[i])); err != nil {
				return err
			}
		}
		return control.Flush()
	}
	var next uint64
	for {
		var records []shownRecord
		var more <-chan struct{}
		records, next, more = a.flow.recent.since(next)
		if write(records) != nil {
			return // the client has gone
		}
		if !f.follow {
			break
		}
		if more == nil {
			return
		}
		select {
		case <-more:
		case <-r.Context().Done():
			return
		}
	}
	running, err := a.flow.net.RunningInterval()
	if err != nil {
		a.options.Logger.Warn("flows shown without those of the running interval", "err", err)
		return
	}
	_ = write(a.flow.records(running))
}

var flowFieldNames = slices.Sorted(maps.Keys(vpc.FlowFields()))

// flowLine is a record by AWS's names, without fields that do not apply, with
// what AWS does not tell: refused-by, machine (what people call it) and running
// (its interval has not ended, so there may come more).
func flowLine(r *shownRecord) map[string]any {
	out := map[string]any{}
	for _, name := range flowFieldNames {
		if v := r.Value(name); v != nil {
			out[name] = v
		}
	}
	if r.RefusedBy != "" {
		out["refused-by"] = r.RefusedBy
	}
	if r.Machine != "" {
		out["machine"] = r.Machine
	}
	if r.running {
		out["running"] = true
	}
	return out
}
