package agentapi

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/agentapi/pipe"
	"github.com/underlay-cni/underlay/internal/flowlog"
)

// handler answers with what it was asked.
type handler struct {
	cni func(ctx context.Context, c *pipe.Call, f *os.File) (byte, []byte)
	big atomic.Bool
}

func (h *handler) CNI(ctx context.Context, c *pipe.Call, f *os.File) (byte, []byte) {
	return h.cni(ctx, c, f)
}
func (h *handler) Status(context.Context) error { return Errorf(CodeNotAvailable, "asleep; wake it") }
func (h *handler) Version() string              { return "1.2.3" }
func (h *handler) Flows(_ context.Context, q FlowQuery) (*Flows, error) {
	return &Flows{Interval: 60, Ended: []flowlog.Object{{End: q.Since, Status: "OK"}}}, nil
}
func (h *handler) Monitor(_ context.Context, q MonitorQuery) (*Verdicts, error) {
	return &Verdicts{Next: q.After + 1, Verdicts: []Verdict{{Verdict: "allow"}}}, nil
}
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
	h := &handler{}
	c := Client{Socket: serve(t, h)}
	ctx := t.Context()
	var e *Error
	if err := c.Status(ctx); !errors.As(err, &e) || e.Code != CodeNotAvailable || !strings.Contains(e.Message, "wake it") {
		t.Errorf("status: %v", err)
	}
	if v, err := c.Version(ctx); v != "1.2.3" || err != nil {
		t.Errorf("version: %q, %v", v, err)
	}
	if v, err := c.Monitor(ctx, MonitorQuery{After: 7}); err != nil || v.Next != 8 || len(v.Verdicts) != 1 {
		t.Errorf("Monitor = %+v, %v", v, err)
	}
	since := time.Unix(7, 0).UTC()
	if f, err := c.Flows(ctx, FlowQuery{Since: since}); err != nil || len(f.Ended) != 1 || !f.Ended[0].End.Equal(since) {
		t.Errorf("Flows = %+v, %v", f, err)
	}
	if in, err := c.Inspect(ctx); err != nil || in.Version != "1.2.3" {
		t.Errorf("inspect: %+v, %v", in, err)
	}
	h.big.Store(true)
	if _, err := c.Inspect(ctx); !errors.As(err, &e) || !strings.Contains(e.Message, "too long") {
		t.Errorf("a response of more than a message: %v", err)
	}
}

// The plugin's call arrives as it was made, its file with it, and the answer
// comes back whole, whatever its size.
func TestCallRoundTrip(t *testing.T) {
	want := pipe.Call{Env: []string{"CNI_COMMAND=ADD", "CNI_ARGS=a=\xff;"}, Stdin: []byte("{\x00}")}
	var size atomic.Int64
	h := &handler{cni: func(_ context.Context, c *pipe.Call, f *os.File) (byte, []byte) {
		if diff := cmp.Diff(&want, c); diff != "" {
			t.Errorf("-sent +received:\n%s", diff)
		}
		var sent, got syscall.Stat_t
		if f == nil {
			return pipe.ExitFailed, []byte("no file came")
		}
		if err := errors.Join(syscall.Stat("/proc/self/ns/net", &sent), syscall.Fstat(int(f.Fd()), &got)); err != nil || sent.Ino != got.Ino {
			return pipe.ExitFailed, []byte("another file came")
		}
		return pipe.ExitOK, bytes.Repeat([]byte{'x'}, int(size.Load()))
	}}
	socket := serve(t, h)
	ns, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	caller := new(pipe.Caller)
	for _, n := range []int{0, 1, 5000, pipe.MaxMessage - 1} {
		size.Store(int64(n))
		caller.Put(&want)
		if exit, out, err := caller.Do(socket, int(ns.Fd()), 5); err != nil || exit != pipe.ExitOK || len(out) != n {
			t.Errorf("an answer of %d bytes: %d, %d bytes %.50s, %v", n, exit, len(out), out, err)
		}
	}
	caller.Put(&want)
	if exit, out, err := caller.Do(socket, -1, 5); err != nil || exit != pipe.ExitFailed || string(out) != "no file came" {
		t.Errorf("without a file: %d %s %v", exit, out, err)
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

func TestHangUpEndsTheCall(t *testing.T) {
	began, ended := make(chan struct{}), make(chan struct{})
	socket := serve(t, &handler{cni: func(ctx context.Context, _ *pipe.Call, _ *os.File) (byte, []byte) {
		close(began)
		<-ctx.Done()
		close(ended)
		return pipe.ExitFailed, nil
	}})
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	if err := writeMessage(c, pipe.AppendCall(nil, &pipe.Call{Env: []string{"CNI_COMMAND=ADD"}})); err != nil {
		t.Fatal(err)
	}
	<-began
	c.Close()
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
	if _, err := (&Client{Socket: socket}).Version(t.Context()); err != nil {
		t.Errorf("after all that: %v", err)
	}
}

// During an update plugin and agent are of different versions: the plugin's file
// is replaced while old ones run, and an old agent may be asked by a new one.
// What a plugin cannot be served with, it hears in CNI's form, which it prints.
func TestPluginOfAnotherVersion(t *testing.T) {
	served := func(_ context.Context, c *pipe.Call, _ *os.File) (byte, []byte) {
		return pipe.ExitOK, []byte(c.Getenv("CNI_COMMAND"))
	}
	socket := serve(t, &handler{cni: served})
	for _, tc := range []struct {
		name, call string
		code       uint // 0: it is served
		says       string
	}{
		{"as the first release sent it", "\x00\x01CNI_COMMAND=DEL\x00\x00{}", 0, ""},
		{"without anything but the command", "\x00\x01CNI_COMMAND=DEL\x00\x00", 0, ""},
		{"with variables that nobody knows yet", "\x00\x01CNI_NEWER=1\x00CNI_COMMAND=DEL\x00CNI_2030=\xff\x00\x00{\"newer\":[1]}", 0, ""},
		{"a later version of the call", "\x00\x02whatever follows", uint(CodeIncompatibleVersion), "version 2"},
		{"version 255", "\x00\xff", uint(CodeIncompatibleVersion), "version 255"},
		{"no version at all", "\x00", uint(CodeIncompatibleVersion), "cut off"},
		{"without an end", "\x00\x01A", uint(CodeIncompatibleVersion), "cut off"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := net.Dial("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(5 * time.Second))
			if err := writeMessage(c, []byte(tc.call)); err != nil {
				t.Fatal(err)
			}
			b, err := readMessage(c)
			if err != nil || len(b) == 0 {
				t.Fatalf("%q, %v", b, err)
			}
			if tc.code == 0 {
				if b[0] != pipe.ExitOK || string(b[1:]) != "DEL" {
					t.Errorf("answered %q", b)
				}
				return
			}
			var e types.Error
			if err := json.Unmarshal(b[1:], &e); b[0] != pipe.ExitFailed || err != nil || e.Code != tc.code || !strings.Contains(e.Msg, tc.says) || !strings.Contains(e.Msg, "; ") {
				t.Errorf("answered %q (%v), want CNI's error %d, %q and a next step", b, err, tc.code, tc.says)
			}
		})
	}
}

// People's tools of another version: fields are added under the same number.
func TestToolOfAnotherVersion(t *testing.T) {
	socket := serve(t, &handler{})
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := writeMessage(c, []byte(`{"version":1,"op":"version","newer":{"a":[1]}}`)); err != nil {
		t.Fatal(err)
	}
	b, err := readMessage(c)
	var r Response
	if err != nil || json.Unmarshal(b, &r) != nil || r.Error != nil || r.Agent != "1.2.3" {
		t.Errorf("answered %s, %v", b, err)
	}
	// And the other way: an answer with more than we know.
	if err := json.Unmarshal([]byte(`{"version":1,"inspect":{"version":"9","newer":true,"limits":{"newer":1}}}`), &r); err != nil || r.Inspect.Version != "9" {
		t.Errorf("%+v, %v", r, err)
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
	for _, s := range []string{`{"version":1,"op":"status"}`, `{"version":7}`, "\x00\x01CNI_COMMAND=ADD\x00\x00{}", "\x00\x01", `{`, ``} {
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
		if pipe.IsCall(msg) {
			c, err := pipe.Decode(msg)
			if err == nil && !bytes.Equal(pipe.AppendCall(nil, c), msg) {
				t.Errorf("%q was read as %q", msg, c)
			}
			return
		}
		if _, err := decodeRequest(msg); err != nil && asError(err).Code == CodeInternal {
			t.Errorf("bad input is answered as our own fault: %v", err)
		}
	})
}
