package agentapi

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// handler answers with what it was asked.
type handler struct {
	add func(ctx context.Context, a *Attachment, f *os.File) (*Result, error)
	big atomic.Bool
}

func (h *handler) Add(ctx context.Context, a *Attachment, _ time.Duration, f *os.File) (*Result, error) {
	return h.add(ctx, a, f)
}
func (h *handler) Del(_ context.Context, a *Attachment) error {
	return errors.New("del " + a.ContainerID)
}
func (h *handler) Check(context.Context, *Attachment, *os.File) error {
	return Errorf(CodeCheckFailed, "no route; recreate the pod")
}
func (h *handler) GC(_ context.Context, valid []Attachment) error {
	if len(valid) != 2 {
		return errors.New("lost some")
	}
	return nil
}
func (h *handler) Status(context.Context) error { return nil }
func (h *handler) Version() string              { return "1.2.3" }
func (h *handler) Inspect(context.Context) (*Inspection, error) {
	in := &Inspection{Version: "1.2.3"}
	if h.big.Load() {
		in.Reason = strings.Repeat("x", MaxMessage)
	}
	return in, nil
}

func serve(t *testing.T, h Handler) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ul") // t.TempDir can be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	l, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, h, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
		os.RemoveAll(dir)
	})
	return socket
}

func TestRoundTrip(t *testing.T) {
	want := Result{Addr: netip.MustParseAddr("10.0.0.9"), Gateway: netip.MustParseAddr("169.254.1.1"), MAC: "02:00:00:00:00:01", HostIfName: "ul1", MTU: 9001, ENI: "eni-1"}
	at := Attachment{ContainerID: "c1", IfName: "eth0", Netns: "/run/netns/x", Pod: Pod{Namespace: "a", Name: "b"}}
	h := &handler{add: func(_ context.Context, a *Attachment, f *os.File) (*Result, error) {
		if diff := cmp.Diff(&at, a, cmp.Comparer(func(x, y netip.Addr) bool { return x == y })); diff != "" {
			t.Errorf("-sent +received:\n%s", diff)
		}
		var sent, got syscall.Stat_t
		if f == nil {
			return nil, errors.New("no file came")
		}
		if err := errors.Join(syscall.Stat("/proc/self/ns/net", &sent), syscall.Fstat(int(f.Fd()), &got)); err != nil || sent.Ino != got.Ino {
			return nil, errors.New("another file came")
		}
		return &want, nil
	}}
	c := Client{Socket: serve(t, h)}
	ctx := t.Context()
	ns, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	got, err := c.Add(ctx, at, ns)
	if err != nil || *got != want {
		t.Errorf("add: %+v, %v", got, err)
	}
	var e *Error
	if err := c.Del(ctx, at); !errors.As(err, &e) || e.Code != CodeInternal || !strings.Contains(e.Message, "del c1") {
		t.Errorf("del: %v", err)
	}
	if err := c.Check(ctx, at, ns); !errors.As(err, &e) || e.Code != CodeCheckFailed {
		t.Errorf("check: %v", err)
	}
	if err := errors.Join(c.GC(ctx, []Attachment{at, at}), c.Status(ctx)); err != nil {
		t.Error(err)
	}
	if v, err := c.Version(ctx); v != "1.2.3" || err != nil {
		t.Errorf("version: %q, %v", v, err)
	}
	if in, err := c.Inspect(ctx); err != nil || in.Version != "1.2.3" {
		t.Errorf("inspect: %+v, %v", in, err)
	}
	h.big.Store(true)
	if _, err := c.Inspect(ctx); !errors.As(err, &e) || !strings.Contains(e.Message, "too long") {
		t.Errorf("a response of more than a message: %v", err)
	}
	at.Network = strings.Repeat("n", MaxMessage)
	if _, err := c.Add(ctx, at, ns); !errors.Is(err, errTooLong) {
		t.Errorf("a request of more than a message: %v", err)
	}
}

func TestNobodyListens(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	c := Client{Socket: socket}
	if err := c.Status(t.Context()); !errors.Is(err, ErrUnreachable) {
		t.Errorf("no socket: %v", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := c.Status(ctx); !errors.Is(err, ErrUnreachable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("nobody answers: %v", err)
	}
	if _, err := Listen(socket); err == nil {
		t.Error("took the socket of one who listens")
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	again, err := Listen(socket)
	if err != nil {
		t.Fatalf("did not take over a dead socket: %v", err)
	}
	defer again.Close()
	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket mode %v, %v", st.Mode(), err)
	}
}

func TestHangUpEndsTheRequest(t *testing.T) {
	began, ended := make(chan struct{}), make(chan struct{})
	socket := serve(t, &handler{add: func(ctx context.Context, _ *Attachment, _ *os.File) (*Result, error) {
		close(began)
		<-ctx.Done()
		close(ended)
		return nil, ctx.Err()
	}})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-began; cancel() }()
	if _, err := (&Client{Socket: socket}).Add(ctx, Attachment{ContainerID: "c", IfName: "eth0"}, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("add: %v", err)
	}
	<-ended
}

func TestGarbageIsAnsweredAndClosed(t *testing.T) {
	socket := serve(t, &handler{})
	long := binary.BigEndian.AppendUint32(nil, MaxMessage+1)
	msg := func(s string) []byte { b, _ := frame([]byte(s)); return b }
	for _, tc := range []struct {
		name string
		in   []byte
		code Code
	}{
		{"noise", bytes.Repeat([]byte{0xa5}, 100), CodeDecoding},
		{"oversized", long, CodeDecoding},
		{"no JSON", msg("hello"), CodeDecoding},
		{"empty", msg(""), CodeDecoding},
		{"no version", msg("{}"), CodeIncompatibleVersion},
		{"next version", msg(`{"version":2,"op":"add"}`), CodeIncompatibleVersion},
		{"unknown op", msg(`{"version":1,"op":"dance"}`), CodeDecoding},
		{"add without a container", msg(`{"version":1,"op":"add"}`), CodeInvalidEnvironment},
		{"long interface name", msg(`{"version":1,"op":"del","attachment":{"containerId":"c","ifName":"0123456789abcdef"}}`), CodeInvalidEnvironment},
		{"long container ID", msg(`{"version":1,"op":"del","attachment":{"containerId":"` + strings.Repeat("c", 129) + `","ifName":"e"}}`), CodeInvalidEnvironment},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := net.Dial("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(5 * time.Second))
			_, _ = c.Write(tc.in)
			b, err := readMessage(c)
			if err != nil {
				t.Fatal(err)
			}
			var r Response
			if err := json.Unmarshal(b, &r); err != nil || r.Error == nil || r.Error.Code != tc.code || !strings.Contains(r.Error.Message, ";") {
				t.Errorf("answered %s, want code %d and a next step", b, tc.code)
			}
			if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
				t.Errorf("the connection is still open")
			}
		})
	}
	if err := (&Client{Socket: socket}).Status(t.Context()); err != nil {
		t.Errorf("after all that: %v", err)
	}
}

func TestASecondFileIsRefused(t *testing.T) {
	socket := serve(t, &handler{})
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b, _ := frame([]byte(`{"version":1,"op":"status"}`))
	if _, _, err := c.WriteMsgUnix(b, syscall.UnixRights(0, 1), nil); err != nil {
		t.Fatal(err)
	}
	out, err := readMessage(c)
	if err != nil || !strings.Contains(string(out), "more than one file") {
		t.Errorf("answered %s, %v", out, err)
	}
}

func FuzzRequest(f *testing.F) {
	for _, s := range []string{`{"version":1,"op":"add","attachment":{"containerId":"c","ifName":"eth0","addr":"10.0.0.1"}}`, `{"version":1,"op":"gc","valid":[{"containerId":"c","ifName":"eth0"}],"timeout":-5}`, `{`, ``} {
		b, _ := frame([]byte(s))
		f.Add(b)
	}
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 1})
	f.Fuzz(func(t *testing.T, in []byte) {
		msg, err := readMessage(bytes.NewReader(in))
		if err != nil {
			return
		}
		if len(msg) > MaxMessage {
			t.Fatalf("%d bytes accepted", len(msg))
		}
		r, err := decodeRequest(msg)
		if err != nil {
			if e := asError(err); e.Code == CodeInternal {
				t.Errorf("bad input is answered as our own fault: %v", err)
			}
			return
		}
		if r.Timeout < 0 {
			t.Error("a negative time-out was accepted")
		}
		if (r.Op == OpAdd || r.Op == OpDel || r.Op == OpCheck) && (r.Attachment == nil || r.Attachment.ContainerID == "") {
			t.Errorf("%s without a container was accepted", r.Op)
		}
	})
}
