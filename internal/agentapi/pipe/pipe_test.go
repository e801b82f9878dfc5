package pipe

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"
)

func TestStringIn(t *testing.T) {
	for _, tc := range []struct {
		in, want string
		ok       bool
	}{
		{`{"cniVersion":"1.1.0","name":"n","socket":"/run/x.sock"}`, "/run/x.sock", true},
		{` { "a" : [ {"socket":"/no"}, "]" , 1e3 ] , "socket" : "\/a\u0062\\\"c" } `, `/ab\"c`, true},
		{`{"so\u0063ket":"/x"}`, "/x", true},
		{`{"socket":"/first","socket":"/last"}`, "/last", true},
		{`{}`, "", true},
		{`{"a":null,"b":true,"c":-1.5}`, "", true},
		{`{"socket":7}`, "", false},
		{`{"socket":null}`, "", false},
		{``, "", false},
		{`[]`, "", false},
		{`{`, "", false},
		{`{"socket"}`, "", false},
		{`{"socket":"/x"`, "", false},
		{`{"socket":"/x`, "", false},
		{`{"a":[}`, "", false},
		{`{"a":"\`, "", false},
		{`{"socket":"\u12"}`, "", false},
	} {
		if got, err := StringIn([]byte(tc.in), "socket"); got != tc.want || (err == nil) != tc.ok {
			t.Errorf("%s: %q, %v", tc.in, got, err)
		}
	}
}

// Where encoding/json finds a configuration, so do we, and the same socket.
func FuzzStringIn(f *testing.F) {
	for _, s := range []string{`{"socket":"/a\n\u00e9"}`, `{"x":[{"y":"}"}],"socket":"/x"}`, `{"socket":"/x",}`, `{"s`, "{\"socket\":\"\xff\"}", `{"socket":"\ud800"}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		got, err := StringIn(in, "socket")
		var all map[string]json.RawMessage
		if json.Unmarshal(in, &all) != nil || all == nil {
			return // the agent refuses it
		}
		if raw, ok := all["socket"]; ok {
			var want string
			if json.Unmarshal(raw, &want) != nil || raw[0] != '"' {
				if err == nil && raw[0] != '"' {
					t.Errorf("%s: took %q", in, got)
				}
				return
			}
			if strings.Contains(strings.ToLower(string(in)), `\ud`) || !utf8.Valid(in) {
				return // surrogates and what is no UTF-8 are read otherwise
			}
			if got != want {
				t.Errorf("%s: %q, want %q", in, got, want)
			}
		} else if utf8.Valid(in) && !strings.Contains(string(in), `\`) && got != "" {
			t.Errorf("%s: made up %q", in, got)
		}
		if err != nil && all["socket"] == nil {
			t.Errorf("%s: %v", in, err)
		}
	})
}

func FuzzAppendQuoted(f *testing.F) {
	f.Add("a\"\\\x00\n\u2028é\xff")
	f.Fuzz(func(t *testing.T, s string) {
		var got string
		b := AppendQuoted(nil, s)
		if err := json.Unmarshal(b, &got); err != nil || got != strings.ToValidUTF8(s, "\ufffd") && utf8.ValidString(s) {
			t.Errorf("%q became %s: %q, %v", s, b, got, err)
		}
	})
}

// peer answers the one connection that comes.
func peer(t *testing.T, answer func(net.Conn)) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if c, err := l.Accept(); err == nil {
			answer(c)
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return socket
}

func TestDoWhenTheAgentIsNotWell(t *testing.T) {
	read := func(c net.Conn) { _, _ = c.Read(make([]byte, 100)) }
	for _, tc := range []struct {
		name   string
		answer func(net.Conn)
		want   error
	}{
		{"hangs up at once", func(net.Conn) {}, ErrUnreachable},
		{"hangs up after the call", read, ErrUnreachable},
		{"hangs up within the answer", func(c net.Conn) { read(c); _, _ = c.Write([]byte{0, 0, 0, 9, 0, 'x'}) }, ErrUnreachable},
		{"says nothing", func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }, ErrTimeout},
		{"announces too much", func(c net.Conn) { read(c); _, _ = c.Write([]byte{1, 0, 0, 0}) }, errAnswer},
		{"says too much", func(c net.Conn) { read(c); _, _ = c.Write([]byte{0, 0, 0, 1, 0, 0}) }, errAnswer},
		{"answers in JSON", func(c net.Conn) { read(c); _, _ = c.Write([]byte{0, 0, 0, 2, '{', '}'}) }, errAnswer},
		{"answers nothing", func(c net.Conn) { read(c); _, _ = c.Write([]byte{0, 0, 0, 0}) }, errAnswer},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := new(Caller)
			c.Put(&Call{Env: []string{"CNI_COMMAND=ADD"}, Stdin: []byte("{}")})
			if _, _, err := c.Do(peer(t, tc.answer), -1, 1); !errors.Is(err, tc.want) {
				t.Errorf("%v", err)
			}
		})
	}
	c := new(Caller)
	if _, _, err := c.Do(filepath.Join(t.TempDir(), "none"), -1, 1); !errors.Is(err, ErrUnreachable) || !errors.Is(err, syscall.ENOENT) {
		t.Errorf("no socket: %v", err)
	}
	if _, _, err := c.Do(strings.Repeat("/x", 200), -1, 1); !errors.Is(err, ErrUnreachable) || !errors.Is(err, syscall.ENAMETOOLONG) {
		t.Errorf("long path: %v", err)
	}
}

func TestAnswerInPieces(t *testing.T) {
	socket := peer(t, func(c net.Conn) {
		_, _ = c.Read(make([]byte, 100))
		for _, b := range []byte("\x00\x00\x00\x03\x01no") {
			if _, err := c.Write([]byte{b}); err != nil {
				t.Error(err)
			}
			<-time.After(time.Millisecond) // so that they are read apart
		}
	})
	c := new(Caller)
	c.Put(&Call{})
	if exit, out, err := c.Do(socket, -1, 5); err != nil || exit != ExitFailed || string(out) != "no" {
		t.Errorf("%d %q %v", exit, out, err)
	}
}
