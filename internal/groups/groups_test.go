package groups

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/ec2"
	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// cloud stands for EC2.
type cloud struct {
	mu      sync.Mutex
	rules   []vpc.SecurityGroupRule
	members map[vpc.SecurityGroupID][]netip.Prefix
	lists   map[vpc.PrefixListID]PrefixList
	calls   map[string]int
	fail    error
}

func (c *cloud) call(ctx context.Context, name string, requests int) error {
	for range requests {
		if err := ec2.Meter(ctx); err != nil {
			return err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.calls == nil {
		c.calls = map[string]int{}
	}
	c.calls[name] += requests
	return c.fail
}

func (c *cloud) count() (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, k := range c.calls {
		n += k
	}
	return n
}

func (c *cloud) set(fn func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fn()
}

func (c *cloud) SecurityGroupRules(ctx context.Context, ids []vpc.SecurityGroupID) (out []vpc.SecurityGroupRule, err error) {
	if err := c.call(ctx, "rules", (len(ids)+199)/200); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.rules {
		if slices.Contains(ids, r.Group) {
			out = append(out, r)
		}
	}
	return out, nil
}

func (c *cloud) PrefixListVersions(ctx context.Context, ids []vpc.PrefixListID) (map[vpc.PrefixListID]int64, error) {
	if err := c.call(ctx, "versions", 1); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	out := map[vpc.PrefixListID]int64{}
	for _, id := range ids {
		if l, ok := c.lists[id]; ok {
			out[id] = l.Version
		}
	}
	return out, nil
}

func (c *cloud) PrefixListEntries(ctx context.Context, id vpc.PrefixListID) ([]netip.Prefix, error) {
	if err := c.call(ctx, "entries", 1); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lists[id].Entries, nil
}

func (c *cloud) Members(ctx context.Context, ids []vpc.SecurityGroupID) (map[vpc.SecurityGroupID][]netip.Prefix, error) {
	if err := c.call(ctx, "members", 1); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	out := map[vpc.SecurityGroupID][]netip.Prefix{}
	for _, id := range ids {
		if m := c.members[id]; len(m) > 0 {
			out[id] = slices.Clone(m)
		}
	}
	return out, nil
}

const sgA, sgB, sgC = vpc.SecurityGroupID("sg-0a"), vpc.SecurityGroupID("sg-0b"), vpc.SecurityGroupID("sg-0c")

func rule(id string, group vpc.SecurityGroupID, port int, from vpc.SecurityGroupID) vpc.SecurityGroupRule {
	return vpc.SecurityGroupRule{ID: "sgr-" + id, Group: group, Protocol: 6, FromPort: port, ToPort: port, Referenced: from}
}

func host(s string) netip.Prefix { return netip.MustParsePrefix(s + "/32") }

// pipes is a listener in memory, so that time can be virtual.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), done: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}
func (p *pipes) Close() error   { p.once.Do(func() { close(p.done) }); return nil }
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipes", Net: "unix"} }

func (p *pipes) dial(ctx context.Context) (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case p.conns <- theirs:
		return ours, nil
	case <-p.done:
		return nil, errors.New("connection refused")
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// world is a cloud with a poller that can be killed, and books.
type world struct {
	t     *testing.T
	cloud *cloud
	at    *pipes // where the poller is now
	kill  func()
	ctx   context.Context
	wg    sync.WaitGroup
}

func inWorld(t *testing.T, fn func(*world)) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		w := &world{t: t, cloud: &cloud{}, ctx: ctx, kill: func() {}, at: newPipes()}
		w.at.Close()
		fn(w)
		w.kill()
		cancel()
		w.wg.Wait()
	})
}

// poller starts one at a new place.
func (w *world) poller(o PollerOptions) *Poller {
	w.kill()
	p, at := NewPoller(o), newPipes()
	ctx, cancel := context.WithCancel(w.ctx)
	w.at = at
	var wg sync.WaitGroup
	wg.Go(func() { p.Run(ctx, w.cloud) })
	wg.Go(func() {
		if err := p.Serve(ctx, at, slog.New(slog.DiscardHandler)); err != nil {
			w.t.Error(err)
		}
	})
	w.kill = func() { cancel(); wg.Wait(); w.kill = func() {} }
	return p
}

func (w *world) book(o BookOptions, n Need) *Book {
	b := NewBook(o)
	b.Want(n)
	w.wg.Go(func() { b.Run(w.ctx, w.cloud) })
	return b
}

// follower is a book that follows the poller.
func (w *world) follower(n Need) *Book {
	return w.book(BookOptions{Dial: func(ctx context.Context) (net.Conn, error) { return w.at.dial(ctx) }}, n)
}

func (w *world) await(b *Book) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.ctx, 10*time.Second)
	defer cancel()
	if err := b.Await(ctx, b.Wanted()); err != nil {
		w.t.Fatalf("await: %v", err)
	}
}

// ports are those that a group's rules name.
func ports(b *Book, id vpc.SecurityGroupID) (out []int) {
	now, _ := b.Current()
	if g := now.Groups[id]; g != nil {
		for _, r := range g.Rules {
			out = append(out, r.FromPort)
		}
	}
	return out
}

func need(ids ...vpc.SecurityGroupID) Need { return Need{Groups: ids} }

// Twenty nodes with one poller cost EC2 what one node costs that polls itself,
// and each of them knows of a change when that one does.
func TestTwentyNodesCostWhatOneCosts(t *testing.T) {
	const minutes = 10
	alone, together := 0, 0
	inWorld(t, func(w *world) {
		w.cloud.rules = []vpc.SecurityGroupRule{rule("1", sgA, 80, sgB)}
		w.book(BookOptions{}, Need{Groups: []vpc.SecurityGroupID{sgA}, Members: true})
		time.Sleep(minutes * time.Minute) //nolint:forbidigo // of the bubble's clock
		alone = w.cloud.count()
	})
	inWorld(t, func(w *world) {
		for i := range 20 {
			w.cloud.rules = append(w.cloud.rules, rule(fmt.Sprint(i), vpc.SecurityGroupID(fmt.Sprintf("sg-%x", i)), 80, sgB))
		}
		p := w.poller(PollerOptions{})
		var books []*Book
		for i := range 20 {
			books = append(books, w.follower(Need{Groups: []vpc.SecurityGroupID{vpc.SecurityGroupID(fmt.Sprintf("sg-%x", i))}, Members: true}))
		}
		time.Sleep(minutes * time.Minute) //nolint:forbidigo // of the bubble's clock
		together = w.cloud.count()
		if subs, groups := p.Counts(); subs != 20 || groups != 20 {
			t.Errorf("%d subscribers with %d groups", subs, groups)
		}
		w.cloud.set(func() {
			for i := range w.cloud.rules {
				w.cloud.rules[i].FromPort = 443
			}
		})
		began := time.Now()
		for i, b := range books {
			id := vpc.SecurityGroupID(fmt.Sprintf("sg-%x", i))
			for !slices.Equal(ports(b, id), []int{443}) {
				_, news := b.Current()
				select {
				case <-news:
				case <-time.After(10 * time.Second):
					t.Fatalf("%s is not known to have changed: %v", id, ports(b, id))
				}
			}
		}
		t.Logf("the last of 20 knows of a change %s after EC2", time.Since(began).Round(time.Millisecond))
		for _, b := range books {
			if st := b.Status(); st.Source != Shared || st.Err != nil || st.Away != nil || time.Since(st.Read) > 2*beat {
				t.Errorf("status %+v", st)
			}
		}
	})
	t.Logf("EC2 calls in %d minutes: %d by one node that polls itself, %d by the poller of 20", minutes, alone, together)
	// Intervals are up to a tenth shorter than they could be, by chance; that
	// averages out.
	if together > alone+alone/50 || together < alone/2 {
		t.Errorf("20 nodes cost %d calls, one %d", together, alone)
	}
}

// A subscriber is told of the groups that concern it, and of what changes.
func TestOnlyWhatConcernsIt(t *testing.T) {
	inWorld(t, func(w *world) {
		w.cloud.rules = []vpc.SecurityGroupRule{rule("1", sgA, 80, sgB), rule("2", sgB, 81, sgC), {ID: "sgr-3", Group: sgA, Protocol: -1, FromPort: -1, ToPort: -1, PrefixList: "pl-1"}}
		w.cloud.members = map[vpc.SecurityGroupID][]netip.Prefix{sgB: {host("10.0.0.1"), host("10.0.0.2")}, sgC: {host("10.0.0.3")}}
		w.cloud.lists = map[vpc.PrefixListID]PrefixList{"pl-1": {1, []netip.Prefix{host("192.0.2.1")}}}
		w.poller(PollerOptions{})
		other := w.follower(Need{Groups: []vpc.SecurityGroupID{sgB, sgC}, Members: true})
		w.await(other)

		conn, err := w.at.dial(w.ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := send(conn, needMessage{Version: 1, Groups: []vpc.SecurityGroupID{sgA}, Members: true}); err != nil {
			t.Fatal(err)
		}
		// next is the next message that tells of something.
		number := uint64(0)
		next := func() update {
			t.Helper()
			for {
				_ = conn.SetReadDeadline(time.Now().Add(time.Minute))
				var u update
				if err := receive(conn, maxUpdate, &u); err != nil {
					t.Fatal(err)
				}
				if number++; u.Number != number || u.Version != 1 {
					t.Fatalf("message %d of version %d, want %d", u.Number, u.Version, number)
				}
				u.Number, u.Version, u.AgeMillis, u.EveryMillis = 0, 0, nil, 0
				if !cmp.Equal(u, update{}, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })) {
					return u
				}
			}
		}
		check := func(want string) {
			t.Helper()
			b, err := json.Marshal(next())
			if err != nil {
				t.Fatal(err)
			}
			got := strings.NewReplacer(`"version":0,"number":0,`, "", `,"everyMillis":0`, "").Replace(string(b))
			if got != want {
				t.Errorf("told\n%s\nwant\n%s", got, want)
			}
		}
		check(`{"groups":{"sg-0a":[{"id":"sgr-1","protocol":6,"fromPort":80,"toPort":80,"group":"sg-0b"},{"id":"sgr-3","protocol":-1,"fromPort":-1,"toPort":-1,"prefixList":"pl-1"}]},"lists":{"pl-1":{"version":1,"entries":["192.0.2.1/32"]}},"members":{"sg-0b":{"add":["10.0.0.1/32","10.0.0.2/32"]}}}`)
		w.cloud.set(func() { w.cloud.members[sgC] = nil; w.cloud.rules[1].FromPort = 82 }) // not its business
		w.cloud.set(func() { w.cloud.members[sgB] = []netip.Prefix{host("10.0.0.2"), host("10.0.0.9")} })
		check(`{"members":{"sg-0b":{"add":["10.0.0.9/32"],"remove":["10.0.0.1/32"]}}}`)
		w.cloud.set(func() { w.cloud.lists["pl-1"] = PrefixList{2, []netip.Prefix{host("192.0.2.2")}} })
		check(`{"lists":{"pl-1":{"version":2,"entries":["192.0.2.2/32"]}}}`)
		w.cloud.set(func() { w.cloud.rules = w.cloud.rules[:2] })
		check(`{"groups":{"sg-0a":[{"id":"sgr-1","protocol":6,"fromPort":80,"toPort":80,"group":"sg-0b"}]},"listsGone":["pl-1"]}`)
		if err := send(conn, needMessage{Version: 1, Groups: []vpc.SecurityGroupID{sgC}}); err != nil {
			t.Fatal(err)
		}
		check(`{"groups":{"sg-0c":[]},"groupsGone":["sg-0a"],"membersGone":["sg-0b"]}`)
		if m, _ := other.Current(); m.Groups[sgA] != nil || len(m.Members[sgC].Addrs) != 0 || !slices.Equal(ports(other, sgB), []int{82}) {
			t.Errorf("the other knows %+v", m)
		}
	})
}

// The poller dies: what was known stays, the node polls itself after the grace,
// and leaves it again when there is a poller.
func TestPollerDies(t *testing.T) {
	inWorld(t, func(w *world) {
		w.cloud.rules = []vpc.SecurityGroupRule{rule("1", sgA, 80, "")}
		w.poller(PollerOptions{})
		b := w.follower(need(sgA))
		w.await(b)
		w.kill()
		w.cloud.set(func() { w.cloud.rules[0].FromPort = 81 })
		calls := w.cloud.count()
		time.Sleep(DefaultGrace - time.Second) //nolint:forbidigo // of the bubble's clock
		if st := b.Status(); st.Source != Shared || st.Away == nil || !slices.Equal(ports(b, sgA), []int{80}) || w.cloud.count() != calls {
			t.Errorf("within the grace: %+v, ports %v, %d calls", st, ports(b, sgA), w.cloud.count()-calls)
		}
		// It comes back with nothing at first: its word counts when it is whole.
		w.cloud.set(func() { w.cloud.fail = ec2.NewError("RequestLimitExceeded", "slow down") })
		w.poller(PollerOptions{})
		time.Sleep(3 * time.Second) //nolint:forbidigo // of the bubble's clock
		if !slices.Equal(ports(b, sgA), []int{80}) {
			t.Errorf("a poller that knows nothing counts: ports %v", ports(b, sgA))
		}
		w.kill()
		w.cloud.set(func() { w.cloud.fail = nil })
		time.Sleep(2*DefaultGrace + 2*time.Second) //nolint:forbidigo // of the bubble's clock
		if st := b.Status(); st.Source != Own || st.Away == nil || st.Err != nil || !slices.Equal(ports(b, sgA), []int{81}) {
			t.Errorf("after the grace: %+v, ports %v", st, ports(b, sgA))
		}
		// A new group is known without the poller, too.
		b.Want(need(sgA, sgB))
		w.await(b)

		w.cloud.set(func() { w.cloud.rules[0].FromPort = 82 })
		p := w.poller(PollerOptions{})
		time.Sleep(5 * time.Second) //nolint:forbidigo // of the bubble's clock
		if st := b.Status(); st.Source != Shared || st.Away != nil || !slices.Equal(ports(b, sgA), []int{82}) {
			t.Errorf("with a new poller: %+v, ports %v", st, ports(b, sgA))
		}
		if subs, n := b.own.Counts(); subs != 1 || n != 0 {
			t.Errorf("the own polls go on: %d groups", n)
		}
		if _, n := p.Counts(); n != 2 {
			t.Errorf("the poller reads %d groups", n)
		}
	})
}

// A node without a poller to be found begins by itself.
func TestNoPollerThere(t *testing.T) {
	inWorld(t, func(w *world) {
		w.cloud.rules = []vpc.SecurityGroupRule{rule("1", sgA, 80, "")}
		var told []string
		b := w.book(BookOptions{Dial: w.at.dial, Away: func(err error) { told = append(told, err.Error()) }}, need(sgA))
		time.Sleep(2*DefaultGrace + time.Second) //nolint:forbidigo // of the bubble's clock
		if st := b.Status(); st.Source != Own || !slices.Equal(ports(b, sgA), []int{80}) {
			t.Errorf("%+v, ports %v", st, ports(b, sgA))
		}
		time.Sleep(time.Minute) //nolint:forbidigo // of the bubble's clock
		if len(told) != 1 || !strings.Contains(told[0], "connection refused") {
			t.Errorf("told %q, want the reason once", told)
		}
	})
}

// EC2 throttles: the poller slows down, the nodes stay with it and with what was
// known, and know why.
func TestThrottled(t *testing.T) {
	inWorld(t, func(w *world) {
		w.cloud.rules = []vpc.SecurityGroupRule{rule("1", sgA, 80, "")}
		w.poller(PollerOptions{})
		var books []*Book
		for range 20 {
			books = append(books, w.follower(need(sgA)))
		}
		time.Sleep(10 * time.Second) //nolint:forbidigo // of the bubble's clock
		w.cloud.set(func() {
			w.cloud.fail, w.cloud.calls = ec2.NewError("RequestLimitExceeded", "Request limit exceeded."), nil
		})
		time.Sleep(5 * time.Minute) //nolint:forbidigo // of the bubble's clock
		if n := w.cloud.count(); n < 5 || n > 20 {
			t.Errorf("%d refused calls in five minutes", n)
		}
		for _, b := range books {
			st := b.Status()
			if st.Source != Shared || ClassOf(st.Err) != ipam.ClassThrottled || !slices.Equal(ports(b, sgA), []int{80}) || time.Since(st.Read) < 4*time.Minute {
				t.Errorf("%+v, ports %v", st, ports(b, sgA))
			}
		}
		// Who waits for a group meanwhile is told.
		books[0].Want(need(sgA, sgB))
		ctx, cancel := context.WithTimeout(w.ctx, 5*time.Second)
		defer cancel()
		if err := books[0].Await(ctx, books[0].Wanted()); ClassOf(err) != ipam.ClassThrottled {
			t.Errorf("await: %v", err)
		}
		w.cloud.set(func() { w.cloud.fail = nil })
		time.Sleep(10 * time.Minute) //nolint:forbidigo // of the bubble's clock
		w.cloud.set(func() { w.cloud.calls = nil })
		time.Sleep(time.Minute) //nolint:forbidigo // of the bubble's clock
		if n := w.cloud.count(); n < 70 || n > 100 {
			t.Errorf("%d calls a minute after it is over", n)
		}
	})
}

// So they do if the poller begins while EC2 throttles.
func TestThrottledFromTheStart(t *testing.T) {
	inWorld(t, func(w *world) {
		w.cloud.rules = []vpc.SecurityGroupRule{rule("1", sgA, 80, "")}
		w.cloud.fail = ec2.NewError("RequestLimitExceeded", "Request limit exceeded.")
		w.poller(PollerOptions{})
		var books []*Book
		for range 20 {
			books = append(books, w.follower(need(sgA)))
		}
		time.Sleep(5 * time.Minute) //nolint:forbidigo // of the bubble's clock
		if n := w.cloud.count(); n < 5 || n > 20 {
			t.Errorf("%d refused calls in five minutes", n)
		}
		w.cloud.set(func() { w.cloud.fail = nil })
		time.Sleep(time.Minute) //nolint:forbidigo // of the bubble's clock
		for _, b := range books {
			if st := b.Status(); st.Source != Shared || !slices.Equal(ports(b, sgA), []int{80}) {
				t.Errorf("%+v, ports %v", st, ports(b, sgA))
			}
		}
	})
}

// A poller that EC2 refuses for good is as good as away.
func TestPollerCannotRead(t *testing.T) {
	inWorld(t, func(w *world) {
		w.cloud.rules = []vpc.SecurityGroupRule{rule("1", sgA, 80, "")}
		own := &cloud{rules: w.cloud.rules}
		w.cloud.fail = ec2.NewError("UnauthorizedOperation", "no")
		w.poller(PollerOptions{})
		b := NewBook(BookOptions{Dial: w.at.dial})
		b.Want(need(sgA))
		w.wg.Go(func() { b.Run(w.ctx, own) })
		time.Sleep(2*DefaultGrace + time.Second) //nolint:forbidigo // of the bubble's clock
		if st := b.Status(); st.Source != Own || !slices.Equal(ports(b, sgA), []int{80}) {
			t.Errorf("%+v, ports %v", st, ports(b, sgA))
		}
		w.cloud.set(func() { w.cloud.fail = nil })
		time.Sleep(time.Minute) //nolint:forbidigo // of the bubble's clock
		if st := b.Status(); st.Source != Shared {
			t.Errorf("%+v", st)
		}
	})
}

// What one subscriber sends harms no other, and is answered with what is wrong.
func TestBadInput(t *testing.T) {
	framed := func(body string) []byte {
		return append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)
	}
	many := `{"version":1,"groups":["sg-0"` + strings.Repeat(`,"sg-0"`, maxGroups) + `]}`
	inWorld(t, func(w *world) {
		w.cloud.rules = []vpc.SecurityGroupRule{rule("1", sgA, 80, "")}
		p := w.poller(PollerOptions{})
		good := w.follower(need(sgA))
		w.await(good)
		for name, c := range map[string]struct {
			in   []byte
			want string
		}{
			"too long":      {[]byte{0xff, 0xff, 0xff, 0xff}, "at most"},
			"not JSON":      {framed("GET / HTTP/1.1"), "decode"},
			"empty":         {framed(""), "decode"},
			"other version": {framed(`{"version":2,"groups":[]}`), "protocol version 1, the agent 2"},
			"no ID":         {framed(`{"version":1,"groups":["sg-0a","*"]}`), `"*" is no ID`},
			"wrong type":    {framed(`{"version":1,"groups":{}}`), "decode"},
			"too many":      {framed(many), "at most 8192"},
		} {
			conn, err := w.at.dial(w.ctx)
			if err != nil {
				t.Fatal(err)
			}
			go func() { _, _ = conn.Write(c.in) }() // it need not be read to the end
			_ = conn.SetReadDeadline(time.Now().Add(time.Minute))
			var u update
			if err := receive(conn, maxUpdate, &u); err != nil || !strings.Contains(u.Refused, c.want) || len(u.Groups) != 0 {
				t.Errorf("%s: answer %+v, error %v", name, u, err)
			}
			conn.Close()
		}
		// One that says nothing, and one that stops in the middle.
		silent, err := w.at.dial(w.ctx)
		if err != nil {
			t.Fatal(err)
		}
		half, err := w.at.dial(w.ctx)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = half.Write([]byte{0, 0, 0, 9, '{'})
		half.Close()
		// One that asks and does not listen is dropped.
		deaf, err := w.at.dial(w.ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := send(deaf, needMessage{Version: 1, Groups: []vpc.SecurityGroupID{sgA}}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute) //nolint:forbidigo // of the bubble's clock
		if subs, n := p.Counts(); subs != 2 || n != 1 {
			t.Errorf("%d subscribers with %d groups, want the good and the silent one", subs, n)
		}
		silent.Close()
		deaf.Close()
		w.cloud.set(func() { w.cloud.rules[0].FromPort = 81 })
		time.Sleep(time.Second) //nolint:forbidigo // of the bubble's clock
		if st := good.Status(); st.Source != Shared || st.Away != nil || !slices.Equal(ports(good, sgA), []int{81}) {
			t.Errorf("%+v, ports %v", st, ports(good, sgA))
		}
	})
}

// What a poller tells that makes no sense is not taken, and the node helps itself.
func TestBadPoller(t *testing.T) {
	for name, says := range map[string][]string{
		"not JSON":       {"hello"},
		"other version":  {`{"version":9,"number":1}`},
		"a gap":          {`{"version":1,"number":1,"groups":{"sg-0a":[]}}`, `{"version":1,"number":3}`},
		"no protocol":    {`{"version":1,"number":1,"groups":{"sg-0a":[{"id":"sgr-1","protocol":999}]}}`},
		"no member":      {`{"version":1,"number":1,"groups":{"sg-0a":[]},"members":{"sg-0b":{"remove":["10.0.0.1/32"]}}}`},
		"no range":       {`{"version":1,"number":1,"lists":{"pl-1":{"version":1,"entries":["10.0.0.1/8"]}}}`},
		"no address":     {`{"version":1,"number":1,"groups":{"sg-0a":[{"id":"sgr-1","protocol":6,"cidr":"10.0.0.0.0/8"}]}}`},
		"refused":        {`{"version":1,"number":1,"refused":"go away"}`},
		"silence":        {`{"version":1,"number":1}`},
		"group unasked":  {`{"version":1,"number":1,"groups":{"":[]}}`},
		"nothing at all": {},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				w.cloud.rules = []vpc.SecurityGroupRule{rule("1", sgA, 80, "")}
				at := newPipes()
				w.wg.Go(func() {
					for {
						conn, err := at.Accept()
						if err != nil {
							return
						}
						go func() {
							var m needMessage
							_ = receive(conn, maxNeed, &m)
							for _, s := range says {
								_, _ = conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...))
							}
							_ = receive(conn, maxNeed, &m) // until it hangs up
							conn.Close()
						}()
					}
				})
				var away error
				b := w.book(BookOptions{Dial: at.dial, Away: func(err error) { away = err }}, need(sgA))
				time.Sleep(time.Minute) //nolint:forbidigo // of the bubble's clock
				at.Close()
				synctest.Wait()
				// What comes before a gap makes sense, and is taken.
				if st := b.Status(); name != "a gap" && (st.Source != Own || !slices.Equal(ports(b, sgA), []int{80})) {
					t.Errorf("%+v, ports %v", st, ports(b, sgA))
				}
				if away == nil {
					t.Error("nobody was told")
				}
			})
		})
	}
}

// A poller sends no more requests than its budget, whatever it is asked for.
func TestBudget(t *testing.T) {
	inWorld(t, func(w *world) {
		n := Need{}
		for i := range 2000 { // ten requests a read
			n.Groups = append(n.Groups, vpc.SecurityGroupID(fmt.Sprintf("sg-%08x", i)))
		}
		slices.Sort(n.Groups)
		w.poller(PollerOptions{Rate: 2})
		b := w.follower(n)
		w.await(b)
		w.cloud.set(func() { w.cloud.calls = nil })
		time.Sleep(10 * time.Minute) //nolint:forbidigo // of the bubble's clock
		if got := w.cloud.count(); got > 1200+Burst || got < 1000 {
			t.Errorf("%d requests in ten minutes with a budget of 1200 and %d at once", got, Burst)
		}
	})
}

func TestUnneededIsForgotten(t *testing.T) {
	inWorld(t, func(w *world) {
		w.cloud.rules = []vpc.SecurityGroupRule{rule("1", sgA, 80, sgB)}
		p := NewPoller(PollerOptions{})
		w.wg.Go(func() { p.Run(w.ctx, w.cloud) })
		one, two := p.Subscribe(), p.Subscribe()
		n := Need{Groups: []vpc.SecurityGroupID{sgA}, Members: true}
		one.Want(n)
		time.Sleep(time.Second) //nolint:forbidigo // of the bubble's clock
		calls := w.cloud.count()
		two.Want(n)
		if now, _ := two.Current(); !now.Holds(n) || w.cloud.count() != calls {
			t.Error("what one needs is not known to the other")
		}
		one.Close()
		two.Close()
		two.Close()
		time.Sleep(time.Second) //nolint:forbidigo // of the bubble's clock
		calls = w.cloud.count()
		time.Sleep(time.Hour) //nolint:forbidigo // of the bubble's clock
		if w.cloud.count() != calls {
			t.Errorf("%d calls for nobody", w.cloud.count()-calls)
		}
		w.cloud.set(func() { w.cloud.rules[0].FromPort = 81 })
		three := p.Subscribe()
		three.Want(n)
		if now, _ := three.Current(); now.Holds(n) {
			t.Error("what nobody needed for an hour is known still")
		}
		time.Sleep(time.Second) //nolint:forbidigo // of the bubble's clock
		if now, _ := three.Current(); !now.Holds(n) || now.Groups[sgA].Rules[0].FromPort != 81 {
			t.Errorf("%+v", now)
		}
	})
}

// Any snapshot becomes any other by what is told between them.
func TestAnyToAny(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	some := func(n int) (out []netip.Prefix) {
		for range r.IntN(n) {
			out = append(out, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(r.IntN(2)), byte(r.IntN(20))}), 32))
		}
		slices.SortFunc(out, netip.Prefix.Compare)
		return slices.Compact(out)
	}
	random := func(was *Snapshot) *Snapshot {
		s := newSnapshot()
		for i := range 6 {
			id := vpc.SecurityGroupID(fmt.Sprintf("sg-%d", i))
			switch r.IntN(3) {
			case 0:
				g := &Group{Rules: []vpc.SecurityGroupRule{}}
				for j := range r.IntN(4) {
					g.Rules = append(g.Rules, vpc.SecurityGroupRule{ID: fmt.Sprint("sgr-", j), Group: id, Egress: r.IntN(2) == 0, Protocol: r.IntN(257) - 1, FromPort: r.IntN(3) - 1, ToPort: r.IntN(65537) - 1, Referenced: sgA})
				}
				s.Groups[id] = g
				s.Members[id] = &Membership{Addrs: some(30)}
				s.Lists[vpc.PrefixListID(fmt.Sprint("pl-", i))] = &PrefixList{Version: int64(r.IntN(3)), Entries: append([]netip.Prefix{}, some(5)...)}
			case 1:
				if was.Groups[id] != nil {
					s.Groups[id], s.Members[id] = was.Groups[id], was.Members[id]
				}
			}
		}
		return s
	}
	same := cmp.Options{cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })}
	here, there := newSnapshot(), newSnapshot()
	for i := range 3000 {
		next := random(here)
		b, err := json.Marshal(between(here, next))
		if err != nil {
			t.Fatal(err)
		}
		var u update
		if err := json.Unmarshal(b, &u); err != nil {
			t.Fatal(err)
		}
		before := cmpClone(there)
		after, err := u.apply(there)
		if err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		if d := cmp.Diff(before, there, same); d != "" {
			t.Fatalf("step %d changed what somebody has:\n%s", i, d)
		}
		for _, m := range []map[vpc.SecurityGroupID]*Membership{after.Members, next.Members} {
			for _, v := range m {
				if len(v.Addrs) == 0 {
					v.Addrs = nil
				}
			}
		}
		if d := cmp.Diff(next, after, same); d != "" {
			t.Fatalf("step %d (-want +got):\n%s", i, d)
		}
		here, there = next, after
	}
}

func cmpClone(s *Snapshot) *Snapshot {
	out := &Snapshot{Groups: map[vpc.SecurityGroupID]*Group{}, Lists: maps.Clone(s.Lists), Members: map[vpc.SecurityGroupID]*Membership{}}
	for id, g := range s.Groups {
		out.Groups[id] = &Group{Rules: slices.Clone(g.Rules)}
	}
	for id, m := range s.Members {
		out.Members[id] = &Membership{Addrs: slices.Clone(m.Addrs)}
	}
	return out
}

func FuzzMessages(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x1b{\"version\":1,\"groups\":[]}  "))
	f.Add([]byte("\x00\x00\x00\x51{\"version\":1,\"number\":1,\"groups\":{\"sg-0a\":[]},\"members\":{\"sg-0b\":{\"add\":[\"::/0\"]}}}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var m needMessage
		if err := receive(strings.NewReader(string(b)), maxNeed, &m); err == nil {
			if n, err := m.need(); err == nil && !slices.IsSorted(n.Groups) {
				t.Errorf("need %v", n)
			}
		}
		var u update
		if err := receive(strings.NewReader(string(b)), maxUpdate, &u); err != nil {
			return
		}
		s, err := u.apply(newSnapshot())
		if err != nil {
			return
		}
		again, err := between(newSnapshot(), s).apply(newSnapshot())
		if err != nil {
			t.Fatalf("%s is taken, and refused when it is told on: %v", b, err)
		}
		if !maps.EqualFunc(s.Members, again.Members, func(a, b *Membership) bool { return slices.Equal(a.Addrs, b.Addrs) }) {
			t.Errorf("%v became %v", s.Members, again.Members)
		}
	})
}
