package vpcd

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/underlay-cni/underlay/internal/vpcd/flow"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

const (
	// defaultFileInterval is AWS's: a file has what five minutes bring (VPC User
	// Guide, "Flow log files").
	defaultFileInterval = 5 * time.Minute

	// maxFileRecords is how many records a file has, about, before its time is
	// over; AWS begins another at 75 MB.
	maxFileRecords = 100_000

	// maxOpenWindows is how many files wait for a flow log that cannot be
	// written to. Then the oldest is given up, and the flow log says SKIPDATA.
	maxOpenWindows = 10

	// recordClock is how much too early a record's times may be: packets are timed
	// by the kernel's coarse clock, which moves by a tick of 10 ms at most
	// (CONFIG_HZ=100).
	recordClock = 10 * time.Millisecond

	// shortFlowLog is the MaxAggregationInterval in seconds of those that have no
	// long records.
	shortFlowLog = 60
)

// delivery writes the files of flow logs below a folder that stands for S3: each
// bucket is a folder in it.
type delivery struct {
	dir             string
	account, region string

	mu     sync.Mutex
	status map[string]string // by flow log: "" delivered, or why not
}

// span is a stretch of time.
type span struct{ Start, End time.Time }

func newDelivery(dir, account, region string) *delivery {
	return &delivery{dir: dir, account: account, region: region, status: map[string]string{}}
}

// state tells how the last delivery of a flow log went: SUCCESS or FAILED and
// why, as DescribeFlowLogs says it, or "" before the first.
func (d *delivery) state(id string) (status, message string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	message, tried := d.status[id]
	switch {
	case !tried:
		return "", ""
	case message != "":
		return "FAILED", message
	}
	return "SUCCESS", ""
}

// deliver writes the files that are due, and forgets what nobody needs any more.
func (d *delivery) deliver(k *keptFlows, state *store.State, log *slog.Logger) error {
	var errs []error
	for i := range k.progress.Open {
		errs = append(errs, d.write(k, &k.progress.Open[i], state))
	}
	open := slices.DeleteFunc(slices.Clone(k.progress.Open), func(w flowWindow) bool { return w.in(state) })
	for ; len(open) > maxOpenWindows; open = open[1:] {
		w := open[0]
		if i := k.between(w.First, w.Last); len(i) > 0 {
			k.giveUp(i[0].start, w.End, state, w.Done)
			log.Error("flow records lost", "start", i[0].start, "end", w.End, "err", errors.Join(errs...))
		}
	}
	if len(open) < len(k.progress.Open) {
		k.progress.Open = open
		if err := k.save(); err != nil {
			return errors.Join(append(errs, err)...)
		}
	}
	return errors.Join(append(errs, k.prune(maxRecentFlows))...)
}

// write writes a window into a file of each flow log that does not have it. The
// error joins why some could not be written; the others are.
func (d *delivery) write(k *keptFlows, w *flowWindow, state *store.State) error {
	if w.in(state) {
		return nil
	}
	read := sync.OnceValues(func() (records []shownRecord, err error) {
		for _, i := range k.between(w.First, w.Last) {
			some, err := k.read(i)
			if err != nil {
				return nil, err
			}
			records = append(records, some...)
		}
		return records, nil
	})
	long := sync.OnceValues(func() ([]shownRecord, error) { return k.longRecords(*w) })
	var errs []error
	written := false
	for _, f := range state.FlowLogs.All() {
		if w.Done[f.ID] {
			continue
		}
		records, err := read()
		if err == nil && f.Interval != shortFlowLog {
			var more []shownRecord
			more, err = long()
			records = append(slices.DeleteFunc(slices.Clone(records), func(r shownRecord) bool { return r.Long }), more...)
		}
		if err == nil {
			err = d.writeOne(f, *w, wanted(f, k.progress.Lost, records))
		}
		message := ""
		if err != nil {
			errs = append(errs, fmt.Errorf("flow log %s: %w", f.ID, err))
			message = "Access error: " + err.Error()
		} else {
			if w.Done == nil {
				w.Done = map[string]bool{}
			}
			w.Done[f.ID], written = true, true
			delete(k.progress.Lost, f.ID)
		}
		d.mu.Lock()
		d.status[f.ID] = message
		d.mu.Unlock()
	}
	if written {
		// A process that dies before has the files written again, the same.
		errs = append(errs, k.save())
	}
	return errors.Join(errs...)
}

// covers reports whether a flow log is about a record's interface.
func covers(f *store.FlowLog, r *flow.Record) bool {
	return f.Resource == string(r.Interface) || f.Resource == string(r.Subnet) || f.Resource == string(r.VPC)
}

// wanted are the records that a flow log is to have, and what it is to say of
// records that it lost.
func wanted(f *store.FlowLog, losses map[string]span, records []shownRecord) []flow.Record {
	var out []flow.Record
	lost, some := losses[f.ID]
	told := map[string]bool{} // interfaces that what was lost is told of
	for _, r := range records {
		if !covers(f, &r.Record) || r.End.Before(f.Created.Add(-recordClock)) {
			continue
		}
		if some && !told[string(r.Interface)] {
			told[string(r.Interface)] = true
			skipped := r.OfInterface()
			skipped.Status, skipped.Start, skipped.End = flow.SkipData, lost.Start, lost.End
			out = append(out, skipped)
		}
		if r.Status == flow.OK && f.Traffic != "ALL" && f.Traffic != r.Action {
			continue
		}
		out = append(out, r.Record)
	}
	return out
}

// writeOne writes a window into the file of one flow log, or none if there is
// nothing to say. The file is there whole or not at all.
func (d *delivery) writeOne(f *store.FlowLog, w flowWindow, wanted []flow.Record) (err error) {
	if len(wanted) == 0 {
		return nil
	}
	format, err := flow.ParseFormat(f.Format)
	if err != nil {
		return err
	}
	bucket, prefix, _ := strings.Cut(strings.TrimPrefix(f.Destination, "arn:aws:s3:::"), "/")
	place := flow.Place{Prefix: prefix, Account: d.account, Region: d.region, ID: f.ID, Parquet: f.FileFormat == "parquet", Hive: f.HivePartitions, Hours: f.HourPartitions}
	key := path.Join(bucket, place.Key(w.Last, w.End))
	if err := os.MkdirAll(d.dir, 0o755); err != nil {
		return fmt.Errorf("make the folder of buckets: %w", err)
	}
	root, err := os.OpenRoot(d.dir) // no key leads out of it
	if err != nil {
		return fmt.Errorf("open the folder of buckets: %w", err)
	}
	defer root.Close()
	if err := root.MkdirAll(path.Dir(key), 0o755); err != nil {
		return fmt.Errorf("make the folder of a flow log in %s: %w", d.dir, err)
	}
	part := path.Join(path.Dir(key), "."+path.Base(key)+".part")
	out, err := root.Create(part)
	if err != nil {
		return fmt.Errorf("make a file of a flow log in %s: %w", d.dir, err)
	}
	b := bufio.NewWriter(out)
	if place.Parquet {
		err = flow.WriteParquet(b, format, wanted)
	} else {
		err = flow.WriteText(b, format, wanted)
	}
	if err == nil {
		err = b.Flush()
	}
	if e := out.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = root.Rename(part, key)
	}
	if err != nil {
		if e := root.Remove(part); !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, e)
		}
		return fmt.Errorf("write %s in %s: %w", key, d.dir, err)
	}
	return nil
}
