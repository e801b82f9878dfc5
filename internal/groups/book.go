package groups

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/underlay-cni/underlay/internal/ipam"
)

// DefaultGrace is how long a book waits for its poller before it polls itself, up
// to twice that: those that lost the same poller do not begin together.
const DefaultGrace = 5 * time.Second

const (
	// tooOld is the age at which what a poller knows counts as if it were away,
	// unless EC2 throttles it: then one more who asks would make it worse.
	tooOld = time.Minute
	// redial is the first delay before the poller is tried again, doubled up to
	// redialMost.
	redial     = 100 * time.Millisecond
	redialMost = 2 * time.Second
)

// Source is where a Book has what it knows from.
type Source string

const (
	Own    Source = "own"    // it polls itself
	Shared Source = "poller" // it follows one that others follow, too
)

// BookOptions configure a Book.
type BookOptions struct {
	PollerOptions // of its own polls
	// Dial connects to the poller that it is to follow; nil: there is none.
	Dial  func(context.Context) (net.Conn, error)
	Grace time.Duration // 0: DefaultGrace
	// Away is told each reason why the poller is not followed; may be nil.
	Away func(error)
}

// Book keeps what one node needs, as EC2 shows it.
type Book struct {
	o   BookOptions
	own *Poller

	mu      sync.Mutex
	wanted  Need
	changed chan struct{} // closed when wanted is another
	now     *Snapshot
	news    chan struct{} // closed when now is another
	// source is whom now follows; its first snapshot is taken when it is whole.
	source Source
	whole  bool
	shared Status // of the poller
	away   error  // why it is not followed, nil when it is
}

// NewBook returns a book that knows nothing until Run is called.
func NewBook(o BookOptions) *Book {
	if o.Grace == 0 {
		o.Grace = DefaultGrace
	}
	if o.Away == nil {
		o.Away = func(error) {}
	}
	b := &Book{o: o, own: NewPoller(o.PollerOptions), changed: make(chan struct{}), now: newSnapshot(), news: make(chan struct{}), source: Own, whole: true}
	if o.Dial != nil {
		b.source, b.whole = Shared, false
	}
	return b
}

// Want says what is needed from now on.
func (b *Book) Want(n Need) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.wanted.Equal(n) {
		return
	}
	b.wanted = n
	close(b.changed)
	b.changed = make(chan struct{})
}

func (b *Book) need() (Need, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.wanted, b.changed
}

// Current returns what is known, and what closes when that has changed.
func (b *Book) Current() (*Snapshot, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.now, b.news
}

// Await waits until all that is needed is known; it must be wanted. An error is
// that of the last read, or why ctx has ended.
func (b *Book) Await(ctx context.Context, n Need) error {
	for {
		now, news := b.Current()
		if now.Holds(n) {
			return nil
		}
		select {
		case <-news:
		case <-ctx.Done():
			s := b.Status()
			for _, err := range []error{s.Err, s.Away} {
				if err != nil {
					return err
				}
			}
			return context.Cause(ctx)
		}
	}
}

// BookStatus is where a book has what it knows from, and how up to date it is.
type BookStatus struct {
	Source Source
	Status
	Away error // why the poller is not followed, if it should be
}

// Status returns the book's. While a poller is away, its last word counts until
// the book polls itself.
func (b *Book) Status() BookStatus {
	b.mu.Lock()
	s := BookStatus{Source: b.source, Status: b.shared, Away: b.away}
	b.mu.Unlock()
	if s.Source == Own {
		s.Status = b.own.Status()
	}
	return s
}

// Wanted returns what was wanted last.
func (b *Book) Wanted() Need {
	n, _ := b.need()
	return n
}

// Run keeps the book until ctx ends.
func (b *Book) Run(ctx context.Context, from Reader) {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { b.own.Run(ctx, from) })
	wg.Go(func() { b.followOwn(ctx) })
	if b.o.Dial != nil {
		b.follow(ctx)
	}
	<-ctx.Done()
}

// followOwn takes what the own polls read, while they are what counts; else they
// are not wanted.
func (b *Book) followOwn(ctx context.Context) {
	sub := b.own.Subscribe()
	defer sub.Close()
	for {
		b.mu.Lock()
		n, changed := b.wanted, b.changed
		if b.source != Own {
			n = Need{}
		}
		b.mu.Unlock()
		sub.Want(n)
		now, news := sub.Current()
		b.take(Own, now)
		select {
		case <-news:
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// take puts what a source knows in the place of what was known. From one that
// has become the source just now it must be all that is needed: what the other
// said is better than nothing.
func (b *Book) take(from Source, s *Snapshot) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.source != from || !b.whole && !s.Holds(b.wanted) {
		return
	}
	b.whole = true
	if s.same(b.now) {
		return
	}
	b.now = s
	close(b.news)
	b.news = make(chan struct{})
}

// turn makes another the source.
func (b *Book) turn(to Source) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.source == to {
		return
	}
	b.source, b.whole = to, false
	close(b.changed) // for followOwn
	b.changed = make(chan struct{})
}

// follow follows the poller until ctx ends, and has the own polls take its place
// when it is away for longer than the grace.
func (b *Book) follow(ctx context.Context) {
	grace := b.o.Grace + rand.N(b.o.Grace)
	late := time.AfterFunc(grace, func() { b.turn(Own) })
	defer late.Stop()
	delay, told := redial, ""
	for ctx.Err() == nil {
		err := b.session(ctx, func() {
			late.Stop()
			delay, told = redial, ""
			b.turn(Shared)
		}, func() { late.Stop() }, func() { late.Reset(grace) })
		if ctx.Err() != nil {
			return
		}
		b.mu.Lock()
		b.away = fmt.Errorf("the poller of security groups is away: %w", err)
		err = b.away
		b.mu.Unlock()
		if err.Error() != told {
			told = err.Error()
			b.o.Away(err)
		}
		select {
		case <-time.After(delay/2 + rand.N(delay)):
		case <-ctx.Done():
		}
		delay = min(2*delay, redialMost)
	}
}

// session follows the poller over one connection. well is called each time the
// poller has told all that is needed and is up to date, slow when it has not
// because EC2 throttles it: own reads would then make it worse. lost is called
// when it was one of both and is no longer.
func (b *Book) session(ctx context.Context, well, slow, lost func()) error {
	dctx, cancel := context.WithTimeoutCause(ctx, patience, errors.New("no connection in time"))
	conn, err := b.o.Dial(dctx)
	cancel()
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	done := make(chan struct{})
	defer func() { close(done); conn.Close() }()
	b.mu.Lock()
	if b.source == Shared { // it begins with nothing, and we do not
		b.whole = false
	}
	b.mu.Unlock()
	wg.Go(func() {
		for {
			n, changed := b.need()
			_ = conn.SetWriteDeadline(time.Now().Add(patience))
			if err := send(conn, needMessage{Version: protocolVersion, Groups: append(n.Groups[:0:0], n.Groups...), Members: n.Members}); err != nil {
				conn.Close() // who reads sees it, too
				return
			}
			select {
			case <-changed:
			case <-done:
				return
			}
		}
	})
	followed := false
	defer func() {
		if followed {
			lost()
		}
	}()
	known := newSnapshot()
	for number := uint64(1); ; number++ {
		_ = conn.SetReadDeadline(time.Now().Add(silence))
		var u update
		if err := receive(conn, maxUpdate, &u); err != nil {
			if errors.Is(err, io.EOF) {
				err = errors.New("it hung up")
			}
			return err
		}
		switch {
		case u.Refused != "":
			return fmt.Errorf("it refuses: %s", u.Refused)
		case u.Version != protocolVersion:
			return fmt.Errorf("it speaks protocol version %d, the agent %d; install those of one release", u.Version, protocolVersion)
		case u.Number != number:
			return fmt.Errorf("its message %d came for %d", u.Number, number)
		}
		if known, err = u.apply(known); err != nil {
			return fmt.Errorf("it tells what makes no sense: %w", err)
		}
		now := time.Now()
		s := u.status(now)
		b.mu.Lock()
		b.shared, b.away = s, nil
		n := b.wanted
		b.mu.Unlock()
		throttled := ClassOf(s.Err) == ipam.ClassThrottled
		stale := s.Err != nil && !throttled && now.Sub(s.Read) > tooOld
		switch {
		case known.Holds(n) && !stale:
			followed = true
			well()
		case throttled:
			followed = true
			slow()
		case followed && stale:
			followed = false
			lost()
		}
		b.take(Shared, known)
	}
}
