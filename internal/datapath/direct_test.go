package datapath

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// connections returns the entries between two addresses.
func connections(t testing.TB, d *Datapath, a, b netip.Addr) (out []Connection) {
	t.Helper()
	for c, err := range d.Connections() {
		if err != nil {
			t.Fatal(err)
		}
		if c.Opener.Addr == a && c.Responder.Addr == b || c.Opener.Addr == b && c.Responder.Addr == a {
			out = append(out, c)
		}
	}
	return out
}

// serve accepts TCP connections in a namespace and sends back what comes.
func (w *world) serve(netns string, at netip.AddrPort) {
	w.t.Helper()
	w.accept(netns, at, func(c net.Conn) { _, _ = io.Copy(c, c) })
}

// accept has each TCP connection in a namespace served until the test ends.
func (w *world) accept(netns string, at netip.AddrPort, serve func(net.Conn)) {
	w.t.Helper()
	var l net.Listener
	err := nl.Do(nl.Path(netns), func() (err error) {
		l, err = net.Listen("tcp4", at.String())
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				serve(c)
			}()
		}
	}()
}

// dial connects from an address of a namespace.
func (w *world) dial(netns string, from netip.Addr, to netip.AddrPort) (*net.TCPConn, error) {
	w.t.Helper()
	return w.dialFrom(netns, netip.AddrPortFrom(from, 0), to)
}

func (w *world) dialFrom(netns string, from, to netip.AddrPort) (*net.TCPConn, error) {
	w.t.Helper()
	var c net.Conn
	err := nl.Do(nl.Path(netns), func() (err error) {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(from), Timeout: 5 * time.Second}
		c, err = d.Dial("tcp4", to.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	w.t.Cleanup(func() { _ = c.Close() })
	return c.(*net.TCPConn), nil
}

// exchange sends n bytes and reads them back.
func exchange(c net.Conn, n int) error {
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(make([]byte, n))
		sent <- err
	}()
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.CopyN(io.Discard, c, int64(n)); err != nil {
		return err
	}
	return <-sent
}

// What the VPC's addresses say to each other bypasses the stack from the first
// packet to the last, in both directions.
func TestDirect(t *testing.T) {
	w := newWorld(t)
	d := w.open(Options{})
	a, b := w.addPod(d, 1), w.addPod(d, 2)
	w.serve(w.wire, netip.AddrPortFrom(farIP, 80))
	w.serve(b.ns, netip.AddrPortFrom(b.Addr, 80))
	for name, way := range map[string]struct {
		ns       string
		from, to netip.Addr
		local    bool
	}{
		"pod to wire": {a.ns, a.Addr, farIP, false},
		"pod to pod":  {a.ns, a.Addr, b.Addr, true},
		"wire to pod": {w.wire, farIP, b.Addr, false},
	} {
		t.Run(name, func(t *testing.T) {
			before := paths(t, d)
			c, err := w.dial(way.ns, way.from, netip.AddrPortFrom(way.to, 80))
			if err != nil {
				t.Fatal(err)
			}
			if err := exchange(c, 1<<20); err != nil {
				t.Fatal(err)
			}
			after := paths(t, d)
			if after.Direct == before.Direct || after.Stack != before.Stack || after.Exceptions != before.Exceptions {
				t.Errorf("paths: %+v, then %+v", before, after)
			}
			var tcp Connection
			for _, c := range connections(t, d, way.from, way.to) {
				if c.Protocol == unix.IPPROTO_TCP {
					tcp = c
				}
			}
			if tcp.Opener.Addr != way.from || tcp.Provenance != Direct || tcp.State != ConnEstablished || tcp.Local != way.local {
				t.Errorf("%+v", tcp)
			}
			if tcp.Opener.Bytes < 1<<20 || tcp.Responder.Bytes < 1<<20 || tcp.Opener.Packets < (1<<20)/9001 {
				t.Errorf("counted %+v, %+v", tcp.Opener, tcp.Responder)
			}
			c.Close()
		})
	}
	for reason, n := range counters(t, d) {
		if n != 0 {
			t.Errorf("%d packets dropped: %s", n, reason)
		}
	}
}

// Who monitors hears of what begins and of what is dropped, and how much went
// without.
// A flow is over after the idle times of its pod's ENI, whoever begins it and
// whoever forwards it; on another ENI the usual ones count.
func TestIdleTimesOfAnENI(t *testing.T) {
	f := newFleet(t, Options{Direct: true})
	own := vpc.IdleTimeouts{TCPEstablished: 350 * time.Second, UDP: 45 * time.Second, UDPStream: 60 * time.Second}
	all := fleetENIs(0)
	all[1].Idle = own // near1's
	if err := f.d.SetENIs(ctx, all); err != nil {
		t.Fatal(err)
	}
	usual := vpc.IdleTimeouts{TCPEstablished: 432000 * time.Second, UDP: 30 * time.Second, UDPStream: 180 * time.Second}
	port := uint16(8000)
	for _, direct := range []bool{true, false} {
		var stack []netip.Prefix
		if !direct {
			stack = []netip.Prefix{fleetVPC}
		}
		f.d.eniMu.Lock()
		err := f.d.setNets([]netip.Prefix{fleetVPC}, stack)
		f.d.eniMu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		for _, tt := range []struct {
			name     string
			pod      pod
			want     vpc.IdleTimeouts
			podFirst bool
		}{
			{"an ENI with its own, outwards", f.near1, own, true},
			{"an ENI with its own, inwards", f.near1, own, false},
			{"another ENI", f.near0, usual, true},
		} {
			f.d.forgetConns(t)
			from, fromAddr, to, toAddr := tt.pod.ns, tt.pod.Addr, f.client, clientIP
			if !tt.podFirst {
				from, fromAddr, to, toAddr = to, toAddr, from, fromAddr
			}
			idle := func(protocol uint8) time.Duration {
				for _, c := range connections(t, f.d, fromAddr, toAddr) {
					if c.Protocol == protocol && (c.Provenance == Direct) == direct && !c.Midflow { // not the late ACK of the one before
						return c.Timeout
					}
				}
				return 0
			}
			answering := f.udp(to, toAddr, echoPort)
			asking := f.connected(from, toAddr)
			buf := make([]byte, 64)
			for i, want := range []time.Duration{tt.want.UDP, tt.want.UDPStream} {
				if _, err := asking.Write([]byte("?")); err != nil {
					t.Fatal(err)
				}
				_ = answering.SetReadDeadline(time.Now().Add(5 * time.Second))
				_, who, err := answering.ReadFromUDPAddrPort(buf)
				if err != nil {
					t.Fatal(err)
				}
				_, _ = answering.WriteToUDPAddrPort([]byte("!"), who)
				_ = asking.SetReadDeadline(time.Now().Add(5 * time.Second))
				if _, err := asking.Read(buf); err != nil {
					t.Fatal(err)
				}
				if got := idle(unix.IPPROTO_UDP); got != want {
					t.Errorf("direct %v, %s: UDP after %d answers is over after %s, want %s", direct, tt.name, i+1, got, want)
				}
			}
			_ = answering.Close()
			port++
			f.serve(to, netip.AddrPortFrom(toAddr, port))
			c, err := f.dial(from, fromAddr, netip.AddrPortFrom(toAddr, port))
			if err != nil {
				t.Fatal(err)
			}
			if err := exchange(c, 100); err != nil {
				t.Fatal(err)
			}
			if got := idle(unix.IPPROTO_TCP); got != tt.want.TCPEstablished {
				t.Errorf("direct %v, %s: established TCP is over after %s, want %s", direct, tt.name, got, tt.want.TCPEstablished)
			}
		}
	}
}

func TestMonitor(t *testing.T) {
	w := newWorld(t)
	ended := make(chan Connection, 1000)
	d := w.open(Options{Ended: func(c Connection) { ended <- c }})
	a := w.addPod(d, 1)
	w.echo(w.wire, farIP)
	ctx, cancel := context.WithCancel(context.Background())
	events := make(chan Event, 10000)
	type result struct {
		lost uint64
		err  error
	}
	over := make(chan result, 1)
	go func() {
		lost, err := d.Monitor(ctx, 100, func(e Event) { events <- e })
		over <- result{lost, err}
	}()
	eventually(t, "the monitor listens", func() bool {
		var n uint32
		return d.objs.EventListeners.Get(&n) == nil && n == 1
	})
	if _, err := d.Monitor(ctx, 1, func(Event) {}); !errors.Is(err, ErrMonitored) {
		t.Errorf("a second monitor: %v", err)
	}
	if w.ask(a.ns, a.Addr, farIP, 20) == "" {
		t.Fatal("not answered")
	}
	fd := w.rawSocket(a.ns, "eth0")
	for range 200 { // more than it may
		sendRaw(t, fd, udpFrame(a.MAC, hostMAC, farIP, a.Addr, "not mine"))
	}
	var allowed, dropped int
	eventually(t, "both are told of", func() bool {
		for len(events) > 0 {
			switch e := <-events; {
			case e.Reason == "" && e.Dst.Addr() == farIP && e.Addr == a.Addr && e.Provenance == Direct && e.Protocol == unix.IPPROTO_UDP && !e.Ingress:
				allowed++
			case e.Reason == "source_address" && e.Addr == a.Addr:
				dropped++
			}
		}
		return allowed > 0 && dropped > 0
	})
	cancel()
	if r := <-over; r.err != nil || r.lost == 0 || r.lost > 200 {
		t.Errorf("Monitor: %+v; want some of 200 lost", r)
	}
	// A connection whose entry the next one takes over is told of.
	w.serve(w.wire, netip.AddrPortFrom(farIP, 80))
	for range 2 {
		c, err := w.dialFrom(a.ns, netip.AddrPortFrom(a.Addr, 45000), netip.AddrPortFrom(farIP, 80))
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetLinger(0) // with a RST
		c.Close()
	}
	select {
	case c := <-ended:
		if c.State != ConnClosed || c.Opener.Port != 45000 || c.Opener.Packets < 3 {
			t.Errorf("%+v", c)
		}
	case <-time.After(10 * time.Second):
		t.Error("the first connection's end is not told of")
	}
}
