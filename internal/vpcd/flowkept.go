package vpcd

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
	"github.com/underlay-cni/underlay/internal/vpcd/flow"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// maxKeptFlowFiles is how many intervals are kept for who asks, when they are in
// all files: nearly three days of minutes.
const maxKeptFlowFiles = 4096

// keptFlows are the records of intervals that have ended, a file an interval in
// a folder of vpcd's own, and how far they have come into the files of flow
// logs. A file is there whole or not at all, so a process that dies at any
// moment loses nothing: the next one goes on from here. It is not safe for
// concurrent use.
//
//	the fabric's ─▶ kept ─▶ in a window ─▶ in the files of all flow logs ─▶ forgotten, when newer ones fill the room
type keptFlows struct {
	dir       string
	intervals []keptInterval // oldest first
	progress  flowProgress
}

// keptInterval is what the name of a file says.
type keptInterval struct {
	seq        uint64 // counted from 1, without a gap
	number     uint64 // the fabric's, which begins anew with a new fabric
	start, end time.Time
	records    int // without those that say NODATA
}

// flowProgress is how far records have come into the files of flow logs.
type flowProgress struct {
	Window uint64          // the first interval that is in no window yet
	Long   uint64          // the first one whose ten minutes are not over
	Open   []flowWindow    // those that are not in all files, oldest first
	Lost   map[string]span // by flow log: what was given up since its last file
}

// flowWindow is a stretch of intervals that come into one file of each flow log.
type flowWindow struct {
	First, Last uint64 // intervals
	End         time.Time
	// LongFirst to LongLast are the intervals whose long records are due with
	// this window, none if LongLast is less; each is LongLength long.
	LongFirst, LongLast uint64
	LongLength          time.Duration
	Done                map[string]bool // flow logs that have it, or have nothing to say of it
}

// in reports whether a window is in the files of all flow logs that there are.
func (w *flowWindow) in(state *store.State) bool {
	for _, f := range state.FlowLogs.All() {
		if !w.Done[f.ID] {
			return false
		}
	}
	return true
}

const (
	progressFile = "progress.json"
	intervalName = "%016x-%016x-%016x-%016x-%x" + intervalKind
	intervalKind = ".interval"
	partialKind  = ".part"
)

// openKept opens the folder, or makes it.
func openKept(dir string) (*keptFlows, error) {
	k := &keptFlows{dir: dir, progress: flowProgress{Window: 1, Long: 1, Lost: map[string]span{}}}
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return nil, fmt.Errorf("make the folder of flow records: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read the folder of flow records: %w", err)
	}
	for _, e := range entries {
		var i keptInterval
		var start, end int64
		switch {
		case e.Name() == progressFile:
			b, err := os.ReadFile(filepath.Join(dir, progressFile))
			if err == nil {
				err = json.Unmarshal(b, &k.progress)
			}
			if err != nil {
				return nil, fmt.Errorf("read how far flow records are in files: %w; remove %s to have all that are kept written again", err, filepath.Join(dir, progressFile))
			}
		case strings.HasSuffix(e.Name(), partialKind): // of a process that died
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return nil, fmt.Errorf("remove what was half written: %w", err)
			}
		default:
			if _, err := fmt.Sscanf(e.Name(), intervalName, &i.seq, &i.number, &start, &end, &i.records); err != nil {
				continue // not ours
			}
			i.start, i.end = time.Unix(0, start), time.Unix(0, end)
			k.intervals = append(k.intervals, i)
		}
	}
	if k.progress.Lost == nil {
		k.progress.Lost = map[string]span{}
	}
	slices.SortFunc(k.intervals, func(a, b keptInterval) int { return cmp.Compare(a.seq, b.seq) })
	return k, nil
}

func (i keptInterval) name() string {
	return fmt.Sprintf(intervalName, i.seq, i.number, i.start.UnixNano(), i.end.UnixNano(), i.records)
}

// has reports whether an interval of the fabric is kept.
func (k *keptFlows) has(i *fabric.Interval) bool {
	return slices.ContainsFunc(k.intervals, func(o keptInterval) bool {
		return o.number == i.Number && o.start.UnixNano() == i.Start.UnixNano()
	})
}

// add keeps an interval that has ended. One that is kept stays as it is.
func (k *keptFlows) add(i *fabric.Interval, records []shownRecord) error {
	if k.has(i) {
		return nil
	}
	n := keptInterval{seq: k.progress.Window, number: i.Number, start: i.Start, end: i.End}
	if len(k.intervals) > 0 {
		n.seq = max(n.seq, k.intervals[len(k.intervals)-1].seq+1)
	}
	for j := range records {
		if records[j].Status != flow.NoData {
			n.records++
		}
	}
	if err := k.write(n.name(), func(w *bufio.Writer) error { return gob.NewEncoder(w).Encode(pack(records)) }); err != nil {
		return fmt.Errorf("keep the flow records of an interval: %w", err)
	}
	k.intervals = append(k.intervals, n)
	return nil
}

// write makes a file of the folder, or replaces it: whole, or not at all.
func (k *keptFlows) write(name string, fill func(*bufio.Writer) error) error {
	part := filepath.Join(k.dir, name+partialKind)
	out, err := os.Create(part)
	if err != nil {
		return err
	}
	b := bufio.NewWriter(out)
	if err = fill(b); err == nil {
		err = b.Flush()
	}
	if e := out.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(part, filepath.Join(k.dir, name))
	}
	if err != nil {
		if e := os.Remove(part); !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	return err
}

// save makes what progress says outlive the process.
func (k *keptFlows) save() error {
	b, err := json.Marshal(&k.progress)
	if err != nil {
		panic("vpcd: " + err.Error()) // numbers and times always encode
	}
	if err := k.write(progressFile, func(w *bufio.Writer) error { _, err := w.Write(b); return err }); err != nil {
		return fmt.Errorf("note how far flow records are in files: %w", err)
	}
	return nil
}

// closeWindows closes the windows whose intervals are all kept: what is not kept
// yet began at since. A window is by the clock, as the first interval in it
// began, or less when there are very many records.
func (k *keptFlows) closeWindows(since time.Time, length, long time.Duration) error {
	before := len(k.progress.Open)
	for {
		pending := k.between(k.progress.Window, math.MaxUint64)
		if len(pending) == 0 {
			break
		}
		began, n, records := pending[0].start.Truncate(length), 0, 0
		for n < len(pending) && records < maxFileRecords && pending[n].start.Truncate(length).Equal(began) {
			records += pending[n].records
			n++
		}
		if n == len(pending) && records < maxFileRecords && since.Truncate(length).Equal(began) {
			break
		}
		last := pending[n-1]
		w := flowWindow{First: pending[0].seq, Last: last.seq, End: last.end, LongFirst: k.progress.Long, LongLength: long}
		// Long records are due when the next interval is of another ten minutes.
		all := k.between(k.progress.Long, math.MaxUint64)
		for at, i := range all {
			next := since
			if at+1 < len(all) {
				next = all[at+1].start
			}
			if i.seq <= last.seq && !i.start.Truncate(long).Equal(next.Truncate(long)) {
				w.LongLast = i.seq
			}
		}
		k.progress.Open = append(k.progress.Open, w)
		k.progress.Window, k.progress.Long = last.seq+1, max(k.progress.Long, w.LongLast+1)
	}
	if len(k.progress.Open) == before {
		return nil
	}
	return k.save()
}

// giveUp notes for all flow logs but some that they lost what was between two
// moments.
func (k *keptFlows) giveUp(start, end time.Time, state *store.State, but map[string]bool) {
	for _, f := range state.FlowLogs.All() {
		if but[f.ID] {
			continue
		}
		s, ok := k.progress.Lost[f.ID]
		if !ok {
			s.Start = start
		}
		s.End = end
		k.progress.Lost[f.ID] = s
	}
}

// between are the intervals from one to another, both included.
func (k *keptFlows) between(first, last uint64) []keptInterval {
	from, _ := slices.BinarySearchFunc(k.intervals, first, func(i keptInterval, seq uint64) int { return cmp.Compare(i.seq, seq) })
	to, found := slices.BinarySearchFunc(k.intervals, last, func(i keptInterval, seq uint64) int { return cmp.Compare(i.seq, seq) })
	if found {
		to++
	}
	return k.intervals[from:max(from, to)]
}

// read returns the records of an interval.
func (k *keptFlows) read(i keptInterval) ([]shownRecord, error) {
	f, err := os.Open(filepath.Join(k.dir, i.name()))
	if err != nil {
		return nil, fmt.Errorf("read kept flow records: %w", err)
	}
	defer f.Close()
	var p packedRecords
	if err := gob.NewDecoder(bufio.NewReader(f)).Decode(&p); err != nil {
		return nil, fmt.Errorf("read kept flow records in %s: %w", f.Name(), err)
	}
	return p.unpack()
}

// latest returns the newest n records that say something, or some more. The
// error tells of those that cannot be read.
func (k *keptFlows) latest(n int) ([]shownRecord, error) {
	from := len(k.intervals)
	for found := 0; from > 0 && found < n; from-- {
		found += k.intervals[from-1].records
	}
	var out []shownRecord
	var errs []error
	for _, i := range k.intervals[from:] {
		if i.records == 0 {
			continue
		}
		records, err := k.read(i)
		errs = append(errs, err)
		out = append(out, records...)
	}
	return out, errors.Join(errs...)
}

// prune removes intervals that no file needs any more and that are not among
// the latest n records.
func (k *keptFlows) prune(n int) error {
	needed := min(k.progress.Window, k.progress.Long)
	for _, w := range k.progress.Open {
		needed = min(needed, w.First)
		if w.LongLast >= w.LongFirst {
			needed = min(needed, w.LongFirst)
		}
	}
	newer, files := 0, 0
	var stay []keptInterval
	for at := len(k.intervals) - 1; at >= 0; at-- {
		i := k.intervals[at]
		if i.seq < needed && (i.records == 0 || newer >= n || files >= maxKeptFlowFiles) {
			if err := os.Remove(filepath.Join(k.dir, i.name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("remove old flow records: %w", err)
			}
			continue
		}
		newer, files = newer+i.records, files+1
		stay = append(stay, i)
	}
	slices.Reverse(stay)
	k.intervals = stay
	return nil
}

// packedRecords are records as files have them: numbers, and once for all of
// them what is the same for all of an interface.
type packedRecords struct {
	Of      []shownRecord // as about makes them
	Records []packedRecord
}

type packedRecord struct {
	Of                                    int
	Start, End                            int64 // Unix, ns
	Status, Action, RefusedBy             string
	Egress                                bool
	Source, Destination                   [2]uint64 // both 0: none
	SourcePort, DestinationPort, Protocol int
	Packets, Bytes                        int64
	TCPFlags, TrafficPath                 int
}

func pack(records []shownRecord) packedRecords {
	p := packedRecords{Records: make([]packedRecord, len(records))}
	at := map[shownRecord]int{}
	for i := range records {
		r := &records[i]
		of := *r
		of.Record, of.running = r.OfInterface(), false
		n, ok := at[of]
		if !ok {
			n = len(p.Of)
			at[of] = n
			p.Of = append(p.Of, of)
		}
		p.Records[i] = packedRecord{
			Of: n, Start: r.Start.UnixNano(), End: r.End.UnixNano(), Status: r.Status, Action: r.Action, RefusedBy: r.RefusedBy, Egress: r.Egress,
			Source: packAddr(r.Source), Destination: packAddr(r.Destination), SourcePort: r.SourcePort, DestinationPort: r.DestinationPort, Protocol: r.Protocol,
			Packets: r.Packets, Bytes: r.Bytes, TCPFlags: r.TCPFlags, TrafficPath: r.TrafficPath,
		}
	}
	return p
}

func (p *packedRecords) unpack() ([]shownRecord, error) {
	out := make([]shownRecord, len(p.Records))
	for i, r := range p.Records {
		if r.Of < 0 || r.Of >= len(p.Of) {
			return nil, fmt.Errorf("unpack flow records: %d interfaces, and a record of number %d", len(p.Of), r.Of)
		}
		s := p.Of[r.Of]
		s.Start, s.End, s.Status, s.Action, s.RefusedBy, s.Egress = time.Unix(0, r.Start), time.Unix(0, r.End), r.Status, r.Action, r.RefusedBy, r.Egress
		s.Source, s.Destination, s.SourcePort, s.DestinationPort, s.Protocol = unpackAddr(r.Source), unpackAddr(r.Destination), r.SourcePort, r.DestinationPort, r.Protocol
		s.Packets, s.Bytes, s.TCPFlags, s.TrafficPath = r.Packets, r.Bytes, r.TCPFlags, r.TrafficPath
		out[i] = s
	}
	return out, nil
}

// packAddr is an address, IPv4 as mapped into IPv6.
func packAddr(a netip.Addr) [2]uint64 {
	if !a.IsValid() {
		return [2]uint64{}
	}
	b := a.As16()
	return [2]uint64{binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])}
}

func unpackAddr(p [2]uint64) netip.Addr {
	if p == [2]uint64{} {
		return netip.Addr{} // "::" sends no packet
	}
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], p[0])
	binary.BigEndian.PutUint64(b[8:], p[1])
	return netip.AddrFrom16(b).Unmap()
}
