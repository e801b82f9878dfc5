package vpcd

import (
	"slices"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/flow"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// longIntervals is how many intervals a record of a flow log of 600 s is of at
// most: AWS has records of a minute, and of ten.
const longIntervals = 10

// longInterval is how long such a record is: ten minutes, and less when
// intervals are shorter than a minute.
func (l *flowLogger) longInterval() time.Duration {
	short := l.interval()
	return max(short, min(longIntervals*short, longIntervals*time.Minute))
}

// nitro reports whether an interface's records are of a minute at most whatever
// its flow logs say (VPC User Guide, "Flow log basics"): if it is of a Nitro
// instance. Those of managed services and NAT gateways are of none.
func nitro(state *store.State, id vpc.InstanceID) bool {
	if id == "" {
		return false
	}
	i := state.Instance(id)
	if i == nil { // it has gone meanwhile: what is short is right for any
		return true
	}
	limits, ok := vpc.LimitsOf(i.Type)
	return !ok || limits.Nitro()
}

// recordKind is what tells records apart, but for their time and who refused.
type recordKind struct {
	of                          int // which interface
	egress                      bool
	source, destination         [2]uint64
	sourcePort, destinationPort int
	protocol, path              int
	action                      string // without packets, the status
}

// merged are records, those of one kind as one.
func merged(records []shownRecord) []shownRecord {
	var out []shownRecord
	at, interfaces := map[recordKind]int{}, map[shownRecord]int{}
	for i := range records {
		r := &records[i]
		of := shownRecord{Record: r.OfInterface(), Long: r.Long}
		if _, ok := interfaces[of]; !ok {
			interfaces[of] = len(interfaces)
		}
		k := recordKind{of: interfaces[of], action: r.Status}
		if r.Status == flow.OK {
			k = recordKind{
				of: k.of, egress: r.Egress, source: packAddr(r.Source), destination: packAddr(r.Destination), sourcePort: r.SourcePort, destinationPort: r.DestinationPort,
				protocol: r.Protocol, path: r.TrafficPath, action: r.Action,
			}
		}
		n, ok := at[k]
		if !ok {
			at[k] = len(out)
			out = append(out, *r)
			continue
		}
		o := &out[n]
		o.Packets, o.Bytes, o.TCPFlags = o.Packets+r.Packets, o.Bytes+r.Bytes, o.TCPFlags|r.TCPFlags
		if r.Start.Before(o.Start) {
			o.Start = r.Start
		}
		if r.End.After(o.End) {
			o.End = r.End
		}
		for by := range strings.SplitSeq(r.RefusedBy, ",") {
			if by != "" && !slices.Contains(strings.Split(o.RefusedBy, ","), by) {
				o.RefusedBy = strings.TrimPrefix(o.RefusedBy+","+by, ",")
			}
		}
	}
	return out
}

// longer makes long records of those of several intervals that follow each
// other, of the interfaces that have them: a flow's are one, and an interface
// has NODATA only if there is nothing of it in all of them.
func longer(records []shownRecord) []shownRecord {
	some := map[vpc.ENIID]bool{}
	for i := range records {
		if records[i].Status != flow.NoData {
			some[records[i].Interface] = true
		}
	}
	return slices.DeleteFunc(merged(records), func(r shownRecord) bool { return r.Status == flow.NoData && some[r.Interface] })
}

// longRecords returns the long records that are due with a window.
func (k *keptFlows) longRecords(w flowWindow) ([]shownRecord, error) {
	var out, some []shownRecord
	var since time.Time
	for _, i := range k.between(w.LongFirst, w.LongLast) {
		if began := i.start.Truncate(w.LongLength); !began.Equal(since) {
			out, some, since = append(out, longer(some)...), nil, began
		}
		records, err := k.read(i)
		if err != nil {
			return nil, err
		}
		some = append(some, slices.DeleteFunc(records, func(r shownRecord) bool { return !r.Long })...)
	}
	return append(out, longer(some)...), nil
}
