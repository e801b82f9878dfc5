package vpcd

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
	"github.com/underlay-cni/underlay/internal/vpcd/flow"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// minutes is a recorder whose intervals are the minutes of a clock of its own.
type minutes struct {
	now     time.Time
	since   time.Time
	number  uint64
	records []fabric.Record // of the running interval
	ended   []*fabric.Interval
	there   []*fabric.Logged
	reading func() // called once, by ReadInterval
}

func (m *minutes) RunningSince() time.Time { return m.since }

func (m *minutes) EndInterval() error {
	m.ended = append(m.ended, &fabric.Interval{Number: m.number, Start: m.since, End: m.now, Records: m.records, Attached: slices.Clone(m.there)})
	m.number, m.since, m.records = m.number+1, m.now, nil
	return nil
}

func (m *minutes) EndedIntervals() (out []uint64) {
	for _, i := range m.ended {
		out = append(out, i.Number)
	}
	return out
}

func (m *minutes) ReadInterval(n uint64) (*fabric.Interval, error) {
	if do := m.reading; do != nil {
		m.reading = nil
		do()
	}
	for _, i := range m.ended {
		if i.Number == n {
			return i, nil
		}
	}
	return nil, fabric.ErrNoInterval
}

func (m *minutes) DiscardInterval(n uint64) error {
	if len(m.ended) == 0 || m.ended[0].Number != n {
		return fabric.ErrNoInterval
	}
	m.ended = m.ended[1:]
	return nil
}

func (m *minutes) RunningInterval() (*fabric.Interval, error) {
	return &fabric.Interval{Number: m.number, Start: m.since, Records: m.records}, nil
}

func (m *minutes) IntervalFill() (int, int, error) { return 0, 1 << 20, nil }

// flowWorld is a flow logger over minutes, with an interface eni-1 of a Nitro
// instance and eni-2 of none.
type flowWorld struct {
	t    *testing.T
	dir  string
	net  *minutes
	st   *store.Store
	log  *flowLogger
	text bytes.Buffer // what it logs
}

func newFlowWorld(t *testing.T) *flowWorld {
	t.Helper()
	begin := time.Date(2026, 3, 4, 12, 0, 0, 0, time.UTC)
	w := &flowWorld{t: t, dir: t.TempDir(), net: &minutes{now: begin, since: begin, number: 1}}
	var err error
	if w.st, err = store.Open(filepath.Join(w.dir, stateFile), store.Options{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.st.Close() })
	w.update(func(tx *store.Tx) {
		tx.PutInstance(&store.Instance{ID: "i-1", Type: "m5.large"})
		tx.PutInstance(&store.Instance{ID: "i-2", Type: "t2.micro"})
	})
	for _, n := range []string{"1", "2"} {
		w.net.there = append(w.net.there, &fabric.Logged{ENI: vpc.ENIID("eni-" + n), Subnet: "subnet-1", Owner: fabric.Owner{VPC: "vpc-1", Instance: vpc.InstanceID("i-" + n)}})
	}
	w.restart()
	return w
}

func (w *flowWorld) update(change func(*store.Tx)) {
	w.t.Helper()
	if err := w.st.Update(func(tx *store.Tx) error { change(tx); return nil }); err != nil {
		w.t.Fatal(err)
	}
}

// restart is what a process does that begins where another died.
func (w *flowWorld) restart() {
	w.t.Helper()
	kept, err := openKept(filepath.Join(w.dir, flowFolder))
	if err != nil {
		w.t.Fatal(err)
	}
	w.log = &flowLogger{
		net: w.net, store: w.st, account: "123456789012", region: "us-east-1", kept: kept, recent: newRecentFlows(),
		files: newDelivery(filepath.Join(w.dir, s3Folder), "123456789012", "us-east-1"), log: slog.New(slog.NewTextHandler(&w.text, nil)),
		interval: func() time.Duration { return time.Minute }, window: func() time.Duration { return 5 * time.Minute },
		ended: make(chan struct{}, 1),
	}
	if err := w.log.begin(); err != nil {
		w.t.Fatal(err)
	}
}

// flowLog makes a flow log of all of the VPC.
func (w *flowWorld) flowLog(id string, interval int) {
	w.update(func(tx *store.Tx) {
		tx.PutFlowLog(&store.FlowLog{ID: id, Resource: "vpc-1", Traffic: "ALL", Destination: "arn:aws:s3:::" + id, Interval: interval,
			Format: "${interface-id} ${dstport} ${packets} ${bytes} ${start} ${end} ${log-status}"})
	})
}

// minute lets a minute pass in which each of the interfaces given sends a packet,
// and has it delivered.
func (w *flowWorld) minute(sends ...int) error {
	return errors.Join(w.pass(sends...), w.log.deliver())
}

// pass lets such a minute pass.
func (w *flowWorld) pass(sends ...int) error {
	for _, n := range sends {
		at := w.net.now.Add(time.Duration(10*n) * time.Second)
		w.net.records = append(w.net.records, fabric.Record{
			Interface: w.net.there[n-1], Egress: true, Source: netip.MustParseAddr("10.0.0.1"), Destination: netip.MustParseAddr("10.0.0.2"),
			SourcePort: 4000, DestinationPort: 53, Protocol: 17, Packets: 1, Bytes: 100, First: at, Last: at.Add(time.Second),
		})
	}
	w.net.now = w.net.now.Add(time.Minute)
	return w.log.endDue(w.net.now)
}

// lines are those of a flow log's files, times in seconds since the beginning.
func (w *flowWorld) lines(id string) (out []string) {
	for _, l := range logLines(w.t, filepath.Join(w.dir, s3Folder), id) {
		var eni, port, packets, size, status string
		var start, end int64
		if _, err := fmt.Sscan(l, &eni, &port, &packets, &size, &start, &end, &status); err != nil {
			w.t.Fatalf("%q: %v", l, err)
		}
		zero := time.Date(2026, 3, 4, 12, 0, 0, 0, time.UTC).Unix()
		out = append(out, fmt.Sprint(eni, " ", packets, " ", size, " ", start-zero, "-", end-zero, " ", status))
	}
	return out
}

// A file has what five minutes bring. Records are of a minute; those of what is
// no Nitro instance of ten, in a flow log of 600 s. Whoever dies in between
// writes nothing twice and loses nothing.
func TestFlowFileIntervals(t *testing.T) {
	for _, dies := range []bool{false, true} {
		w := newFlowWorld(t)
		w.flowLog("fl-60", 60)
		w.flowLog("fl-600", 600)
		for m := range 10 {
			sends := []int{1, 2}
			if m == 3 {
				sends = nil
			}
			if err := w.minute(sends...); err != nil {
				t.Fatal(err)
			}
			if dies {
				w.restart()
			}
			want := (m + 1) / 5
			for _, id := range []string{"fl-60", "fl-600"} {
				if got := logFiles(t, filepath.Join(w.dir, s3Folder), id); len(got) != want {
					t.Errorf("%s after %d minutes: files %v, want %d", id, m+1, got, want)
				}
			}
		}
		var want60, want600 []string
		for m := range 10 {
			at := 60 * m
			if m == 3 {
				want60 = append(want60, "eni-1 - - 180-240 NODATA", "eni-2 - - 180-240 NODATA")
				want600 = append(want600, "eni-1 - - 180-240 NODATA")
				continue
			}
			one := fmt.Sprintf("eni-1 1 100 %d-%d OK", at+10, at+11)
			want60 = append(want60, one, fmt.Sprintf("eni-2 1 100 %d-%d OK", at+20, at+21))
			want600 = append(want600, one)
		}
		want600 = append(want600, "eni-2 9 900 20-561 OK")
		if d := cmp.Diff(want60, w.lines("fl-60")); d != "" {
			t.Errorf("60 s (-want +got):\n%s", d)
		}
		if d := cmp.Diff(want600, w.lines("fl-600")); d != "" {
			t.Errorf("600 s (-want +got):\n%s", d)
		}
		if w.text.Len() > 0 {
			t.Errorf("logged: %s", &w.text)
		}
	}
}

// An interval may end while those before it are delivered: it comes into the
// window, and into the long record, in which it belongs.
func TestFlowIntervalEndsMeanwhile(t *testing.T) {
	w := newFlowWorld(t)
	w.flowLog("fl-600", 600)
	for m := range 10 {
		if m == 3 || m == 8 {
			w.net.reading = func() {
				if err := w.pass(1, 2); err != nil {
					t.Error(err)
				}
			}
		}
		if m == 4 || m == 9 { // it has passed
			if err := w.log.deliver(); err != nil {
				t.Fatal(err)
			}
		} else if err := w.minute(1, 2); err != nil {
			t.Fatal(err)
		}
		if got, want := len(logFiles(t, filepath.Join(w.dir, s3Folder), "fl-600")), (m+1)/5; got != want {
			t.Errorf("after %d minutes %d files, want %d", m+1, got, want)
		}
	}
	var want []string
	for m := range 10 {
		want = append(want, fmt.Sprintf("eni-1 1 100 %d-%d OK", 60*m+10, 60*m+11))
	}
	if d := cmp.Diff(append(want, "eni-2 10 1000 20-561 OK"), w.lines("fl-600")); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

// When intervals end faster than they are delivered, so many wait and no more,
// and nothing is lost.
func TestFlowIntervalsWait(t *testing.T) {
	w := newFlowWorld(t)
	w.flowLog("fl-60", 60)
	all := 2 * maxKeptIntervals
	refused := 0
	for range all {
		if w.pass(1) != nil {
			refused++
		}
	}
	if got := len(w.net.ended); got != maxKeptIntervals+1 || refused != all-got || len(w.log.ended) == 0 {
		t.Errorf("%d intervals wait, %d minutes ended none; want %d and %d", got, refused, maxKeptIntervals+1, all-maxKeptIntervals-1)
	}
	// A vpcd that starts has taken some away before it serves, however soon it dies.
	for range 2 {
		w.restart()
		if err := w.log.catchUp(); err != nil {
			t.Fatal(err)
		}
		if got := len(w.net.ended); got != leftIntervals {
			t.Errorf("%d intervals wait after a start, want %d", got, leftIntervals)
		}
		for len(w.net.ended) <= maxKeptIntervals {
			if err := w.pass(1); err != nil {
				t.Fatal(err)
			}
			all++
		}
	}
	if err := w.log.deliver(); err != nil {
		t.Fatal(err)
	}
	for more := 5; more > 0 || all%5 != 0; more-- { // to the end of a window
		if err := w.minute(1); err != nil {
			t.Fatal(err)
		}
		all++
	}
	ok := 0
	for _, l := range w.lines("fl-60") {
		if strings.HasPrefix(l, "eni-1 1 100 ") {
			ok++
		}
	}
	if len(w.net.ended) != 0 || ok != all {
		t.Errorf("%d records of packets, want %d; %d intervals wait", ok, all, len(w.net.ended))
	}
}

// Who asks after a restart is told what was recorded before, once; and what is
// in all files and in the latest records no more is not kept.
func TestFlowsAfterRestart(t *testing.T) {
	w := newFlowWorld(t)
	for range 3 {
		if err := w.minute(1); err != nil {
			t.Fatal(err)
		}
	}
	before, _, _ := w.log.recent.since(0)
	w.restart()
	after, _, _ := w.log.recent.since(0)
	told := func(records []shownRecord) (out []map[string]any) {
		for i := range records {
			if records[i].Status == flow.OK {
				out = append(out, flowLine(&records[i]))
			}
		}
		return out
	}
	if d := cmp.Diff(told(before), told(after)); d != "" || len(told(after)) != 3 {
		t.Errorf("%d after a restart (-before +after):\n%s", len(told(after)), d)
	}
	if err := w.minute(1); err != nil {
		t.Fatal(err)
	}
	if n, _, _ := w.log.recent.since(0); len(told(n)) != 4 {
		t.Errorf("%d records after another minute, want 4", len(told(n)))
	}

	// An interval that is kept and that the kernel still has, as after a kill
	// between the two.
	w.net.now = w.net.now.Add(time.Minute)
	if err := w.net.EndInterval(); err != nil {
		t.Fatal(err)
	}
	i := w.net.ended[0]
	if err := w.log.kept.add(i, w.log.records(i)); err != nil {
		t.Fatal(err)
	}
	w.restart()
	had, _, _ := w.log.recent.since(0)
	if err := w.log.deliver(); err != nil {
		t.Fatal(err)
	}
	if has, _, _ := w.log.recent.since(0); len(has) != len(had) || len(w.net.ended) != 0 {
		t.Errorf("%d records, of which %d are told twice; %d intervals not discarded", len(had), len(has)-len(had), len(w.net.ended))
	}

	for range 15 {
		if err := w.minute(1); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.log.kept.prune(2); err != nil {
		t.Fatal(err)
	}
	if got := len(w.log.kept.intervals); got > 10 {
		t.Errorf("%d intervals are kept", got)
	}
	w.restart()
	if got, _, _ := w.log.recent.since(0); len(told(got)) < 2 {
		t.Errorf("%d records after all, want 2 at least", len(told(got)))
	}
}

// What cannot be delivered for too long is given up, and the next file says so,
// also of a process that comes later. So is what vpcd cannot keep itself.
func TestFlowRecordsGivenUp(t *testing.T) {
	w := newFlowWorld(t)
	w.flowLog("fl-1", 60)
	if err := os.MkdirAll(filepath.Join(w.dir, s3Folder), 0o755); err != nil {
		t.Fatal(err)
	}
	bucket := filepath.Join(w.dir, s3Folder, "fl-1")
	if err := os.WriteFile(bucket, nil, 0o600); err != nil { // no folder can be made there
		t.Fatal(err)
	}
	failed := 0
	for range 5 * (maxOpenWindows + 1) {
		if w.minute(1) != nil {
			failed++
		}
	}
	if status, message := w.log.files.state("fl-1"); status != "FAILED" || message == "" || failed == 0 {
		t.Errorf("%s %s, %d errors", status, message, failed)
	}
	if !bytes.Contains(w.text.Bytes(), []byte("flow records lost")) {
		t.Errorf("logged: %s", &w.text)
	}
	w.restart()
	if err := os.Remove(bucket); err != nil {
		t.Fatal(err)
	}
	if err := w.minute(1); err != nil {
		t.Fatal(err)
	}
	lines := w.lines("fl-1")
	for _, want := range []string{"eni-1 - - 0-300 SKIPDATA", "eni-1 1 100 310-311 OK"} {
		if !slices.Contains(lines, want) {
			t.Errorf("no line %q in %q", want, lines)
		}
	}
	if slices.Contains(lines, "eni-1 1 100 10-11 OK") {
		t.Errorf("given up, and in a file: %q", lines)
	}
	if status, _ := w.log.files.state("fl-1"); status != "SUCCESS" {
		t.Errorf("in the end %s", status)
	}

	// vpcd's own folder.
	if err := os.RemoveAll(w.log.kept.dir); err != nil {
		t.Fatal(err)
	}
	w.log.kept.intervals = nil
	for range maxKeptIntervals + 1 {
		if w.minute(1) == nil {
			t.Fatal("records are kept in a folder that is not there")
		}
	}
	if len(w.net.ended) != maxKeptIntervals {
		t.Errorf("%d intervals wait, want %d", len(w.net.ended), maxKeptIntervals)
	}
	if err := os.Mkdir(w.log.kept.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		if err := w.minute(1); err != nil {
			t.Fatal(err)
		}
	}
	if lines := w.lines("fl-1"); !slices.Contains(lines, "eni-1 - - 3360-3420 SKIPDATA") {
		t.Errorf("nothing of what was lost: %q", lines)
	}
}

// Of the packets that are sent as soon as there is a flow log it has records,
// though their clock may be behind; of those before it has none.
func TestFlowLogBegins(t *testing.T) {
	created := time.Unix(1000, 0)
	f := &store.FlowLog{ID: "fl-1", Resource: "eni-1", Traffic: "ALL", Created: created}
	for early, want := range map[time.Duration]int{-time.Second: 1, recordClock - 1: 1, 2 * recordClock: 0} {
		r := shownRecord{Record: flow.Record{Interface: "eni-1", Status: flow.OK, End: created.Add(-early)}}
		if got := wanted(f, nil, []shownRecord{r}); len(got) != want {
			t.Errorf("%d records that ended %v before it was made, want %d", len(got), early, want)
		}
	}
}

// No key leads out of the folder of buckets, and a window that is written again
// is in the same file.
func TestFlowFileKeys(t *testing.T) {
	d := newDelivery(filepath.Join(t.TempDir(), "s3"), "123456789012", "us-east-1")
	records := []flow.Record{{Interface: "eni-1", Status: flow.NoData}}
	win := flowWindow{Last: 5, End: time.Unix(300, 0)}
	if err := d.writeOne(&store.FlowLog{ID: "fl-1", Destination: "arn:aws:s3:::logs/../../etc", Format: "${interface-id}"}, win, records); err == nil {
		t.Error("a key that leads out of its folder was written")
	}
	for range 2 {
		if err := d.writeOne(&store.FlowLog{ID: "fl-1", Destination: "arn:aws:s3:::logs", Format: "${interface-id}"}, win, records); err != nil {
			t.Fatal(err)
		}
	}
	if files := logFiles(t, d.dir, "fl-1"); len(files) != 1 {
		t.Errorf("files %v", files)
	}
}

// All of a record comes back from a file.
func TestPackedRecords(t *testing.T) {
	var r shownRecord
	fill := func(v reflect.Value) {
		for i := range v.NumField() {
			switch f := v.Field(i); f.Interface().(type) {
			case netip.Addr:
				f.Set(reflect.ValueOf(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})))
			case time.Time:
				f.Set(reflect.ValueOf(time.Unix(1_700_000_000, int64(i))))
			default:
				switch f.Kind() {
				case reflect.String:
					f.SetString(fmt.Sprint("s", i))
				case reflect.Bool:
					f.SetBool(true)
				default:
					f.SetInt(int64(100 + i))
				}
			}
		}
	}
	fill(reflect.ValueOf(&r.Record).Elem())
	r.Machine, r.Long = "m", true
	six := r
	six.Source = netip.MustParseAddr("2001:db8::1")
	want := []shownRecord{r, six, {Record: r.OfInterface()}}
	want[2].Status, want[2].Start, want[2].End = flow.SkipData, time.Unix(1, 0), time.Unix(2, 0)
	dir := t.TempDir()
	k, err := openKept(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := k.add(&fabric.Interval{Number: 7, Start: time.Unix(1, 5), End: time.Unix(60, 0)}, want); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "x"+partialKind), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if k, err = openKept(dir); err != nil {
		t.Fatal(err)
	}
	got, err := k.latest(10)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v\nwant %+v", got, want)
	}
}
