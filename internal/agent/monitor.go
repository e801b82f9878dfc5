package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/datapath"
	"github.com/underlay-cni/underlay/internal/policy"
)

// Verdicts is what a monitor needs of the kernel; see package datapath.
type Verdicts interface {
	Monitor(ctx context.Context, perSecond int, fn func(datapath.Event)) (lost uint64, err error)
	EventsLost() (uint64, error)
}

// The programs tell verdicts only while somebody watches: until monitorLinger
// after the latest question. maxVerdicts are held for who asks; monitorWait is
// how long a question waits for the first.
const (
	monitorLinger = 3 * time.Second
	monitorWait   = time.Second
	maxVerdicts   = 4096
	// An answer has this many at most, to stay within a message.
	answerVerdicts = 1000
)

// monitor hands verdicts to those who ask.
type monitor struct {
	a *Agent
	v Verdicts

	// mu guards the fields below.
	mu      sync.Mutex
	stop    context.CancelFunc // nil: nobody watches
	idle    *time.Timer
	rate    int
	next    uint64 // number of the verdict that comes next; the first is 1
	held    []datapath.Event
	news    chan struct{} // closed when a verdict has come
	lost    uint64        // by the kernel's count, when it was last told
	failure error         // why the latest watch ended
}

func newMonitor(a *Agent, v Verdicts) *monitor {
	return &monitor{a: a, v: v, next: 1, news: make(chan struct{})}
}

// watch has the programs tell verdicts, at this rate or more. mu is held.
func (m *monitor) watch(rate int) {
	if m.stop != nil && rate <= m.rate {
		m.idle.Reset(monitorLinger)
		return
	}
	if m.stop != nil {
		m.stop() // it begins again, faster, when the next question comes
		m.rate = rate
		return
	}
	ctx, stop := context.WithCancel(context.Background())
	m.stop, m.rate, m.failure = stop, max(rate, m.rate), nil
	m.idle = time.AfterFunc(monitorLinger, stop)
	m.lost, _ = m.v.EventsLost()
	rate = m.rate
	go func() {
		_, err := m.v.Monitor(ctx, rate, m.add)
		m.mu.Lock()
		defer m.mu.Unlock()
		stop()
		m.idle.Stop()
		m.stop, m.failure = nil, err
		close(m.news)
		m.news = make(chan struct{})
	}()
}

func (m *monitor) add(e datapath.Event) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.next++
	m.held = append(m.held, e)
	if len(m.held) >= 2*maxVerdicts {
		m.held = append([]datapath.Event(nil), m.held[len(m.held)-maxVerdicts:]...)
	}
	close(m.news)
	m.news = make(chan struct{})
}

// after returns the verdicts behind a number, waiting for the first a while.
func (m *monitor) after(ctx context.Context, number uint64, rate int) (events []datapath.Event, next, lost uint64, err error) {
	wait := time.NewTimer(monitorWait)
	defer wait.Stop()
	for {
		m.mu.Lock()
		if m.failure != nil {
			err := m.failure
			m.failure = nil
			m.mu.Unlock()
			return nil, number, 0, err
		}
		m.watch(rate)
		if number == 0 || number > m.next {
			number = m.next
		}
		if n := m.next - number; n > 0 {
			if n > uint64(len(m.held)) {
				lost = n - uint64(len(m.held))
				number += lost
			}
			events = append(events, m.held[uint64(len(m.held))-(m.next-number):]...)
			if len(events) > answerVerdicts {
				events = events[:answerVerdicts]
			}
			next = number + uint64(len(events))
			if now, err := m.v.EventsLost(); err == nil && now > m.lost {
				lost, m.lost = lost+now-m.lost, now
			}
			m.mu.Unlock()
			return events, next, lost, nil
		}
		news := m.news
		m.mu.Unlock()
		select {
		case <-news:
		case <-wait.C:
			return nil, number, 0, nil
		case <-ctx.Done():
			return nil, number, 0, ctx.Err()
		}
	}
}

// Monitor returns verdicts of the datapath, waiting for the first a while.
func (a *Agent) Monitor(ctx context.Context, q agentapi.MonitorQuery) (*agentapi.Verdicts, error) {
	if a.monitor == nil {
		return nil, agentapi.Errorf(agentapi.CodeNotAvailable, "this agent's datapath tells no verdicts")
	}
	if q.PerSecond < 0 || q.PerSecond > agentapi.MaxVerdicts {
		return nil, agentapi.Errorf(agentapi.CodeDecoding, "%d verdicts a second: ask for 1 to %d", q.PerSecond, agentapi.MaxVerdicts)
	}
	if q.PerSecond == 0 {
		q.PerSecond = agentapi.DefaultVerdicts
	}
	events, next, lost, err := a.monitor.after(ctx, q.After, q.PerSecond)
	switch {
	case errors.Is(err, datapath.ErrMonitored):
		return nil, agentapi.Errorf(agentapi.CodeTryAgain, "another program reads the node's verdicts; end it first")
	case err != nil:
		return nil, fmt.Errorf("monitor the datapath: %w", err)
	}
	out := &agentapi.Verdicts{Next: next, Lost: lost, Verdicts: make([]agentapi.Verdict, 0, len(events))}
	pods := a.podsByAddress()
	rules := a.gate.rules()
	for i := range events {
		out.Verdicts = append(out.Verdicts, verdictOf(&events[i], pods, rules))
	}
	return out, nil
}

// podsByAddress are the pods of the node.
func (a *Agent) podsByAddress() map[netip.Addr]agentapi.Pod {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := make(map[netip.Addr]agentapi.Pod, len(a.endpoints))
	for _, ep := range a.endpoints {
		out[ep.Addr] = agentapi.Pod{Namespace: ep.PodNamespace, Name: ep.PodName, UID: ep.PodUID}
	}
	return out
}

func verdictOf(e *datapath.Event, pods map[netip.Addr]agentapi.Pod, rules policy.Rules) agentapi.Verdict {
	v := agentapi.Verdict{
		Time: e.Time, Address: e.Addr, Pod: pods[e.Addr], Direction: "egress", Verdict: "allow", Reason: e.Reason,
		Src: e.Src, Dst: e.Dst, Protocol: e.Protocol, ICMPType: e.ICMPType, ICMPCode: e.ICMPCode, Bytes: e.Bytes,
	}
	if e.Ingress {
		v.Direction = "ingress"
	}
	if e.Provenance != 0 {
		v.Path = e.Provenance.String()
	}
	for g, id := range e.Rules {
		if e.Audit[g] {
			v.Verdict = "audit"
		}
		if policy.RuleID(id) != policy.NoRule {
			name := rules.Name(policy.RuleID(id))
			if name == "" {
				name = strconv.FormatUint(uint64(id), 10)
			}
			v.Rules = append(v.Rules, name)
		}
	}
	if e.Reason != "" {
		v.Verdict = "drop"
	}
	return v
}
