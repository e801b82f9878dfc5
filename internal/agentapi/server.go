package agentapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/underlay-cni/underlay/internal/agentapi/pipe"
)

// Logger is the part of slog.Logger that a server uses.
type Logger interface {
	Debug(event string, args ...any)
	Warn(event string, args ...any)
}

// Handler serves the operations. Its methods are called concurrently; a
// context ends when the peer hangs up or the server stops. An error that is
// not an *Error travels with CodeInternal.
type Handler interface {
	// CNI carries out a call of the plugin and returns its exit status and
	// output; see package cni. The namespace file is nil when none came along;
	// the server closes it after the call.
	CNI(ctx context.Context, call *pipe.Call, netns *os.File) (exit byte, stdout []byte)
	Status(ctx context.Context) error
	Inspect(ctx context.Context) (*Inspection, error)
	Flows(ctx context.Context, q FlowQuery) (*Flows, error)
	Monitor(ctx context.Context, q MonitorQuery) (*Verdicts, error)
	Version() string
}

const (
	// requestTimeout bounds how long a peer may take over its request, and
	// over reading the response: what speaks here is on the same machine.
	requestTimeout = 5 * time.Second
	// maxConns bounds the connections served at once; more wait in the
	// listener's backlog. The largest instance types run ~750 pods.
	maxConns = 1024
)

// Listen binds the socket, for root alone (mode 0600). A file that is in the
// way is removed when nobody listens behind it; the directory must exist.
func Listen(path string) (*net.UnixListener, error) {
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("listen on %s: another process serves this socket; stop it first", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove the old socket: %w", err)
	}
	old := syscall.Umask(0o177)
	defer syscall.Umask(old)
	return net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
}

// Serve answers requests until ctx ends, then closes l and waits for the calls
// that run. The socket's file is left for the next Listen to replace.
func Serve(ctx context.Context, l *net.UnixListener, h Handler, log Logger) error {
	l.SetUnlinkOnClose(false)
	return Accept(ctx, l, maxConns, log, func(conn net.Conn) { serveConn(ctx, conn.(*net.UnixConn), h, log) })
}

// Accept calls serve for each connection, for at most so many at once, until ctx
// ends; then it closes l and waits for the calls that run. More connections wait in
// the listener's backlog.
func Accept(ctx context.Context, l net.Listener, most int, log Logger, serve func(net.Conn)) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, most)
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		conn, err := l.Accept()
		if err != nil {
			<-slots
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ECONNABORTED) {
				log.Warn("connection not accepted", "op", "accept", "err", err)
				select {
				case <-time.After(100 * time.Millisecond): // until a descriptor is free
				case <-ctx.Done():
				}
				continue
			}
			return fmt.Errorf("accept: %w", err)
		}
		wg.Go(func() {
			defer func() { <-slots }()
			serve(conn)
		})
	}
}

func serveConn(ctx context.Context, conn *net.UnixConn, h Handler, log Logger) {
	defer conn.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	_ = conn.SetReadDeadline(time.Now().Add(requestTimeout))
	msg, netns, err := readMessageFile(conn)
	if netns != nil {
		defer netns.Close()
	}
	if errors.Is(err, io.EOF) && len(msg) == 0 {
		return // connected and left: somebody who asks whether we live
	}
	var (
		req  *Request
		call *pipe.Call
	)
	switch {
	case err != nil:
		err = Errorf(CodeDecoding, "read request: %v; speak to this socket with underlay-cni or underlay", err)
	case pipe.IsCall(msg):
		if call, err = pipe.Decode(msg); err != nil {
			log.Warn("call of the plugin not understood", "op", "decode", "err", err)
			_ = conn.SetWriteDeadline(time.Now().Add(requestTimeout))
			_ = writeMessage(conn, pipe.AppendAnswer(nil, pipe.ExitFailed, notUnderstood(msg)))
			return
		}
	default:
		req, err = decodeRequest(msg)
	}
	var out []byte
	if err != nil {
		log.Debug("request refused", "op", "decode", "err", err)
		out = encode(&Response{Error: asError(err)})
	} else {
		_ = conn.SetReadDeadline(time.Time{})
		hungUp := make(chan struct{})
		go func() { // ends at the latest with conn.Close
			defer close(hungUp)
			var one [1]byte
			_, _ = conn.Read(one[:]) // nothing more may come: a byte too much is a hang-up as well
			cancel()
		}()
		if call != nil {
			exit, stdout := h.CNI(ctx, call, netns)
			out = pipe.AppendAnswer(nil, exit, stdout)
		} else {
			out = encode(dispatch(ctx, req, h))
		}
		defer func() { conn.Close(); <-hungUp }()
	}
	_ = conn.SetWriteDeadline(time.Now().Add(requestTimeout))
	if err := writeMessage(conn, out); err != nil {
		log.Debug("response not delivered", "op", "answer", "err", err)
	}
}

// notUnderstood answers a call that is not in our form, as CNI has errors: the
// plugin prints what it gets. The answer's own form is that of each version.
func notUnderstood(msg []byte) []byte {
	why := "it is cut off"
	if len(msg) > 1 && msg[1] != pipe.Version {
		why = fmt.Sprintf("it is of version %d, this agent speaks version %d", msg[1], pipe.Version)
	}
	b, err := json.Marshal(struct {
		Code Code   `json:"code"`
		Msg  string `json:"msg"`
	}{CodeIncompatibleVersion, "read the plugin's call: " + why + "; install the underlay-cni that came with this agent (it does so itself with --cni-bin)"})
	if err != nil { // a number and a string
		panic(err)
	}
	return append(b, '\n')
}

// encode returns the message of a response.
func encode(resp *Response) []byte {
	resp.Version = ProtocolVersion
	out, err := json.Marshal(resp)
	if err == nil && len(out) > MaxMessage {
		err = fmt.Errorf("%w: %d bytes, at most %d", errTooLong, len(out), MaxMessage)
	}
	if err != nil {
		out, _ = json.Marshal(&Response{Version: ProtocolVersion, Error: Errorf(CodeInternal, "encode response: %v; see the agent's log", err)})
	}
	return out
}

func dispatch(ctx context.Context, req *Request, h Handler) *Response {
	resp := &Response{}
	var err error
	switch req.Op {
	case OpVersion:
		resp.Agent = h.Version()
	case OpStatus:
		err = h.Status(ctx)
	case OpInspect:
		resp.Inspect, err = h.Inspect(ctx)
	case OpFlows:
		var q FlowQuery
		if req.Flows != nil {
			q = *req.Flows
		}
		resp.Flows, err = h.Flows(ctx, q)
	case OpMonitor:
		var q MonitorQuery
		if req.Monitor != nil {
			q = *req.Monitor
		}
		resp.Verdicts, err = h.Monitor(ctx, q)
	default:
		err = Errorf(CodeDecoding, "unknown operation %q; install the underlay that came with this agent", req.Op)
	}
	if err != nil {
		return &Response{Error: asError(err)}
	}
	return resp
}

// asError returns err in the form that travels.
func asError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return Errorf(CodeInternal, "%v; see the agent's log", err)
}
