package datapath

import (
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/datapath/bpfgen"
)

// Timeouts are after how long without a packet a connection is over, where the
// pod's ENI does not say otherwise (ENI.Idle). The first three are those of EC2's
// ConnectionTrackingSpecification; 0: AWS's default.
type Timeouts struct {
	TCPEstablished time.Duration // 432000 s, on Nitro v6 types 350 s
	UDP            time.Duration // 30 s
	UDPStream      time.Duration // 180 s: more than one request and response
	TCPOpening     time.Duration // 60 s: not answered, or the answer not acknowledged
	TCPClosed      time.Duration // 10 s: a RST, or a FIN from both ends
	ICMP           time.Duration // 30 s: queries
	Other          time.Duration // 600 s: other protocols
}

// constants are those of the programs that differ from their defaults.
func (t Timeouts) constants() map[string]uint32 {
	out := map[string]uint32{}
	for name, d := range map[string]time.Duration{
		bpfgen.NodeVarTcpEstablishedTimeout: t.TCPEstablished, bpfgen.NodeVarUdpTimeout: t.UDP, bpfgen.NodeVarUdpStreamTimeout: t.UDPStream,
		bpfgen.NodeVarTcpOpeningTimeout: t.TCPOpening, bpfgen.NodeVarTcpClosedTimeout: t.TCPClosed,
		bpfgen.NodeVarIcmpTimeout: t.ICMP, bpfgen.NodeVarOtherTimeout: t.Other,
	} {
		if d != 0 {
			out[name] = wholeSeconds(d)
		}
	}
	return out
}

// wholeSeconds is a time as the programs count it; 0 says that it is not set.
func wholeSeconds(d time.Duration) uint32 {
	if d <= 0 {
		return 0
	}
	return uint32(max(d/time.Second, 1))
}

// Provenance says who forwards a connection, for life.
type Provenance uint8

const (
	Stack  = Provenance(bpfgen.NodeProvenancePROVENANCE_STACK)
	Direct = Provenance(bpfgen.NodeProvenancePROVENANCE_DIRECT)
)

func (p Provenance) String() string {
	switch p {
	case Stack:
		return "stack"
	case Direct:
		return "direct"
	}
	return fmt.Sprintf("provenance %d", uint8(p))
}

// ConnState is where a connection is in its life.
type ConnState uint8

const (
	ConnOpening     = ConnState(bpfgen.NodeConnStateCONN_OPENING)
	ConnEstablished = ConnState(bpfgen.NodeConnStateCONN_ESTABLISHED)
	ConnClosed      = ConnState(bpfgen.NodeConnStateCONN_CLOSED)
)

func (s ConnState) String() string {
	switch s {
	case ConnOpening:
		return "opening"
	case ConnEstablished:
		return "established"
	case ConnClosed:
		return "closed"
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// The gates of a pod: indexes of ConnEnd.Gates.
const (
	GateGroups = int(bpfgen.NodeGateGATE_GROUPS)
	GateNetpol = int(bpfgen.NodeGateGATE_NETPOL)
)

// GateVerdict is what one gate of one pod said of a connection.
type GateVerdict struct {
	Judged  bool   // false: it was not asked, and all else is zero
	Allowed bool   // let through, for whatever reason
	Audit   bool   // only because the gate enforces nothing
	Rule    uint32 // that decided; 0: the default
	Epoch   uint32 // of the table that the rule was in
}

// ConnEnd is one end of a connection.
type ConnEnd struct {
	Addr netip.Addr
	Port uint16 // 0: the protocol has none
	// HostIfIndex is that of the end's pod on this node; 0: it is none. A pod's
	// connection that netfilter translates is two, and on either the pod's.
	HostIfIndex int
	// What the end sent: packets on the wire, bytes of IP. A connection that is
	// only the other side of a translation has none.
	Packets, Bytes uint64
	TCPFlags       uint8          // all that it sent
	Gates          [2]GateVerdict // of the end's pod
}

// Connection is an entry of conntrack: a flow as it looks on one side of
// netfilter's translation, if it is translated.
type Connection struct {
	Protocol uint8 // IPPROTO_…
	// Opener sent the first packet that was seen.
	Opener, Responder ConnEnd
	ICMPID            uint16 // of a query
	ICMPType          uint8  // of the query, or of what is none
	ICMPCode          uint8  // of what is no query
	Provenance        Provenance
	State             ConnState
	Local             bool   // direct, and both ends are pods here in one subnet
	Midflow           bool   // the beginning was not seen
	Denied            bool   // a gate refused it: Packets are those that were dropped
	ID                uint64 // of two of the same tuple: the later has the higher
	Created, Last     time.Time
	Timeout           time.Duration // of idleness, after which it is over
	ENIIfIndex        int           // by which it leaves the node; 0: by none, or not known
}

// Connections iterates over the conntrack, in no order. What comes or goes
// meanwhile may be missed or seen twice; when it has come to the end, Options.Ended
// knows of all that went before.
func (d *Datapath) Connections() iter.Seq2[Connection, error] {
	return func(yield func(Connection, error) bool) {
		for batch, err := range d.conns() {
			if err != nil {
				yield(Connection{}, err)
				return
			}
			for i := range batch {
				if !yield(d.mono.connection(&batch[i]), nil) {
					return
				}
			}
		}
		d.ends.drain()
	}
}

// ConntrackID names the table of connections: another table, as after a boot or
// an uninstallation, has another.
func (d *Datapath) ConntrackID() (string, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	info, err := d.objs.Conns.Info()
	if err != nil {
		return "", fmt.Errorf("look at the map of connections: %w", err)
	}
	id, ok := info.ID()
	if !ok {
		return "", errors.New("the kernel gives maps no IDs: Linux 4.13 is too old")
	}
	return fmt.Sprintf("%s/%d", strings.TrimSpace(string(boot)), id), nil
}

// sweepBatch bounds how many entries are read, and removed, in one go.
const sweepBatch = 256

// connBatch is a part of a hash table of connections; it is valid until the next one.
type connBatch[V any] struct {
	keys   []bpfgen.NodeConnKey
	values []V
}

// connBatches iterates over such a table, in no order.
func connBatches[V any](m *ebpf.Map) iter.Seq2[connBatch[V], error] {
	return func(yield func(connBatch[V], error) bool) {
		size := sweepBatch
		keys, values := make([]bpfgen.NodeConnKey, size), make([]V, size)
		var cursor ebpf.MapBatchCursor
		for {
			n, err := m.BatchLookup(&cursor, keys, values, nil)
			if errors.Is(err, unix.ENOSPC) {
				// One bucket holds more than fits.
				size *= 2
				keys, values = make([]bpfgen.NodeConnKey, size), make([]V, size)
				continue
			}
			if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				yield(connBatch[V]{}, fmt.Errorf("read the map of connections: %w", err))
				return
			}
			if n > 0 && !yield(connBatch[V]{keys[:n], values[:n]}, nil) || err != nil {
				return
			}
		}
	}
}

// mono converts CLOCK_MONOTONIC, in which the programs count, to time.Time.
type mono struct{ zero time.Time }

func newMono() mono { return mono{time.Now().Add(-time.Duration(monoNow())).Round(0)} }

func monoNow() uint64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // has no failure
	return uint64(ts.Nano())
}

func (m mono) at(ns uint64) time.Time { return m.zero.Add(time.Duration(ns)) }

func (m mono) connection(v *bpfgen.NodeConn) Connection {
	k := &v.Key
	const icmp, icmp6 = unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6
	flag := func(f bpfgen.NodeConnFlag) bool { return v.Gates.Flags&uint8(f) != 0 }
	c := Connection{
		Protocol:   k.Protocol,
		Provenance: Provenance(v.Gates.Provenance),
		State:      ConnState(v.State),
		Local:      flag(bpfgen.NodeConnFlagCONN_LOCAL),
		Midflow:    flag(bpfgen.NodeConnFlagCONN_MIDFLOW),
		Denied:     flag(bpfgen.NodeConnFlagCONN_DENIED),
		ID:         v.CreatedNs,
		Created:    m.at(v.CreatedNs), Last: m.at(v.LastNs),
		Timeout:    time.Duration(v.TimeoutS) * time.Second,
		ENIIfIndex: int(v.EniIfindex),
	}
	end := func(i uint8) ConnEnd {
		e := ConnEnd{
			Addr: netip.AddrFrom16(k.Addr[i].B).Unmap(), Port: k.Port[i], HostIfIndex: int(v.Ifindex[i]),
			Packets: v.Packets[i], Bytes: v.Bytes[i], TCPFlags: v.TcpFlags[i],
		}
		for g := range e.Gates {
			if v.Gates.Judged[i]>>g&1 != 0 {
				e.Gates[g] = GateVerdict{
					Judged: true, Allowed: v.Gates.Allowed[i]>>g&1 != 0 || v.Audit[i]>>g&1 != 0, Audit: v.Audit[i]>>g&1 != 0,
					Rule: v.Verdict[i][g].Rule, Epoch: v.Verdict[i][g].Epoch,
				}
			}
		}
		return e
	}
	opener := v.Gates.Opener & 1
	c.Opener, c.Responder = end(opener), end(1-opener)
	if k.Protocol == icmp || k.Protocol == icmp6 {
		c.Opener.Port, c.Responder.Port = 0, 0
		if k.Asker != 0 {
			c.ICMPID, c.ICMPType = k.Port[0], uint8(k.Port[1])
		} else {
			c.ICMPType, c.ICMPCode = uint8(k.Port[0]), uint8(k.Port[1])
		}
	}
	return c
}

// The sweeper goes through the table every sweepEvery and removes what is over.
const sweepEvery = 5 * time.Second

func (d *Datapath) startSweeper() error {
	stop, ended := make(chan struct{}), make(chan struct{})
	if d.opts.Ended != nil {
		r, err := ringbuf.NewReader(d.objs.Ends)
		if err != nil {
			return fmt.Errorf("read the ring of connections that ended: %w", err)
		}
		d.ends = &ends{ring: r, drained: make(chan struct{}), over: make(chan struct{})}
		go d.readEnds(d.ends)
	}
	go func() {
		defer close(ended)
		tick := time.NewTicker(sweepEvery)
		defer tick.Stop()
		for {
			// At once as well: the programs of this process have counted no entry yet.
			if _, err := d.sweepConns(monoNow()); err != nil {
				d.log.Warn("connections that are over are left until the next sweep", "err", err)
			}
			select {
			case <-tick.C:
				d.ends.drain()
			case <-stop:
				return
			}
		}
	}()
	d.stopSweeper = sync.OnceFunc(func() {
		close(stop)
		<-ended
		d.ends.close()
	})
	return nil
}

// connFill is what the latest sweep saw.
type connFill struct {
	entries, direct int
}

// shares are what the programs count of entries by their pod's slot, as one sweep
// finds and leaves it: bpf/node_share.h.
type shares struct {
	slots   []uint32
	counts  []bpfgen.NodeShare // before the sweep
	entries []uint64           // that the sweep has left
}

func (d *Datapath) readShares() (*shares, error) {
	n := d.objs.Shares.MaxEntries()
	s := &shares{slots: make([]uint32, n), counts: make([]bpfgen.NodeShare, n), entries: make([]uint64, n)}
	var cursor ebpf.MapBatchCursor
	if _, err := d.objs.Shares.BatchLookup(&cursor, s.slots, s.counts, nil); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil, fmt.Errorf("read the shares of the map of connections: %w", err)
	}
	return s, nil
}

// keep counts an entry that stays.
func (s *shares) keep(v *bpfgen.NodeConn) {
	s.entries[0]++
	if v.Share != 0 && int(v.Share) < len(s.entries) {
		s.entries[v.Share]++
	}
}

// writeShares has the programs go on from what the sweep has left. What began
// meanwhile counts, also if the sweep saw it: too much until the next, never too
// little.
func (d *Datapath) writeShares(s *shares) error {
	swept := make([]uint64, len(s.slots))
	for i, slot := range s.slots {
		swept[i] = s.counts[i].Begun - s.counts[i].Evicted - s.entries[slot]
	}
	if _, err := d.objs.SharesSwept.BatchUpdate(s.slots, swept, nil); err != nil {
		return fmt.Errorf("write the shares of the map of connections: %w", err)
	}
	return nil
}

// ifaceIndexes are the host ifindexes of endpoints.
func (d *Datapath) ifaceIndexes() (map[uint32]bool, error) {
	out := map[uint32]bool{}
	var index uint32
	var v bpfgen.NodeIface
	it := d.objs.Ifaces.Iterate()
	for it.Next(&index, &v) {
		out[index] = true
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read the map of interfaces: %w", err)
	}
	return out, nil
}

// sweepConns removes the connections that are over at a time of
// CLOCK_MONOTONIC, and those of pods that are gone, and tells how many there were.
func (d *Datapath) sweepConns(now uint64) (removed int, err error) {
	here, err := d.ifaceIndexes()
	if err != nil {
		return 0, err
	}
	share, err := d.readShares()
	if err != nil {
		return 0, err
	}
	var fill connFill
	removed, err = d.sweepWays(now, share, &fill)
	if err != nil {
		return removed, err
	}
	gone := func(index uint32) bool { return index != 0 && !here[index] }
	var over []bpfgen.NodeConnKey
	// First read, then removed: the kernel's iteration starts anew where an entry
	// vanishes under it.
	for batch, err := range connBatches[bpfgen.NodeConn](d.objs.Conns) {
		if err != nil {
			return removed, err
		}
		for i := range batch.keys {
			v := &batch.values[i]
			if connOver(v, now) || gone(v.Ifindex[0]) || gone(v.Ifindex[1]) {
				over = append(over, batch.keys[i])
				continue
			}
			fill.entries++
			share.keep(v)
			if Provenance(v.Gates.Provenance) == Direct {
				fill.direct++
			}
		}
	}
	for i := range over {
		n, err := d.sweepConn(&over[i], now)
		removed += n
		if err != nil {
			return removed, err
		}
	}
	d.ends.drain()
	d.mu.Lock()
	d.fill = fill
	d.mu.Unlock()
	return removed, d.writeShares(share)
}

func connOver(v *bpfgen.NodeConn, now uint64) bool {
	return v.LastNs+uint64(v.TimeoutS)*uint64(time.Second) < now
}
