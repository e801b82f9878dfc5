package fabric

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/cilium/ebpf"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// intervals are the maps of flow records: the one that programs write to, and
// those that have ended and are kept until somebody has them in a safe place.
// Each is pinned by its number, before programs see it and until it is
// discarded, so that records outlive the process.
//
//	begin: made ─▶ pinned ─▶ in map records ─▶ (another takes its place) ended ─▶ discarded
type intervals struct {
	mu      sync.Mutex
	spec    *ebpf.MapSpec
	running interval
	ended   []interval // oldest first
	// departed are interfaces that were gone before an interval ended, by the
	// number of the first such interval.
	departed map[uint32]uint64
}

type interval struct {
	number uint64
	start  time.Time
	m      *ebpf.Map
}

// recordBatch is how many records one system call reads. It must hold the
// longest chain of the hash table.
const recordBatch = 4096

// ErrNoInterval is what reading or discarding an interval that is not there
// returns.
var ErrNoInterval = errors.New("there is no such interval of flow records")

func (f *Fabric) intervalPin(number uint64) string {
	return filepath.Join(f.pins, "intervals", fmt.Sprintf("%016x", number))
}

// openIntervals adopts the intervals that are there, and begins the first if
// there is none.
func (f *Fabric) openIntervals(spec *ebpf.MapSpec, room int) error {
	iv := &f.intervals
	iv.mu.Lock()
	defer iv.mu.Unlock()
	iv.spec = spec.Copy()
	iv.spec.Name, iv.spec.Pinning = "interval", ebpf.PinNone
	if room > 0 {
		iv.spec.MaxEntries = uint32(room)
	}
	iv.departed = map[uint32]uint64{}
	found, err := f.pinnedIntervals()
	if err != nil {
		return err
	}
	var inPlace uint32
	if err := f.objs.Records.Lookup(uint32(0), &inPlace); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("look for the interval that runs: %w", err)
	}
	last := uint64(0)
	for _, i := range found {
		last = i.number
		info, err := i.m.Info()
		if err != nil {
			return fmt.Errorf("look at interval %d: %w", i.number, err)
		}
		id, _ := info.ID()
		switch {
		case inPlace != 0 && uint32(id) == inPlace:
			iv.running = i
		case iv.running.m == nil:
			iv.ended = append(iv.ended, i)
		default: // made, and never put in place
			if err := i.discard(f.intervalPin(i.number)); err != nil {
				return err
			}
		}
	}
	if iv.running.m == nil {
		return f.begin(last + 1)
	}
	// The process before may have died while it waited for the programs: wait
	// for them again.
	if err := f.objs.Records.Put(uint32(0), iv.running.m); err != nil {
		return fmt.Errorf("put the interval in place: %w", err)
	}
	return nil
}

// pinnedIntervals opens what is pinned, oldest first.
func (f *Fabric) pinnedIntervals() ([]interval, error) {
	dir := filepath.Join(f.pins, "intervals")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory for intervals: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read intervals: %w", err)
	}
	var out []interval
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		number, err := strconv.ParseUint(e.Name(), 16, 64)
		if err != nil {
			if err := os.Remove(path); err != nil {
				return nil, fmt.Errorf("remove stray pin: %w", err)
			}
			continue
		}
		m, err := ebpf.LoadPinnedMap(path, nil)
		if err != nil {
			return nil, fmt.Errorf("open interval %s: %w", path, err)
		}
		var about bpfgen.FabricRecord
		if err := m.Lookup(bpfgen.FabricRecordKey{}, &about); err != nil {
			return nil, errors.Join(fmt.Errorf("read interval %s: %w", path, err), m.Close())
		}
		out = append(out, interval{number, time.Unix(0, int64(about.First)), m})
	}
	slices.SortFunc(out, func(a, b interval) int { return cmp.Compare(a.number, b.number) })
	return out, nil
}

// begin makes an empty interval and puts it in place. When it returns no
// program writes to the former one.
func (f *Fabric) begin(number uint64) error {
	iv := &f.intervals
	i := interval{number: number, start: time.Now()}
	err := nl.AwaitMemory(func() (err error) {
		i.m, err = ebpf.NewMap(iv.spec)
		return err
	})
	if err != nil {
		return fmt.Errorf("make an interval of flow records: %w", err)
	}
	about := bpfgen.FabricRecord{Packets: number, First: uint64(i.start.UnixNano())}
	path := f.intervalPin(number)
	if err := i.m.Put(bpfgen.FabricRecordKey{}, about); err != nil {
		return errors.Join(fmt.Errorf("number interval %d: %w", number, err), i.m.Close())
	}
	if err := i.m.Pin(path); err != nil {
		return errors.Join(fmt.Errorf("pin interval %d: %w", number, err), i.m.Close())
	}
	// The update waits for the programs (maybe_wait_bpf_programs in
	// kernel/bpf/syscall.c).
	if err := f.objs.Records.Put(uint32(0), i.m); err != nil {
		return errors.Join(fmt.Errorf("put interval %d in place: %w", number, err), i.discard(path))
	}
	if iv.running.m != nil {
		iv.ended = append(iv.ended, iv.running)
	}
	iv.running = i
	return nil
}

// discard removes an interval that nobody writes to any more.
func (i interval) discard(pin string) error {
	if err := os.Remove(pin); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(fmt.Errorf("unpin interval %d: %w", i.number, err), i.m.Close())
	}
	if err := i.m.Close(); err != nil {
		return fmt.Errorf("close interval %d: %w", i.number, err)
	}
	return nil
}

// EndInterval ends the interval of flow records that runs, and begins the next.
// What has ended stays, even if the process dies, until DiscardInterval.
func (f *Fabric) EndInterval() error {
	f.life.RLock()
	defer f.life.RUnlock()
	f.intervals.mu.Lock()
	defer f.intervals.mu.Unlock()
	if f.objs.Records == nil || f.intervals.running.m == nil {
		return errors.New("end interval: the fabric is closed")
	}
	number := f.intervals.running.number
	// Whoever is gone by now has no packets in what comes.
	if err := f.noteDeparted(number); err != nil {
		return err
	}
	return f.begin(number + 1)
}

func (f *Fabric) noteDeparted(number uint64) error {
	var raw map[uint32]bpfgen.FabricLogged
	if err := readMap(f.objs.LoggedEnis, &raw); err != nil {
		return err
	}
	for i := range raw {
		if f.intervals.departed[i] != 0 {
			continue
		}
		there, err := f.attached(i)
		if err != nil {
			return err
		}
		if !there {
			f.intervals.departed[i] = number
		}
	}
	return nil
}

// EndedIntervals returns the numbers of the intervals that have ended and are
// not discarded, oldest first.
func (f *Fabric) EndedIntervals() []uint64 {
	f.intervals.mu.Lock()
	defer f.intervals.mu.Unlock()
	var out []uint64
	for _, i := range f.intervals.ended {
		out = append(out, i.number)
	}
	return out
}

// ReadInterval returns an interval that has ended: always the same, apart from
// who is attached.
func (f *Fabric) ReadInterval(number uint64) (*Interval, error) {
	f.life.RLock()
	defer f.life.RUnlock()
	f.intervals.mu.Lock()
	defer f.intervals.mu.Unlock()
	at := f.intervals.find(number)
	if f.objs.Records == nil || at < 0 {
		return nil, fmt.Errorf("read interval %d: %w", number, ErrNoInterval)
	}
	next := f.intervals.running
	if at+1 < len(f.intervals.ended) {
		next = f.intervals.ended[at+1]
	}
	out, err := f.readInterval(f.intervals.ended[at])
	if err != nil {
		return nil, err
	}
	out.End = next.start
	return out, nil
}

func (iv *intervals) find(number uint64) int {
	return slices.IndexFunc(iv.ended, func(i interval) bool { return i.number == number })
}

// RunningInterval returns what the interval that runs has so far. Programs
// write meanwhile, so a record may lack its latest packets.
func (f *Fabric) RunningInterval() (*Interval, error) {
	f.life.RLock()
	defer f.life.RUnlock()
	f.intervals.mu.Lock()
	defer f.intervals.mu.Unlock()
	if f.objs.Records == nil || f.intervals.running.m == nil {
		return nil, fmt.Errorf("read the running interval: %w", ErrNoInterval)
	}
	return f.readInterval(f.intervals.running)
}

// RunningSince returns when the interval that runs began.
func (f *Fabric) RunningSince() time.Time {
	f.intervals.mu.Lock()
	defer f.intervals.mu.Unlock()
	return f.intervals.running.start
}

// IntervalFill returns how many records the running interval has, and how many
// it has room for.
func (f *Fabric) IntervalFill() (records, room int, err error) {
	f.life.RLock()
	defer f.life.RUnlock()
	f.intervals.mu.Lock()
	defer f.intervals.mu.Unlock()
	if f.objs.Records == nil || f.intervals.running.m == nil {
		return 0, 0, fmt.Errorf("look at the running interval: %w", ErrNoInterval)
	}
	var about bpfgen.FabricRecord
	if err := f.intervals.running.m.Lookup(bpfgen.FabricRecordKey{}, &about); err != nil {
		return 0, 0, fmt.Errorf("look at the running interval: %w", err)
	}
	return int(about.Bytes), int(f.intervals.running.m.MaxEntries()) - 1, nil
}

func (f *Fabric) readInterval(i interval) (*Interval, error) {
	known, attached, err := f.known()
	if err != nil {
		return nil, err
	}
	now, err := f.now()
	if err != nil {
		return nil, err
	}
	wallNow := time.Now()
	wall := func(t uint64) time.Time { return wallNow.Add(time.Duration(int64(t - now))) }
	out := &Interval{Number: i.number, Start: i.start, Attached: attached}
	keys := make([]bpfgen.FabricRecordKey, recordBatch)
	values := make([]bpfgen.FabricRecord, recordBatch)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := i.m.BatchLookup(&cursor, keys, values, nil)
		last := errors.Is(err, ebpf.ErrKeyNotExist)
		if err != nil && !last {
			return nil, fmt.Errorf("read interval %d: %w", i.number, err)
		}
		for j := range n {
			if keys[j].Ifindex != 0 && known[keys[j].Ifindex] != nil {
				out.Records = append(out.Records, record(keys[j], values[j], known, wall))
			}
		}
		if last {
			break
		}
	}
	var skips map[bpfgen.FabricSkipKey]bpfgen.FabricSkip
	if err := readMap(f.objs.Skips, &skips); err != nil {
		return nil, err
	}
	for k, v := range skips {
		if k.Interval == i.number && known[k.Ifindex] != nil {
			out.Skipped = append(out.Skipped, Skipped{
				Interface: known[k.Ifindex], Egress: k.Direction == uint8(bpfgen.FabricDirectionEGRESS), Refused: k.Refused != 0, Packets: v.Packets, Bytes: v.Bytes,
			})
		}
	}
	return out, nil
}

// DiscardInterval forgets the oldest interval that has ended.
func (f *Fabric) DiscardInterval(number uint64) error {
	f.life.RLock()
	defer f.life.RUnlock()
	iv := &f.intervals
	iv.mu.Lock()
	defer iv.mu.Unlock()
	if f.objs.Records == nil || iv.find(number) != 0 {
		return fmt.Errorf("discard interval %d: %w, or it is not the oldest", number, ErrNoInterval)
	}
	if err := iv.ended[0].discard(f.intervalPin(number)); err != nil {
		return err
	}
	iv.ended = iv.ended[1:]
	var skips map[bpfgen.FabricSkipKey]bpfgen.FabricSkip
	if err := readMap(f.objs.Skips, &skips); err != nil {
		return err
	}
	for k := range skips {
		if k.Interval > number {
			continue
		}
		if err := f.objs.Skips.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("forget what interval %d skipped: %w", number, err)
		}
	}
	for i, since := range iv.departed {
		if since > number {
			continue
		}
		if err := f.objs.LoggedEnis.Delete(i); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("forget an interface that is gone: %w", err)
		}
		delete(iv.departed, i)
	}
	return nil
}

func (iv *intervals) close() error {
	iv.mu.Lock()
	defer iv.mu.Unlock()
	var errs []error
	for _, i := range append(iv.ended, iv.running) {
		if i.m != nil {
			errs = append(errs, i.m.Close())
		}
	}
	iv.ended, iv.running = nil, interval{}
	return errors.Join(errs...)
}

// highestLogged is the highest ifindex that records may be of.
func (f *Fabric) highestLogged() (int, error) {
	var raw map[uint32]bpfgen.FabricLogged
	if err := readMap(f.objs.LoggedEnis, &raw); err != nil {
		return 0, err
	}
	highest := 0
	for i := range raw {
		highest = max(highest, int(i))
	}
	return highest, nil
}
