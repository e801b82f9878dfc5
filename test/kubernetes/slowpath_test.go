package kubernetes

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/test/lab"
)

// Between pods, on two nodes and on one, at most one packet in a hundred takes the
// kernel's stack: connections, streams and datagrams, not by a Service.
func TestPodToPodBypassesTheStack(t *testing.T) {
	const most = 0.01
	c := shared(t)
	ns := c.namespace("slowpath")
	n1, n2 := c.Lab.Nodes[0], c.Lab.Nodes[1]
	c.apply(ns, idle("client", n1.Name, "")+idle("far", n2.Name, "")+idle("near", n1.Name, ""))
	pods := map[string]pod{}
	for _, p := range c.awaitPods(ns, 3, 2*time.Minute) {
		pods[p.Metadata.Name] = p
	}
	client := c.netns(pods["client"])
	for _, name := range []string{"far", "near"} {
		to := pods[name]
		echo(t, c.netns(to), to.ip())
		nodes := []lab.Node{n1}
		if name == "far" {
			nodes = append(nodes, n2)
		}
		before := make([]agentapi.Datapath, len(nodes))
		for i, n := range nodes {
			before[i] = c.Inspect(n).Datapath
		}
		talk(t, client, to.ip())
		for i, n := range nodes {
			now := c.Inspect(n).Datapath
			direct, stack := now.DirectPackets-before[i].DirectPackets, now.StackPackets-before[i].StackPackets
			share := float64(stack) / float64(max(direct+stack, 1))
			t.Logf("client to %s, on %s: %d packets, %d of them by the stack: %.3f %%", name, n.Name, direct+stack, stack, 100*share)
			if direct < 2*pings || share > most {
				t.Errorf("client to %s, on %s: %d packets direct, %d by the stack: %.2f %%, at most %.0f %% are to take it", name, n.Name, direct, stack, 100*share, 100*most)
			}
		}
	}
}

const (
	connects = 200
	pings    = 2000    // of UDP
	bulk     = 8 << 20 // bytes each way
	talkPort = 7300
)

// echo answers TCP and UDP in a namespace until the test ends.
func echo(t *testing.T, netns string, at netip.Addr) {
	t.Helper()
	addr := netip.AddrPortFrom(at, talkPort)
	l := lab.In(t, netns, func() (net.Listener, error) { return net.Listen("tcp4", addr.String()) })
	u := lab.In(t, netns, func() (*net.UDPConn, error) { return net.ListenUDP("udp4", net.UDPAddrFromAddrPort(addr)) })
	t.Cleanup(func() { _, _ = l.Close(), u.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	go func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := u.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			_, _ = u.WriteToUDPAddrPort(buf[:n], from)
		}
	}()
}

// talk makes short connections, a large one and datagrams, to an echo.
func talk(t *testing.T, netns string, to netip.Addr) {
	t.Helper()
	addr := netip.AddrPortFrom(to, talkPort).String()
	over := func(size int) {
		t.Helper()
		conn := lab.In(t, netns, func() (net.Conn, error) {
			return new(net.Dialer).DialContext(t.Context(), "tcp4", addr)
		})
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
		sent := make(chan error, 1)
		go func() {
			_, err := conn.Write(make([]byte, size))
			sent <- err
		}()
		_, err := io.CopyN(io.Discard, conn, int64(size))
		if err := errors.Join(err, <-sent); err != nil {
			t.Fatalf("%d bytes to %s and back: %v", size, addr, err)
		}
	}
	for range connects {
		over(1)
	}
	over(bulk)
	conn := lab.In(t, netns, func() (net.Conn, error) { return net.Dial("udp4", addr) })
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	buf := make([]byte, 64)
	for answered := 0; answered < pings; {
		if ctx.Err() != nil {
			t.Fatalf("%d of %d datagrams to %s were answered", answered, pings, addr)
		}
		_, _ = conn.Write(buf)
		_ = conn.SetReadDeadline(time.Now().Add(time.Second))
		if _, err := conn.Read(buf); err == nil {
			answered++
		}
	}
}
