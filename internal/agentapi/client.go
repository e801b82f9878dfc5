package agentapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"
)

// ErrUnreachable is wrapped by what a Client returns when nobody answered on
// the socket: no such file, nobody listening, connection cut before an answer.
var ErrUnreachable = errors.New("the agent does not answer")

// Client speaks to the agent behind one socket. It holds no connection.
type Client struct {
	Socket string
}

// Do sends one request and returns its response. The request's Version is
// filled in. An error of the agent comes back as *Error.
func (c *Client) Do(ctx context.Context, req *Request) (*Response, error) {
	r := *req
	r.Version = ProtocolVersion
	msg, err := json.Marshal(&r)
	if err != nil {
		return nil, fmt.Errorf("encode request: %w", err)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.Socket)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	sendErr := writeMessage(conn, msg)
	if errors.Is(sendErr, errTooLong) {
		return nil, fmt.Errorf("send request: %w", sendErr)
	}
	// A peer that refuses the request may answer before it has read it all.
	b, err := readMessage(conn)
	if sendErr != nil && err != nil {
		return nil, fmt.Errorf("%w: send request: %w", ErrUnreachable, because(ctx, sendErr))
	}
	if err != nil {
		if errors.Is(err, errTooLong) {
			return nil, fmt.Errorf("read response: %w", err)
		}
		return nil, fmt.Errorf("%w: read response: %w", ErrUnreachable, because(ctx, err))
	}
	var resp Response
	if err := json.Unmarshal(b, &resp); err != nil {
		return nil, fmt.Errorf("decode response: %w", err)
	}
	if resp.Error != nil {
		return &resp, resp.Error
	}
	if resp.Version != ProtocolVersion {
		return nil, Errorf(CodeIncompatibleVersion, "the agent answers in protocol version %d, this program speaks %d; install the one that came with the agent", resp.Version, ProtocolVersion)
	}
	return &resp, nil
}

// because prefers the reason why the context ended to the time-out that this
// caused on the connection.
func because(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// Status returns nil when the agent can serve an Add now.
func (c *Client) Status(ctx context.Context) error {
	_, err := c.Do(ctx, &Request{Op: OpStatus})
	return err
}

// Version returns the agent's version.
func (c *Client) Version(ctx context.Context) (string, error) {
	resp, err := c.Do(ctx, &Request{Op: OpVersion})
	if err != nil {
		return "", err
	}
	return resp.Agent, nil
}

// Inspect returns the agent's view of its node.
func (c *Client) Inspect(ctx context.Context) (*Inspection, error) {
	resp, err := c.Do(ctx, &Request{Op: OpInspect})
	if err != nil {
		return nil, err
	}
	if resp.Inspect == nil {
		return nil, errors.New("decode response: inspect answered without a view")
	}
	return resp.Inspect, nil
}
