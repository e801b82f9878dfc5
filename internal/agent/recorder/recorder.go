package recorder

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/underlay-cni/underlay/internal/flowlog"
)

// Options configure a Recorder.
type Options struct {
	// Dir is where the files are; "": none are written.
	Dir string
	// Format is that of the lines; the zero value: JSON.
	Format *flowlog.Format
	// Interval is how long a record collects; 0: a minute.
	Interval time.Duration
	// FileBytes is the size at which a new file begins, Files how many are kept;
	// 0: 64 MiB and 4.
	FileBytes int64
	Files     int
	// Recent is how many records are held for who asks; 0: 4096.
	Recent int
	// Boot names the kernel's boot, whose counters these are.
	Boot string
	// Node is what records say of the node.
	Node func() flowlog.Node
	// Sample reads the datapath. Taken is called when the sample is recorded: the
	// refused packets in it are then not to be told again.
	Sample func() (s flowlog.Sample, taken func(), err error)
	Logger *slog.Logger
}

// Totals are sums over all records since the process began.
type Totals struct {
	Records, Packets, Bytes map[Kind]uint64
	Skipped                 uint64 // packets
	Failures                uint64 // samples or writes that failed; they are made up for
}

// Kind is what totals are kept apart by.
type Kind struct {
	Direction flowlog.Direction
	Accepted  bool
}

// Recorder makes and keeps a node's flow records.
type Recorder struct {
	o Options

	// mu guards the fields below.
	mu     sync.Mutex
	files  *files // nil: none are written
	log    flowlog.Log
	recent []flowlog.Record // the latest, oldest first
	totals Totals
	failed string // the latest failure, "" after a success
}

// New takes a folder of records over, where its predecessor left off.
func New(o Options) (*Recorder, error) {
	if o.Interval == 0 {
		o.Interval = time.Minute
	}
	if o.FileBytes == 0 {
		o.FileBytes = 64 << 20
	}
	if o.Files == 0 {
		o.Files = 4
	}
	if o.Recent == 0 {
		o.Recent = 4096
	}
	r := &Recorder{o: o, totals: Totals{Records: map[Kind]uint64{}, Packets: map[Kind]uint64{}, Bytes: map[Kind]uint64{}}}
	if o.Dir == "" {
		return r, nil
	}
	f, err := openFiles(o.Dir, o.FileBytes, o.Files, o.Boot)
	if err != nil {
		return nil, fmt.Errorf("open the folder of flow records: %w", err)
	}
	r.files, r.log = f, f.at.Log
	return r, nil
}

// Run records until ctx ends, and once more then.
func (r *Recorder) Run(ctx context.Context) error {
	tick := time.NewTicker(r.o.Interval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			r.step()
		case <-ctx.Done():
			r.step()
			r.mu.Lock()
			defer r.mu.Unlock()
			if r.files == nil {
				return nil
			}
			return r.files.close()
		}
	}
}

// step records an interval. What fails is made up for by the next.
func (r *Recorder) step() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.record(); err != nil {
		r.totals.Failures++
		if err.Error() != r.failed {
			r.o.Logger.Warn("flow records not written, the next interval makes up for it", "dir", r.o.Dir, "err", err)
		}
		r.failed = err.Error()
		return
	}
	r.failed = ""
}

func (r *Recorder) record() error {
	s, taken, err := r.o.Sample()
	if err != nil {
		return err
	}
	next := r.log // what it shares with that is not changed
	records, change := next.Advance(s)
	if r.files != nil {
		if err := r.files.write(r.header(), r.lines(records), next, change); err != nil {
			return err
		}
	}
	r.log = next
	taken()
	for i := range records {
		rec := &records[i]
		switch rec.Status {
		case flowlog.OK:
			k := Kind{rec.Direction, rec.Accepted}
			r.totals.Records[k]++
			r.totals.Packets[k] += rec.Packets
			r.totals.Bytes[k] += rec.Bytes
		case flowlog.SkipData:
			r.totals.Skipped += rec.Packets
		}
	}
	r.recent = append(r.recent, slices.DeleteFunc(slices.Clone(records), func(rec flowlog.Record) bool { return rec.Status == flowlog.NoData })...)
	if n := len(r.recent) - r.o.Recent; n > 0 {
		r.recent = slices.Clone(r.recent[n:])
	}
	return nil
}

func (r *Recorder) header() string {
	if r.o.Format == nil {
		return ""
	}
	return r.o.Format.Header()
}

func (r *Recorder) lines(records []flowlog.Record) []byte {
	var b bytes.Buffer
	n := r.o.Node()
	asJSON := json.NewEncoder(&b)
	for i := range records {
		if r.o.Format != nil {
			b.WriteString(r.o.Format.Line(n, records[i]) + "\n")
		} else if err := asJSON.Encode(records[i].Object(n)); err != nil {
			panic("encode a flow record: " + err.Error()) // all of it is plain data
		}
	}
	return b.Bytes()
}

// Recent returns the latest records whose interval has ended at or after since,
// oldest first, and behind them what the running interval has so far.
func (r *Recorder) Recent(since time.Time) (ended, running []flowlog.Record, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, rec := range r.recent {
		if !rec.End.Before(since) {
			ended = append(ended, rec)
		}
	}
	s, _, err := r.o.Sample()
	if err != nil {
		return ended, nil, err
	}
	now := r.log
	for _, rec := range now.Step(s) {
		if rec.Status == flowlog.OK {
			running = append(running, rec)
		}
	}
	return ended, running, nil
}

// Totals returns the sums, and the latest failure if it was not made up for yet.
func (r *Recorder) Totals() (Totals, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := Totals{Records: map[Kind]uint64{}, Packets: map[Kind]uint64{}, Bytes: map[Kind]uint64{}, Skipped: r.totals.Skipped, Failures: r.totals.Failures}
	for k, n := range r.totals.Records {
		t.Records[k], t.Packets[k], t.Bytes[k] = n, r.totals.Packets[k], r.totals.Bytes[k]
	}
	if r.failed != "" {
		return t, errors.New(r.failed)
	}
	return t, nil
}
