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
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric/bpfgen"
)

// intervals are the maps of flow records: the one that programs write to, and
// those that have ended and are kept until somebody has them in a safe place.
// Each is pinned by its number, before programs see it and until it is
// discarded, so that records outlive the process. An interval has two maps, one
// for IPv4 and one for IPv6, which is put in place first: if only that one is,
// the process died in between, and the next goes on.
//
//	begin: made ─▶ pinned ─▶ in maps records6 and records ─▶ (another takes its place) ended ─▶ discarded
type intervals struct {
	mu      sync.Mutex
	spec    *ebpf.MapSpec
	spec6   *ebpf.MapSpec
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
	six    *ebpf.Map // records of IPv6
}

// suffix6 is behind an interval's number in the name of the pin of its records
// of IPv6.
const suffix6 = "-6"

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
func (f *Fabric) openIntervals(spec, spec6 *ebpf.MapSpec, room int) error {
	iv := &f.intervals
	iv.mu.Lock()
	defer iv.mu.Unlock()
	iv.spec, iv.spec6 = spec.Copy(), spec6.Copy()
	for _, s := range []*ebpf.MapSpec{iv.spec, iv.spec6} {
		s.Name, s.Pinning = "interval", ebpf.PinNone
		if room > 0 {
			s.MaxEntries = uint32(room)
		}
	}
	iv.departed = map[uint32]uint64{}
	found, err := f.pinnedIntervals()
	if err != nil {
		return err
	}
	var inPlace uint32
	if err := f.objs.Records6.Lookup(uint32(0), &inPlace); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("look for the interval that runs: %w", err)
	}
	last := uint64(0)
	for _, i := range found {
		last = i.number
		info, err := i.six.Info()
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
	return f.putInterval(iv.running)
}

// putInterval makes programs write to an interval. The updates wait for them
// (maybe_wait_bpf_programs in kernel/bpf/syscall.c).
func (f *Fabric) putInterval(i interval) error {
	if err := f.objs.Records6.Put(uint32(0), i.six); err != nil {
		return fmt.Errorf("put interval %d in place: %w", i.number, err)
	}
	if err := f.objs.Records.Put(uint32(0), i.m); err != nil {
		return fmt.Errorf("put interval %d in place: %w", i.number, err)
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
	names := map[string]bool{}
	for _, e := range entries {
		names[e.Name()] = true
	}
	for name := range names {
		path := filepath.Join(dir, name)
		number, err := strconv.ParseUint(strings.TrimSuffix(name, suffix6), 16, 64)
		// Of IPv4 it is pinned last, and unpinned first.
		if err != nil || strings.HasSuffix(name, suffix6) && !names[strings.TrimSuffix(name, suffix6)] {
			if err := os.Remove(path); err != nil {
				return nil, fmt.Errorf("remove stray pin: %w", err)
			}
			continue
		}
		if strings.HasSuffix(name, suffix6) {
			continue
		}
		i := interval{number: number}
		for _, m := range []struct {
			path string
			to   **ebpf.Map
		}{{path, &i.m}, {path + suffix6, &i.six}} {
			if *m.to, err = ebpf.LoadPinnedMap(m.path, nil); err != nil {
				return nil, errors.Join(fmt.Errorf("open interval %s: %w", m.path, err), i.close())
			}
		}
		var about bpfgen.FabricRecord
		if err := i.m.Lookup(bpfgen.FabricRecordKey{}, &about); err != nil {
			return nil, errors.Join(fmt.Errorf("read interval %s: %w", path, err), i.close())
		}
		i.start = time.Unix(0, int64(about.First))
		out = append(out, i)
	}
	slices.SortFunc(out, func(a, b interval) int { return cmp.Compare(a.number, b.number) })
	return out, nil
}

// begin makes an empty interval and puts it in place. When it returns no
// program writes to the former one.
func (f *Fabric) begin(number uint64) error {
	iv := &f.intervals
	i := interval{number: number, start: time.Now()}
	for _, m := range []struct {
		spec *ebpf.MapSpec
		to   **ebpf.Map
	}{{iv.spec, &i.m}, {iv.spec6, &i.six}} {
		err := nl.AwaitMemory(func() (err error) {
			*m.to, err = ebpf.NewMap(m.spec)
			return err
		})
		if err != nil {
			return errors.Join(fmt.Errorf("make an interval of flow records: %w", err), i.close())
		}
	}
	about := bpfgen.FabricRecord{Packets: number, First: uint64(i.start.UnixNano())}
	path := f.intervalPin(number)
	if err := errors.Join(i.m.Put(bpfgen.FabricRecordKey{}, about), i.six.Put(bpfgen.FabricRecordKey6{}, about)); err != nil {
		return errors.Join(fmt.Errorf("number interval %d: %w", number, err), i.close())
	}
	err := i.six.Pin(path + suffix6)
	if err == nil {
		err = i.m.Pin(path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("pin interval %d: %w", number, err), i.close())
	}
	if err := f.putInterval(i); err != nil {
		if iv.running.m != nil {
			err = errors.Join(err, f.putInterval(iv.running))
		}
		return errors.Join(err, i.discard(path))
	}
	if iv.running.m != nil {
		iv.ended = append(iv.ended, iv.running)
	}
	iv.running = i
	return nil
}

// discard removes an interval that nobody writes to any more.
func (i interval) discard(pin string) error {
	for _, p := range []string{pin, pin + suffix6} {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return errors.Join(fmt.Errorf("unpin interval %d: %w", i.number, err), i.close())
		}
	}
	return i.close()
}

func (i interval) close() error {
	var errs []error
	for _, m := range []*ebpf.Map{i.m, i.six} {
		if m != nil {
			errs = append(errs, m.Close())
		}
	}
	if err := errors.Join(errs...); err != nil {
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
// it has room for: of IPv4 or of IPv6, whichever has less room left.
func (f *Fabric) IntervalFill() (records, room int, err error) {
	f.life.RLock()
	defer f.life.RUnlock()
	f.intervals.mu.Lock()
	defer f.intervals.mu.Unlock()
	if f.objs.Records == nil || f.intervals.running.m == nil {
		return 0, 0, fmt.Errorf("look at the running interval: %w", ErrNoInterval)
	}
	var about, about6 bpfgen.FabricRecord
	running := f.intervals.running
	if err := errors.Join(running.m.Lookup(bpfgen.FabricRecordKey{}, &about), running.six.Lookup(bpfgen.FabricRecordKey6{}, &about6)); err != nil {
		return 0, 0, fmt.Errorf("look at the running interval: %w", err)
	}
	room, room6 := int(running.m.MaxEntries())-1, int(running.six.MaxEntries())-1
	if int(about6.Bytes)*room > int(about.Bytes)*room6 {
		return int(about6.Bytes), room6, nil
	}
	return int(about.Bytes), room, nil
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
	err = errors.Join(
		eachRecord(i.m, func(k bpfgen.FabricRecordKey, v bpfgen.FabricRecord) {
			if k.Ifindex != 0 && known[k.Ifindex] != nil {
				out.Records = append(out.Records, record(k, v, known, wall))
			}
		}),
		eachRecord(i.six, func(k bpfgen.FabricRecordKey6, v bpfgen.FabricRecord) {
			if k.Ifindex != 0 && known[k.Ifindex] != nil {
				out.Records = append(out.Records, record6(k, v, known, wall))
			}
		}),
	)
	if err != nil {
		return nil, fmt.Errorf("read interval %d: %w", i.number, err)
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

// eachRecord calls fn with every record of an interval's map.
func eachRecord[K any](m *ebpf.Map, fn func(K, bpfgen.FabricRecord)) error {
	keys := make([]K, recordBatch)
	values := make([]bpfgen.FabricRecord, recordBatch)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		last := errors.Is(err, ebpf.ErrKeyNotExist)
		if err != nil && !last {
			return err
		}
		for j := range n {
			fn(keys[j], values[j])
		}
		if last {
			return nil
		}
	}
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
		errs = append(errs, i.close())
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
