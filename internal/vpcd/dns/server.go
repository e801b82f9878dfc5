package dns

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/miekg/dns"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// idle is for how long a connection without a query is kept, and maxConns how
// many an interface may have.
const (
	idle     = 10 * time.Second
	maxConns = 64
)

// Server answers the guests of all VPCs.
type Server struct {
	Region Region
	View   func() *store.State
	Logger *slog.Logger
}

// Datagrams is where queries in datagrams come from; C is who asked, as Write
// wants it back.
type Datagrams[C any] interface {
	Read(buf []byte) (n int, from C, err error)
	Write(b []byte, to C) error
}

// ServeUDP answers datagrams until conn is closed. It answers one after the
// other: an answer takes microseconds.
func ServeUDP[C any](s *Server, conn Datagrams[C], eni func(C) vpc.ENIID) error {
	buf := make([]byte, dns.MaxMsgSize)
	for {
		n, from, err := conn.Read(buf)
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read DNS queries: %w", err)
		}
		answer := s.answer(eni(from), buf[:n])
		if answer == nil {
			continue
		}
		// The interface may be gone by now, and with it whom it would reach.
		if err := conn.Write(answer, from); err != nil {
			s.Logger.Debug("dns answer not sent", "eni", eni(from), "err", err)
		}
	}
}

// answer returns the answer to a packed query, or nil where there is to be none.
func (s *Server) answer(client vpc.ENIID, packed []byte) []byte {
	query := new(dns.Msg)
	if err := query.Unpack(packed); err != nil || query.Response {
		return nil // as to a reflected answer, or noise
	}
	m := s.Region.Answer(s.View(), client, query)
	if m == nil {
		return nil
	}
	size := dns.MinMsgSize
	if opt := query.IsEdns0(); opt != nil {
		size = min(maxUDP, max(size, int(opt.UDPSize())))
	}
	m.Truncate(size)
	out, err := m.Pack()
	if err != nil {
		s.Logger.Error("dns answer not packed", "eni", client, "err", err)
		return nil
	}
	return out
}

// ServeTCP answers what comes by a listener of one ENI until it is closed, and
// lets connections end by themselves, which they do when they are idle.
func (s *Server) ServeTCP(client vpc.ENIID, l net.Listener) error {
	slots := make(chan struct{}, maxConns)
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		select {
		case slots <- struct{}{}:
		default:
			_ = c.Close() // it may come again
			continue
		}
		go func() {
			defer func() { <-slots }()
			s.serve(client, &dns.Conn{Conn: c})
		}()
	}
}

func (s *Server) serve(client vpc.ENIID, c *dns.Conn) {
	defer c.Close()
	for {
		if err := c.SetDeadline(time.Now().Add(idle)); err != nil {
			return
		}
		query, err := c.ReadMsg()
		if err != nil || query.Response {
			return // gone, idle, or noise
		}
		m := s.Region.Answer(s.View(), client, query)
		if m == nil || c.WriteMsg(m) != nil {
			return
		}
	}
}
