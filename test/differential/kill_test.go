package differential

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/underlay-cni/underlay/internal/packet"
	"github.com/underlay-cni/underlay/internal/vpcd"
	"github.com/underlay-cni/underlay/test/vpcmodel"
)

var kills = flag.Int("kills", 12, "how often TestKilled kills vpcd")

// killable is a stand whose vpcd is a process of its own, always at the same
// address.
type killable struct {
	*stand
	options vpcd.Options
	process *exec.Cmd
	out     *bufio.Reader
	said    lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newKillable(t *testing.T) *killable {
	t.Helper()
	k := &killable{options: labOptions(t)}
	k.stand = &stand{name: k.options.Name}
	ctx, cancel := context.WithCancel(context.Background())
	k.ctx = ctx
	t.Cleanup(func() {
		cancel()
		k.kill()
		if t.Failed() {
			t.Logf("vpcd's log:\n%s", tail(k.said.String(), 4000))
		}
	})
	for _, step := range []func() error{k.start, k.serves} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	k.furnish(t)
	return k
}

// start starts vpcd and does not wait for it.
func (k *killable) start() error {
	o := k.options
	options, err := json.Marshal(childOptions{o.Name, o.Dir, o.BPFFS, o.Listen, time.Second})
	if err != nil {
		return err
	}
	k.process = exec.Command(os.Args[0])
	k.process.Env = append(os.Environ(), childVariable+"="+string(options))
	k.process.Stderr = &k.said
	out, err := k.process.StdoutPipe()
	if err != nil {
		return err
	}
	k.out = bufio.NewReader(out)
	return k.process.Start()
}

// serves waits until vpcd answers.
func (k *killable) serves() error {
	line, err := k.out.ReadString('\n')
	if err != nil {
		return fmt.Errorf("vpcd did not start: %w\n%s", err, tail(k.said.String(), 2000))
	}
	k.options.Listen = strings.TrimSpace(line)
	k.endpoint = "http://" + k.options.Listen
	go func(r io.Reader) { _, _ = io.Copy(io.Discard, r) }(k.out)
	return nil
}

// kill ends vpcd by SIGKILL.
func (k *killable) kill() {
	if k.process != nil {
		_ = k.process.Process.Kill()
		_ = k.process.Wait()
	}
}

// eventually polls until ok, for so long that only what is stuck does not come.
func eventually(ctx context.Context, what string, ok func() bool) error {
	deadline := time.Now().Add(60 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: not within 60 s", what)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
	return nil
}

// up waits until something listens at vpcd's address.
func (k *killable) up(ctx context.Context) error {
	return eventually(ctx, "vpcd answers again", func() bool {
		c, err := net.DialTimeout("tcp", strings.TrimPrefix(k.endpoint, "http://"), time.Second)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// killedWorlds are how many worlds change and are probed while vpcd is killed.
const killedWorlds = 2

// Killed at any moment, under calls and traffic, vpcd has lost no change that it
// has answered; while it is down, comes up, or is in the middle of a change,
// nothing passes that the rules before and after the change both forbid, and what
// both allow does; a tracked flow goes on. In the end the flow logs have all that
// the interfaces counted.
func TestKilled(t *testing.T) {
	k := newKillable(t)
	first := *seed
	if first == 0 {
		first = uint64(time.Now().UnixNano())
	}
	t.Logf("-seed %d", first)
	features := Enforced
	features.Internet, features.NAT = false, false // calls about them cannot be repeated
	var worlds []*watched
	for i := range killedWorlds {
		w, err := k.watch(first+uint64(i), features, false)
		if err != nil {
			t.Fatal(err)
		}
		defer w.close()
		worlds = append(worlds, w)
		if err := w.logFlows(); err != nil {
			t.Fatal(err)
		}
	}
	lasting, err := k.layLasting()
	if err != nil {
		t.Fatal(err)
	}
	objects := newLedger(k)

	group, ctx := errgroup.WithContext(k.ctx)
	stop := make(chan struct{})
	stopped := func() bool {
		select {
		case <-stop:
			return true
		case <-ctx.Done():
			return true
		default:
			return false
		}
	}
	up := func() error { return k.up(ctx) }
	var changes, calls, rounds atomic.Int64
	var total tally // the probing goroutine's until it ends
	for _, w := range worlds {
		group.Go(func() error {
			for !stopped() {
				if err := w.change(up); err != nil {
					return err
				}
				changes.Add(1)
			}
			return nil
		})
	}
	group.Go(func() error {
		for !stopped() {
			if err := objects.change(up); err != nil {
				return err
			}
			calls.Add(1)
		}
		return nil
	})
	group.Go(func() error {
		for !stopped() {
			for _, w := range worlds {
				n, err := w.probe(16)
				if err != nil {
					return err
				}
				total.add(n)
			}
			if err := lasting.probe(); err != nil {
				return err
			}
			rounds.Add(1)
			<-time.After(4 * time.Millisecond) // vpcd is to have a share of the CPUs
		}
		return nil
	})

	random := rand.New(rand.NewPCG(first, 4))
	early, lost := 0, 0
	kill := func() error {
		for n := 0; n < *kills; {
			// Some calls are answered, then it ends in the middle of others.
			count, more := &calls, int64(1+random.IntN(30))
			if random.IntN(2) == 0 {
				count, more = &changes, int64(1+random.IntN(4))
			}
			more += count.Load()
			if err := eventually(ctx, "calls are answered", func() bool { return count.Load() >= more }); err != nil {
				return err
			}
			<-time.After(time.Duration(random.IntN(3000)) * time.Microsecond)
			k.kill()
			n++
			for {
				// Twice through the worlds without a vpcd.
				from := rounds.Load()
				if err := eventually(ctx, "packets are sent", func() bool { return rounds.Load() >= from+2 }); err != nil {
					return err
				}
				if err := k.start(); err != nil {
					return err
				}
				if n == *kills || random.IntN(4) > 0 {
					break
				}
				// Before it serves, or soon after.
				<-time.After(time.Duration(random.IntN(150)) * time.Millisecond)
				k.kill()
				n++
				early++
			}
			if err := k.serves(); err != nil {
				return err
			}
			n, err := objects.compare()
			lost += n
			if err != nil {
				return err
			}
		}
		return nil
	}
	group.Go(func() error {
		err := kill()
		close(stop)
		return err
	})
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	if lost > 0 {
		t.Errorf("%d objects are not as the last answered call left them", lost)
	}
	// Nothing is open any more: all is by the rules.
	if _, err := k.settle(); err != nil {
		t.Fatal(err)
	}
	for _, w := range worlds {
		for range 10 {
			n, err := w.probe(50)
			if err != nil {
				t.Fatal(err)
			}
			if n.sure != 50 {
				t.Errorf("%d of 50 verdicts are open at the end", 50-n.sure)
			}
			total.add(n)
		}
	}
	logs := &flowTotals{killable: k}
	if err := eventually(k.ctx, "flow logs and counters agree", func() bool { return logs.read(worlds) != nil || logs.wrong == "" }); err != nil || logs.err != nil {
		t.Errorf("%v; %v: %s", err, logs.err, logs.wrong)
	}
	// An interval's maps have room for many times the flows of a second.
	if logs.skipped > 0 {
		t.Errorf("%d of %d interfaces have SKIPDATA", logs.skipped, logs.interfaces)
	}
	t.Logf("flow logs: %d files, %d packets of %d interfaces, %d of them with SKIPDATA", logs.files, logs.packets, logs.interfaces, logs.skipped)
	t.Logf("%d kills, %d of them while it started; %d changes of rules and %d calls answered; %d packets whose verdict was sure, %d received; %d packets of lasting flows",
		*kills, early, changes.Load(), calls.Load(), total.sure, total.received, lasting.sent)
}

// lasting is a TCP flow that its receiver tracks, and nothing else lets pass: the
// rule that let it begin is revoked.
type lasting struct {
	*watched
	tracked, untracked vpcmodel.Packet
	sent               int
}

func (s *stand) layLasting() (*lasting, error) {
	script, err := vpcmodel.Parse(`
vpc l1 10.254.0.0/16
subnet l2 l1 10.254.1.0/24
eni la l2 l3 10.254.1.10
eni lb l2 l4 10.254.1.11
group lg l1
group lh l1
allow lg out all 0.0.0.0/0
allow lh in tcp 80 10.254.0.0/16
groups la lg
groups lb lh
send 1 la tcp 10.254.1.10:2000 > 10.254.1.11:80 S
send 2 lb tcp 10.254.1.11:80 > 10.254.1.10:2000 SA
send 3 la tcp 10.254.1.10:2000 > 10.254.1.11:80 A
revoke lh in tcp 80 10.254.0.0/16
`)
	if err != nil {
		return nil, err
	}
	l := &lasting{watched: &watched{stand: s, cloud: newCloud(s.ctx, s.endpoint), ports: map[string]*port{}}}
	for _, st := range script {
		send, ok := st.(vpcmodel.Send)
		if !ok {
			if err := l.cloud.apply(st); err != nil {
				return nil, err
			}
			continue
		}
		if err := l.openPorts(l.cloud, l.ports); err != nil {
			return nil, err
		}
		if got, err := l.sendAll([]*vpcmodel.Packet{&send.Packet}); err != nil || got[0] == "" {
			return nil, errors.Join(err, fmt.Errorf("%s is not received", &send.Packet))
		}
	}
	l.tracked = vpcmodel.Packet{From: "la", Src: netip.MustParseAddr("10.254.1.10"), Dst: netip.MustParseAddr("10.254.1.11"),
		Proto: packet.ProtoTCP, SrcPort: 2000, DstPort: 80, Flags: vpcmodel.PSH | vpcmodel.ACK}
	l.untracked = l.tracked
	l.untracked.Flags = vpcmodel.SYN
	return l, nil
}

// probe sends a segment of the flow, and the first of another.
func (l *lasting) probe() error {
	l.untracked.SrcPort++
	if l.untracked.SrcPort <= l.tracked.SrcPort {
		l.untracked.SrcPort = l.tracked.SrcPort + 1
	}
	got, err := l.sendAll([]*vpcmodel.Packet{&l.tracked, &l.untracked})
	l.sent += 2
	switch {
	case err != nil:
		return err
	case got[0] != "lb":
		return fmt.Errorf("%s is of a tracked flow and was received by %q", &l.tracked, got[0])
	case got[1] != "":
		return fmt.Errorf("no rule allows %s, which was received by %s", &l.untracked, got[1])
	}
	return nil
}

// ledger makes and deletes security groups, and knows which there must be.
type ledger struct {
	*killable
	cloud *cloud
	vpc   string

	mu     sync.Mutex
	n      int
	there  map[string]string // group by name
	gone   map[string]bool
	inOpen string // name of the group that a call without an answer is about
}

func newLedger(k *killable) *ledger {
	return &ledger{killable: k, cloud: newCloud(k.ctx, k.endpoint), there: map[string]string{}, gone: map[string]bool{}}
}

// change makes a group, or deletes one.
func (l *ledger) change(up func() error) error {
	if l.vpc == "" {
		if err := l.cloud.create("vpc", []string{"vpc", "vpcId"}, "CreateVpc", "CidrBlock", "10.253.0.0/16"); err != nil {
			return err
		}
		l.vpc = l.cloud.ids["vpc"]
	}
	l.mu.Lock()
	l.n++
	name, id := fmt.Sprintf("group-%d", l.n), ""
	if len(l.there) > 40 {
		for name, id = range l.there {
			break
		}
	}
	l.inOpen = name
	l.mu.Unlock()
	for {
		var a answer
		var err error
		if id == "" {
			a, err = l.cloud.call("CreateSecurityGroup", "GroupName", name, "GroupDescription", "of a test", "VpcId", l.vpc)
		} else {
			_, err = l.cloud.call("DeleteSecurityGroup", "GroupId", id)
		}
		var lost *url.Error
		if errors.As(err, &lost) {
			if err := up(); err != nil {
				return err
			}
			// Whether it is done shows in what there is.
			switch known, err := l.groups(); {
			case errors.As(err, &lost):
				continue
			case err != nil:
				return err
			case id == "" && known[name] == "" || id != "" && known[name] != "":
				continue
			case id == "":
				a = answer{[]byte("<r><groupId>" + known[name] + "</groupId></r>")}
			}
		} else if err != nil {
			return err
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		l.inOpen = ""
		if id == "" {
			l.there[name] = a.text("groupId")
		} else {
			delete(l.there, name)
			l.gone[name] = true
		}
		return nil
	}
}

// groups are those that there are, by name.
func (l *ledger) groups() (map[string]string, error) {
	a, err := l.cloud.call("DescribeSecurityGroups", "Filter.1.Name", "vpc-id", "Filter.1.Value.1", l.vpc)
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, item := range a.items("securityGroupInfo") {
		out[item["groupName"]] = item["groupId"]
	}
	return out, nil
}

// compare returns how many groups are not as the last answered call left them.
func (l *ledger) compare() (wrong int, err error) {
	if l.vpc == "" {
		return 0, nil
	}
	l.mu.Lock() // no call of the ledger begins or ends meanwhile
	defer l.mu.Unlock()
	known, err := l.groups()
	if err != nil {
		return 0, err
	}
	for name, id := range l.there {
		if name != l.inOpen && known[name] != id {
			wrong++
		}
	}
	for name := range known {
		if l.gone[name] {
			wrong++
		}
	}
	return wrong, nil
}
