package ipam

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// sketch writes down what of a model matters to its future: times as distances
// from now, as far as anything looks, and names by their rank.
type sketch struct {
	b     []byte
	now   time.Time
	addrs map[netip.Addr]uint16
	ids   map[vpc.ENIID]uint16
}

func (k *sketch) n(v ...int) {
	for _, x := range v {
		k.b = binary.AppendVarint(k.b, int64(x))
	}
}

func (k *sketch) bit(v ...bool) {
	for _, x := range v {
		if x {
			k.b = append(k.b, 1)
		} else {
			k.b = append(k.b, 0)
		}
	}
}

func (k *sketch) t(v ...time.Time) {
	for _, x := range v {
		if x.IsZero() {
			k.b = append(k.b, 'z')
			continue
		}
		k.n(int(min(max(x.Sub(k.now), -2*pressure), 2*pressure) / time.Millisecond))
	}
}

// recent is t for times that nothing looks at once ReadLag and the lingers are over.
func (k *sketch) recent(v ...time.Time) {
	for _, x := range v {
		if !x.IsZero() && k.now.Sub(x) > 8*time.Second {
			x = k.now.Add(-8 * time.Second)
		}
		k.t(x)
	}
}

func (k *sketch) addr(a netip.Addr) {
	r, ok := k.addrs[a]
	if !ok {
		r = uint16(len(k.addrs))
		k.addrs[a] = r
	}
	k.n(int(r))
}

func (k *sketch) id(i vpc.ENIID) {
	r, ok := k.ids[i]
	if !ok {
		r = uint16(len(k.ids))
		k.ids[i] = r
	}
	k.n(int(r))
}

func (k *sketch) backoff(b backoff) { k.t(b.until); k.n(b.steps) }

func (k *sketch) truth(e *vpc.ENI) {
	k.id(e.ID)
	k.n(len(e.Secondary), len(e.Prefixes), e.DeviceIndex)
	k.bit(e.Instance != "", e.DeleteOnTermination, e.Tags[TagPool] != "", vpc.NewGroupSet(e.Groups) == vpc.GroupSet(e.Tags[TagPool]))
	k.n(len(e.Tags[TagPool])) // the sets of tests differ in length
	k.addr(e.Primary)
	for _, a := range e.Secondary {
		k.addr(a)
	}
	for _, p := range e.Prefixes {
		k.addr(p.Addr())
	}
}

func (k *sketch) address(a *Address) {
	k.addr(a.Addr)
	k.n(int(a.State), len(a.Owner))
	k.b = append(k.b, a.Owner...)
	k.recent(a.Since, a.Assigned, a.Missing)
	k.t(a.Until)
	k.bit(a.Live, a.Reported, a.Prefix.IsValid())
}

func (k *sketch) flight(c *flight) {
	id, eni := mutation(c.act)
	k.id(eni)
	k.b = fmt.Appendf(k.b, "%T", c.act)
	switch a := c.act.(type) {
	case AssignAddresses:
		k.n(a.N)
	case AssignPrefixes:
		k.n(a.N)
	case CreateENI:
		k.n(a.N, a.Device, len(a.Pool.Groups))
	case AttachENI:
		k.n(a.Device)
	case Unassign:
		for _, x := range a.Addrs {
			k.addr(x)
		}
	}
	k.t(c.until)
	k.bit(c.ended != nil)
	_ = id // numbers differ from path to path
}

// key returns a name that two models share if nothing can tell them apart.
func (m *model) key() (out [16]byte) {
	k := &sketch{b: make([]byte, 0, 1024), now: m.now, addrs: map[netip.Addr]uint16{}, ids: map[vpc.ENIID]uint16{}}
	k.bit(m.up)
	k.t(m.timer)
	k.n(int(m.budget.faults), int(m.budget.lags), int(m.budget.crashes))
	for _, e := range m.enis {
		k.truth(e)
		k.bit(m.link[e.ID])
		k.t(m.unsure[e.ID])
		k.bit(m.moved[e.ID])
		k.recent(m.vacant[e.ID])
		for _, a := range e.Secondary {
			k.bit(m.live[a])
			k.recent(m.used[a], m.tombs[a])
		}
		for _, p := range e.Prefixes {
			k.bit(m.live[p.Addr()])
			k.recent(m.used[p.Addr()])
		}
	}
	for _, p := range m.pods {
		k.n(int(p.state))
		if p.state == podWaiting {
			k.t(p.deadline)
		}
		if p.state >= podHanded {
			k.addr(p.addr)
		}
	}
	k.n(len(m.past), len(m.calls), len(m.ghosts), len(m.reads), len(m.tombs))
	for _, p := range m.past {
		k.t(p.until)
		for i := range p.enis {
			k.truth(&p.enis[i])
		}
		k.n(-1)
	}
	for _, l := range m.left {
		k.addr(l.addr)
		k.id(l.eni)
		k.t(l.at)
	}
	k.n(-1)
	for i := range m.calls {
		k.flight(&m.calls[i])
	}
	for i := range m.ghosts {
		k.flight(&m.ghosts[i])
	}
	for _, r := range m.reads {
		k.n(int(r.src))
		k.recent(r.began)
	}
	k.state(&m.s)
	sum := sha256.Sum256(k.b)
	copy(out[:], sum[:])
	return out
}

func (k *sketch) state(s *State) {
	k.bit(s.Started, s.Known)
	for _, e := range s.ENIs {
		k.id(e.ID)
		k.n(e.Device, int(e.Phase), len(e.Addrs), len(e.Prefixes))
		k.bit(e.Managed, e.Keep, e.Link, e.Unsure, e.Full, e.Call != 0, e.Attachment != "", e.drifted())
		k.n(len(e.Pool.Groups))
		k.recent(e.Touched, e.Missing, e.NoNeed)
		if e.Phase == Detached {
			k.t(e.Since)
		}
		k.backoff(e.Retry)
		for _, a := range e.Addrs {
			k.address(a)
		}
	}
	for _, a := range s.Lost {
		k.address(a)
	}
	for _, r := range s.Waiting {
		k.b = append(k.b, r.Owner...) // whose pool does not change
		k.t(r.Deadline)
	}
	for _, id := range s.callIDs() {
		c := s.Calls[id]
		k.id(c.ENI)
		k.n(int(c.Kind), c.N, c.Device)
		k.bit(c.Prefix, c.Retry)
		k.n(len(c.Pool.Groups))
	}
	for _, r := range s.Reads {
		k.t(r.wanted)
		k.recent(r.began)
		k.bit(r.inFlight)
		k.backoff(r.retry)
		k.n(min(r.polls, 5))
	}
	k.backoff(s.Mutate)
	for _, p := range s.Pace {
		k.t(p.until, p.last)
		k.n(p.window, p.least, int(p.tries))
	}
	for _, subnet := range []vpc.SubnetID{nodeSubnet, otherPool.Subnet} {
		if t := s.Subnets[subnet]; t != nil {
			k.backoff(t.full)
			k.backoff(t.noPrefix)
			k.n(t.chunk)
		}
	}
	for _, pool := range []Pool{{}, otherPool, thirdPool} {
		if t := s.Trouble[pool]; t != nil {
			k.n(int(t.Kind))
		}
		k.t(s.overflow[pool])
	}
	k.t(s.slotsOut)
	gone := make([]netip.Addr, 0, len(s.Gone))
	for a := range s.Gone {
		gone = append(gone, a)
	}
	slices.SortFunc(gone, netip.Addr.Compare)
	for _, a := range gone {
		k.addr(a)
		k.recent(s.Gone[a])
	}
	k.n(len(s.GoneENI))
}

// explorer visits all that can happen to a model up to a depth.
type explorer struct {
	seen  map[[16]byte]uint8 // with how many moves left it was visited
	path  []move
	steps int
	calms int
	every int // one state in so many must settle
}

func (x *explorer) visit(m *model, left int) error {
	k := m.key()
	if old, ok := x.seen[k]; ok && int(old) >= left {
		return nil
	} else if !ok && x.every > 0 && int(binary.LittleEndian.Uint16(k[:]))%x.every == 0 {
		x.calms++
		if err := m.clone().settle(); err != nil {
			return err
		}
	}
	x.seen[k] = uint8(left)
	if left == 0 {
		return nil
	}
	for _, v := range m.moves() {
		c := m.clone()
		x.steps++
		x.path = append(x.path, v)
		err := c.apply(v)
		if errors.Is(err, errVoid) {
			err = nil
		} else if err == nil {
			err = x.visit(c, left-1)
		}
		if err != nil {
			return err
		}
		x.path = x.path[:len(x.path)-1]
	}
	return nil
}

// replay tells the story of a path.
func replay(t *testing.T, m *model, path []move) {
	m.log = t.Logf
	for _, v := range path {
		t.Logf("%12s %s %v", m.now.Sub(epoch), v, m.flying(v))
		if m.apply(v) != nil {
			return
		}
	}
	m.settle()
}

// envInt returns a number from the environment, for deeper runs by hand.
func envInt(name string, or int) int {
	if n, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return n
	}
	return or
}

// starts are the states from which everything is tried.
func starts(t testing.TB, b budget) map[string]func() *model {
	calm := func(m *model, bind ...int) *model {
		if err := m.calmFor(time.Minute); err != nil {
			t.Fatal(err)
		}
		for _, i := range bind {
			if err := m.apply(move{kind: moveAdd, i: i}); err != nil {
				t.Fatal(err)
			}
			if err := m.calmFor(time.Minute); err != nil {
				t.Fatal(err)
			}
		}
		m.budget = b
		return m
	}
	small := func() *model { return newModel(modelConfig(2, 3), 2, budget{}) }
	return map[string]func() *model{
		"cold":     func() *model { return newModel(modelConfig(2, 3), 2, b) },
		"idle":     func() *model { return calm(small()) },
		"one pod":  func() *model { return calm(small(), 0) },
		"two pods": func() *model { return calm(small(), 0, 1) },

		"idle, two pools":     func() *model { return calm(small().mixed()) },
		"two pods, two pools": func() *model { return calm(small().mixed(), 0, 1) },

		"two sets, one interface for them": func() *model { return calm(small().crowded(), 0) },
	}
}

// TestModelRandom walks far, on larger nodes. MODEL_SEED repeats one walk,
// MODEL_WALKS makes more: 6,000 take a minute and a half.
func TestModelRandom(t *testing.T) {
	first, n := 1, envInt("MODEL_WALKS", 100)
	if s := envInt("MODEL_SEED", 0); s > 0 {
		first, n = s, 1
	}
	steps := 0
	for seed := first; seed < first+n; seed++ {
		path, start, err := walk(uint64(seed), envInt("MODEL_LENGTH", 1500))
		steps += len(path)
		if err != nil {
			replay(t, start(), path)
			t.Fatalf("model: seed %d after %d moves: %v", seed, len(path), err)
		}
	}
	t.Logf("%d walks, %d moves", n, steps)
}

// TestModelFound repeats the walks that once found something beyond those that
// are always made.
func TestModelFound(t *testing.T) {
	for _, seed := range []uint64{425} {
		path, start, err := walk(seed, 1500)
		if err != nil {
			replay(t, start(), path)
			t.Fatalf("model: seed %d after %d moves: %v", seed, len(path), err)
		}
	}
}

// TestModelExhaustive tries everything that can happen to a node of two
// interfaces, two addresses and two pods, for so many moves. MODEL_DEPTH goes
// deeper: seven moves take half a minute on two cores, some quarter of a million
// states.
func TestModelExhaustive(t *testing.T) {
	depth := envInt("MODEL_DEPTH", 6)
	for name, start := range starts(t, budget{faults: 1, lags: 1, crashes: 1}) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x := &explorer{seen: map[[16]byte]uint8{}, every: envInt("MODEL_SETTLE", 50)}
			if err := x.visit(start(), depth); err != nil {
				replay(t, start(), x.path)
				t.Fatalf("model: %v", err)
			}
			t.Logf("depth %d: %d states, %d steps, %d settled", depth, len(x.seen), x.steps, x.calms)
		})
	}
}

// walk makes a random walk and lets it settle.
func walk(seed uint64, length int) (path []move, start func() *model, err error) {
	rng := rand.New(rand.NewPCG(seed, 7))
	cfg, pods := modelConfig(2, 3), 3
	if seed%2 == 0 {
		cfg, pods = modelConfig(4, 8), 30
	}
	cfg.Prefixes = seed%4 == 0
	cfg.Seed = seed
	start = func() *model {
		m := newModel(cfg, pods, budget{faults: 40, lags: 60, crashes: 6})
		switch seed % 3 {
		case 0:
			m.mixed()
		case 1:
			m.crowded()
		}
		return m
	}
	m := start()
	for range length {
		v := choose(m, rng)
		was := m
		if v.die > 0 {
			was = m.clone()
		}
		err := m.apply(v)
		if errors.Is(err, errVoid) {
			m = was
			continue
		}
		path = append(path, v)
		if err != nil {
			return path, start, err
		}
	}
	return path, start, m.settle()
}

// choose picks a move: what should happen more often than what should not.
func choose(m *model, rng *rand.Rand) move {
	moves := m.moves()
	moves = slices.DeleteFunc(moves, func(v move) bool {
		if v.kind == moveCrash || v.die > 0 || v.kind == moveDelete && v.how == 1 {
			return rng.IntN(60) > 0
		}
		return v.how > 0 && rng.IntN(8) > 0 || v.kind == moveCancel && rng.IntN(6) > 0
	})
	if len(moves) == 0 {
		return move{kind: movePass, d: time.Second}
	}
	// One kind first: there are many pods, and few calls.
	kinds := map[moveKind]bool{}
	var order []moveKind
	for _, v := range moves {
		if !kinds[v.kind] {
			kinds[v.kind] = true
			order = append(order, v.kind)
		}
	}
	kind := order[rng.IntN(len(order))]
	moves = slices.DeleteFunc(moves, func(v move) bool { return v.kind != kind })
	return moves[rng.IntN(len(moves))]
}

// flying says what a move is about.
func (m *model) flying(v move) string {
	switch v.kind {
	case moveEnd, moveEffect:
		return fmt.Sprintf("%T%+v", m.calls[v.i].act, m.calls[v.i].act)
	case moveGhost:
		return fmt.Sprintf("%T%+v", m.ghosts[v.i].act, m.ghosts[v.i].act)
	case moveRead:
		return fmt.Sprintf("%s, began %s ago", m.reads[v.i].src, m.now.Sub(m.reads[v.i].began))
	}
	return ""
}
