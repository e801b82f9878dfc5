package recorder

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/underlay-cni/underlay/internal/flowlog"
	"github.com/underlay-cni/underlay/internal/packet"
)

var pod = flowlog.Interface{Addr: netip.MustParseAddr("10.0.0.21"), Namespace: "shop", Pod: "web-1", ENI: "eni-1", Primary: netip.MustParseAddr("10.0.0.9")}

// node is a datapath with one pod and one connection.
type node struct {
	sent  uint64
	taken int
	err   error
}

func (n *node) sample() (flowlog.Sample, func(), error) {
	c := flowlog.Counts{Packets: n.sent, Bytes: 100 * n.sent}
	return flowlog.Sample{
		At:         time.Now(),
		Interfaces: map[int]flowlog.Reading{1: {Interface: pod, Totals: flowlog.Totals{Sent: c}}},
		Conns: []flowlog.Conn{{
			Tuple:   packet.FiveTuple{Src: pod.Addr, Dst: netip.MustParseAddr("10.0.1.37"), SrcPort: 40000, DstPort: 80, Proto: packet.ProtoTCP},
			Created: time.Unix(1, 0), Last: time.Now(), From: 1, Sent: flowlog.Side{Counts: c},
		}},
	}, func() { n.taken++ }, n.err
}

func options(t *testing.T, dir string, n *node) Options {
	t.Helper()
	f, err := flowlog.ParseFormat("${pkt-srcaddr} ${packets} ${log-status}")
	if err != nil {
		t.Fatal(err)
	}
	return Options{Dir: dir, Format: &f, Boot: "boot-1", Node: func() flowlog.Node { return flowlog.Node{Name: "node-1"} },
		Sample: n.sample, Logger: slog.New(slog.DiscardHandler)}
}

func open(t *testing.T, o Options) *Recorder {
	t.Helper()
	r, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// packets sums up what the files of a folder say was sent.
func packets(t *testing.T, dir string) (sum uint64, files int) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "flows-*.log"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for i, line := range strings.Split(strings.TrimSuffix(string(b), "\n"), "\n") {
			words := strings.Fields(line)
			switch {
			case i == 0 && line != "pkt-srcaddr packets log-status":
				t.Errorf("%s begins with %q", name, line)
			case i == 0, len(words) == 3 && words[2] == "NODATA":
			case len(words) == 3 && words[2] == "OK":
				n, err := strconv.ParseUint(words[1], 10, 64)
				if err != nil {
					t.Fatal(err)
				}
				sum += n
			default:
				t.Errorf("%s: line %q", name, line)
			}
		}
	}
	return sum, len(names)
}

// positions are the files that say how far the records are valid.
func positions(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "position*"))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]byte{}
	for _, name := range names {
		if out[name], err = os.ReadFile(name); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

// An agent is killed before it wrote, between lines and position, and after:
// each packet is recorded once.
func TestKilled(t *testing.T) {
	n := &node{}
	o := options(t, t.TempDir(), n)
	for i := range 40 {
		n.sent += 7
		r := open(t, o)
		switch i % 4 {
		case 0: // killed before
			continue
		case 1: // between: the lines are there, the position is not
			keep := positions(t, o.Dir)
			r.files.changesLeast = int64(i % 3) // by a line, or whole
			r.step()
			now := positions(t, o.Dir)
			for name := range now {
				if err := os.Remove(name); err != nil {
					t.Fatal(err)
				}
			}
			for name, b := range keep {
				if i%8 == 1 { // in the middle of the line of changes
					if more := now[name]; strings.HasSuffix(name, ".log") && len(more) > len(b) {
						b = more[:len(b)+(len(more)-len(b))/2]
					}
				}
				if err := os.WriteFile(name, b, 0o640); err != nil {
					t.Fatal(err)
				}
			}
		case 2: // in the middle of a line
			f, err := os.OpenFile(r.files.name(r.files.at.Number), os.O_APPEND|os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprint(f, "10.0.0.21 99")
			f.Close()
		case 3:
			r.files.changesLeast = int64(i % 8)
			r.step()
			n.sent += 2
			r.step()
			if i%3 == 0 { // after it wrote the position whole, before it took the changes away
				if err := os.WriteFile(filepath.Join(o.Dir, "position-0.log"), []byte("{}\n"), 0o640); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	open(t, o).step()
	if sum, _ := packets(t, o.Dir); sum != n.sent {
		t.Errorf("recorded %d packets, %d were sent", sum, n.sent)
	}
}

// An interval writes what has changed, however many connections stand.
func TestWritesWhatChanged(t *testing.T) {
	const conns = 5000
	counts := make([]uint64, conns)
	for i := range counts {
		counts[i] = 1
	}
	o := options(t, t.TempDir(), &node{})
	o.Sample = func() (flowlog.Sample, func(), error) {
		s := flowlog.Sample{At: time.Now(), Interfaces: map[int]flowlog.Reading{1: {Interface: pod}}}
		var sum uint64
		for i, packets := range counts {
			sum += packets
			s.Conns = append(s.Conns, flowlog.Conn{
				Tuple:   packet.FiveTuple{Src: pod.Addr, Dst: netip.MustParseAddr("10.0.1.37"), SrcPort: uint16(i), DstPort: 80, Proto: packet.ProtoTCP},
				Created: time.Unix(1, 0), Last: time.Now(), From: 1, Sent: flowlog.Side{Counts: flowlog.Counts{Packets: packets, Bytes: 60 * packets}},
			})
		}
		in := s.Interfaces[1]
		in.Sent = flowlog.Counts{Packets: sum, Bytes: 60 * sum}
		s.Interfaces[1] = in
		return s, func() {}, nil
	}
	r := open(t, o)
	r.step()
	base := r.files.baseSize
	for i := range 5 {
		before := r.files.changesSize
		for j := range 10 {
			counts[100*i+j]++
		}
		r.step()
		if n := r.files.changesSize - before; n <= 0 || n > base/50 {
			t.Errorf("interval %d wrote %d bytes for 10 of %d connections, whose position has %d", i, n, conns, base)
		}
	}
	t.Logf("position of %d connections: %d bytes; five intervals with 10 changes each: %d bytes", conns, base, r.files.changesSize)
	// The next process goes on where this one was.
	counts[7] += 4
	next := open(t, o)
	next.step()
	totals, err := next.Totals()
	if got := totals.Packets[Kind{flowlog.Egress, true}]; err != nil || got != 4 {
		t.Errorf("the next one records %d packets, want 4 (%v)", got, err)
	}
	// As many changes as the position is long: that is written anew.
	for range 6 {
		for i := range counts {
			counts[i]++
		}
		next.step()
	}
	if names := positions(t, o.Dir); next.files.at.Generation < 2 || len(names) != 2 {
		t.Errorf("generation %d, %d files", next.files.at.Generation, len(names))
	}
	if sum, _ := packets(t, o.Dir); sum != conns*7+50+4 {
		t.Errorf("recorded %d packets, want %d", sum, conns*7+50+4)
	}
}

// What is not ours to understand is not thrown away.
func TestBadPosition(t *testing.T) {
	n := &node{sent: 5}
	o := options(t, t.TempDir(), n)
	r := open(t, o)
	r.step()
	if err := os.WriteFile(r.files.changesFile(1), []byte("hello\n"), 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := New(o); err == nil || !strings.Contains(err.Error(), "to begin anew") {
		t.Errorf("error %v", err)
	}
	if err := os.WriteFile(r.files.positionFile(), []byte("hello"), 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := New(o); err == nil || !strings.Contains(err.Error(), "to begin anew") {
		t.Errorf("error %v", err)
	}
	if got := positions(t, o.Dir); len(got) != 2 {
		t.Errorf("%d files are left", len(got))
	}
}

// Another boot counts anew: what the position says of the one before is void.
func TestOtherBoot(t *testing.T) {
	n := &node{sent: 10}
	o := options(t, t.TempDir(), n)
	open(t, o).step()
	n.sent, o.Boot = 4, "boot-2"
	open(t, o).step()
	if sum, _ := packets(t, o.Dir); sum != 14 {
		t.Errorf("recorded %d packets, want 10 and 4", sum)
	}
}

func TestRotation(t *testing.T) {
	n := &node{}
	o := options(t, t.TempDir(), n)
	o.FileBytes, o.Files = 200, 3
	for range 50 {
		r := open(t, o)
		n.sent++
		r.step()
	}
	sum, files := packets(t, o.Dir)
	if files != 3 || sum == 0 || sum >= 50 {
		t.Errorf("%d files with %d packets, want the latest 3 with some of 50", files, sum)
	}
	n.sent++
	r := open(t, o)
	r.step()
	if r.files.at.Number < 3 {
		t.Errorf("the files' number is %d", r.files.at.Number)
	}
}

// What could not be written is written later, and a sample is not taken before.
func TestWriteFails(t *testing.T) {
	n := &node{sent: 5}
	o := options(t, t.TempDir(), n)
	r := open(t, o)
	if err := os.Mkdir(filepath.Join(o.Dir, "position.json.new"), 0o750); err != nil {
		t.Fatal(err)
	}
	r.step()
	totals, err := r.Totals()
	if err == nil || totals.Failures != 1 || n.taken != 0 {
		t.Errorf("%+v, error %v, taken %d times; want a failure and a sample not taken", totals, err, n.taken)
	}
	if err := os.Remove(filepath.Join(o.Dir, "position.json.new")); err != nil {
		t.Fatal(err)
	}
	n.sent = 8
	r.step()
	totals, err = r.Totals()
	if sum, _ := packets(t, o.Dir); err != nil || sum != 8 || n.taken != 1 || totals.Packets[Kind{flowlog.Egress, true}] != 8 {
		t.Errorf("%d packets, %+v, error %v, taken %d times", sum, totals, err, n.taken)
	}
}

func TestRunAndRecent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &node{sent: 3}
		r := open(t, options(t, t.TempDir(), n))
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- r.Run(ctx) }()
		time.Sleep(61 * time.Second)
		synctest.Wait()
		n.sent = 5
		ended, running, err := r.Recent(time.Time{})
		if err != nil || len(ended) != 1 || ended[0].Packets != 3 || len(running) != 1 || running[0].Packets != 2 {
			t.Errorf("ended %+v, running %+v, error %v", ended, running, err)
		}
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if sum, _ := packets(t, r.o.Dir); sum != 5 {
			t.Errorf("recorded %d packets, want 5: the last ones at the end", sum)
		}
	})
}
