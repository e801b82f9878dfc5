package vpcd

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
	"github.com/underlay-cni/underlay/internal/vpcd/flow"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// delivery writes the files of flow logs below a folder that stands for S3: each
// bucket is a folder in it.
type delivery struct {
	dir             string
	account, region string

	done map[uint64]map[string]bool // by interval and flow log: the file is there, or given up
	lost map[string]window          // by flow log: what was given up since its last file

	mu     sync.Mutex
	status map[string]string // by flow log: "" delivered, or why not
}

// window is a stretch of time.
type window struct{ start, end time.Time }

func newDelivery(dir, account, region string) *delivery {
	return &delivery{
		dir: dir, account: account, region: region,
		done: map[uint64]map[string]bool{}, lost: map[string]window{}, status: map[string]string{},
	}
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

// has reports whether an interval is in the files of all flow logs that there
// are.
func (d *delivery) has(number uint64, state *store.State) bool {
	if d.done[number] == nil {
		return false
	}
	for _, f := range state.FlowLogs.All() {
		if !d.done[number][f.ID] {
			return false
		}
	}
	return true
}

func (d *delivery) forget(number uint64) { delete(d.done, number) }

// write writes an interval's records into a file of each flow log that does not
// have it. The error joins why some could not be written; the others are.
func (d *delivery) write(i *fabric.Interval, records []shownRecord, state *store.State) error {
	if d.done[i.Number] == nil {
		d.done[i.Number] = map[string]bool{}
	}
	var errs []error
	for _, f := range state.FlowLogs.All() {
		if d.done[i.Number][f.ID] {
			continue
		}
		err := d.writeOne(f, i, records)
		message := ""
		if err != nil {
			errs = append(errs, fmt.Errorf("flow log %s: %w", f.ID, err))
			message = "Access error: " + err.Error()
		} else {
			d.done[i.Number][f.ID] = true
			delete(d.lost, f.ID)
		}
		d.mu.Lock()
		d.status[f.ID] = message
		d.mu.Unlock()
	}
	return errors.Join(errs...)
}

// giveUp takes an interval for delivered, and remembers that it was not.
func (d *delivery) giveUp(i *fabric.Interval, state *store.State) {
	for _, f := range state.FlowLogs.All() {
		if d.done[i.Number][f.ID] {
			continue
		}
		d.done[i.Number][f.ID] = true
		w, ok := d.lost[f.ID]
		if !ok {
			w.start = i.Start
		}
		w.end = i.End
		d.lost[f.ID] = w
	}
}

// covers reports whether a flow log is about a record's interface.
func covers(f *store.FlowLog, r *flow.Record) bool {
	return f.Resource == string(r.Interface) || f.Resource == string(r.Subnet) || f.Resource == string(r.VPC)
}

// wanted are the records that a flow log is to have.
func (d *delivery) wanted(f *store.FlowLog, i *fabric.Interval, records []shownRecord) []flow.Record {
	var out []flow.Record
	lost, some := d.lost[f.ID]
	told := map[string]bool{} // interfaces that what was lost is told of
	for _, r := range records {
		if !covers(f, &r.Record) || r.End.Before(f.Created) {
			continue
		}
		if some && !told[string(r.Interface)] {
			told[string(r.Interface)] = true
			skipped := r.Record
			skipped.Status, skipped.Start, skipped.End = flow.SkipData, lost.start, lost.end
			out = append(out, skipped)
		}
		if r.Status == flow.OK && f.Traffic != "ALL" && f.Traffic != r.Action {
			continue
		}
		out = append(out, r.Record)
	}
	return out
}

// writeOne writes an interval into the file of one flow log, or none if there is
// nothing to say. The file is there whole or not at all.
func (d *delivery) writeOne(f *store.FlowLog, i *fabric.Interval, records []shownRecord) (err error) {
	wanted := d.wanted(f, i, records)
	if len(wanted) == 0 {
		return nil
	}
	format, err := flow.ParseFormat(f.Format)
	if err != nil {
		return err
	}
	bucket, prefix, _ := strings.Cut(strings.TrimPrefix(f.Destination, "arn:aws:s3:::"), "/")
	place := flow.Place{Prefix: prefix, Account: d.account, Region: d.region, ID: f.ID, Parquet: f.FileFormat == "parquet", Hive: f.HivePartitions, Hours: f.HourPartitions}
	key := path.Join(bucket, place.Key(i.Number, i.End))
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
