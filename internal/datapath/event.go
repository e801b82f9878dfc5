package datapath

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"time"
	"unsafe"

	"github.com/cilium/ebpf/ringbuf"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
)

// Event is a verdict about a packet: the first of a connection, if it was let
// through, or any that was dropped.
type Event struct {
	Time        time.Time
	Addr        netip.Addr     // of the pod at whose device it was; invalid: of none, or one that is gone
	HostIfIndex int            // of that device, or of an ENI's
	Reason      string         // why it was dropped, as Counters has it; "": it was not
	Src, Dst    netip.AddrPort // invalid if the packet was dropped before they were read
	Protocol    uint8
	ICMPType    uint8
	ICMPCode    uint8
	Bytes       int        // IP length
	Ingress     bool       // of the pod; else what it sends
	Rules       [2]uint32  // by gate, that decided
	Audit       [2]bool    // by gate: let through only because it enforces nothing
	Provenance  Provenance // 0: it belongs to no connection
}

// ErrMonitored: somebody else reads the events already.
var ErrMonitored = errors.New("somebody else monitors the datapath")

// Monitor calls fn for each verdict until ctx ends, at most perSecond times a
// second. It returns how many verdicts were left out because there were more, or
// because fn was too slow. One caller at a time: ErrMonitored.
func (d *Datapath) Monitor(ctx context.Context, perSecond int, fn func(Event)) (lost uint64, err error) {
	if !d.monitored.TryLock() {
		return 0, ErrMonitored
	}
	defer d.monitored.Unlock()
	r, err := ringbuf.NewReader(d.objs.Events)
	if err != nil {
		return 0, fmt.Errorf("read the ring of events: %w", err)
	}
	defer r.Close()
	var before uint64
	if err := d.objs.EventsLost.Get(&before); err != nil {
		return 0, fmt.Errorf("read how many events were lost: %w", err)
	}
	const refills = 10 // a second
	budget := int64(max(perSecond/refills, 1))
	listen := func(n uint32) error {
		return errors.Join(d.objs.EventBudget.Set(budget), d.objs.EventListeners.Set(n))
	}
	if err := listen(1); err != nil {
		return 0, fmt.Errorf("ask the programs for events: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = r.Close() })
	defer stop()
	var refill sync.WaitGroup
	done := make(chan struct{})
	refill.Go(func() {
		tick := time.NewTicker(time.Second / refills)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				_ = d.objs.EventBudget.Set(budget)
			case <-done:
				return
			}
		}
	})
	for err == nil {
		var rec ringbuf.Record
		if rec, err = r.Read(); err != nil {
			break
		}
		var e bpfgen.NodeEvent
		if _, err = binary.Decode(rec.RawSample, binary.NativeEndian, &e); err == nil {
			fn(d.event(&e))
		}
	}
	if errors.Is(err, ringbuf.ErrClosed) || errors.Is(err, os.ErrClosed) {
		err = nil
	}
	close(done)
	refill.Wait()
	var after uint64
	err = errors.Join(err, d.objs.EventListeners.Set(uint32(0)), d.objs.EventsLost.Get(&after))
	return after - before, err
}

// EventsLost returns how many verdicts were left out since the programs were
// loaded, as Monitor returns of its own time.
func (d *Datapath) EventsLost() (n uint64, err error) {
	if err := d.objs.EventsLost.Get(&n); err != nil {
		return 0, fmt.Errorf("read how many events were lost: %w", err)
	}
	return n, nil
}

func (d *Datapath) event(e *bpfgen.NodeEvent) Event {
	out := Event{
		Time: d.mono.at(e.AtNs), HostIfIndex: int(e.Ifindex), Reason: reasonNames[bpfgen.NodeDropReason(e.Reason)],
		Protocol: e.Tuple.Protocol, ICMPType: e.Tuple.IcmpType, ICMPCode: e.Tuple.IcmpCode, Bytes: int(e.Bytes),
		Ingress: e.Direction != 0, Rules: e.Rule, Provenance: Provenance(e.Provenance),
	}
	for g := range out.Audit {
		out.Audit[g] = e.Audit>>g&1 != 0
	}
	if e.Tuple.Src != (bpfgen.NodeAddr{}) {
		sport, dport := e.Tuple.Sport, e.Tuple.Dport
		if e.Tuple.Query != 0 {
			sport, dport = 0, 0
		}
		out.Src = netip.AddrPortFrom(netip.AddrFrom16(e.Tuple.Src.B).Unmap(), sport)
		out.Dst = netip.AddrPortFrom(netip.AddrFrom16(e.Tuple.Dst.B).Unmap(), dport)
	}
	var v bpfgen.NodeIface
	if err := d.objs.Ifaces.Lookup(&e.Ifindex, &v); err == nil {
		out.Addr = netip.AddrFrom16(v.Addr.B).Unmap()
	} else if a := map[bool]netip.Addr{false: out.Src.Addr(), true: out.Dst.Addr()}[out.Ingress]; a.IsValid() {
		if _, err := d.record(a); err == nil {
			out.Addr = a
		}
	}
	return out
}

// ends reads of connections that the programs removed. What finds no room in the ring
// goes without. Of nil, drain and close do nothing.
type ends struct {
	ring    *ringbuf.Reader
	mu      sync.Mutex    // held by drain
	drained chan struct{} // sent to when the ring was empty after a drain began
	over    chan struct{} // closed when nobody reads any more
}

// readEnds tells of such connections until the ring is closed.
func (d *Datapath) readEnds(e *ends) {
	defer close(e.over)
	const size = int(unsafe.Sizeof(bpfgen.NodeConn{}))
	var rec ringbuf.Record
	for {
		switch err := e.ring.ReadInto(&rec); {
		case errors.Is(err, ringbuf.ErrFlushed):
			e.drained <- struct{}{}
		case err != nil:
			return
		case len(rec.RawSample) >= size:
			// Before layout 4 the key stood in front of it once more.
			c := (*bpfgen.NodeConn)(unsafe.Pointer(&rec.RawSample[len(rec.RawSample)-size]))
			d.ended(c)
		}
	}
}

// drain returns when all has been told of that was in the ring: for less than a
// quarter of it the programs wake nobody.
func (e *ends) drain() {
	if e == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.ring.Flush() != nil {
		return // it is closed
	}
	select {
	case <-e.drained:
	case <-e.over:
	}
}

// close stops the reading. What is in the ring then is the next agent's.
func (e *ends) close() {
	if e == nil {
		return
	}
	_ = e.ring.Close()
	for {
		select {
		case <-e.drained: // whose drain has seen the end
		case <-e.over:
			return
		}
	}
}

// ended calls Options.Ended.
func (d *Datapath) ended(v *bpfgen.NodeConn) {
	if d.opts.Ended == nil {
		return
	}
	d.endMu.Lock()
	defer d.endMu.Unlock()
	d.opts.Ended(d.mono.connection(v))
}
