package query

import (
	"context"
	"log/slog"
	"net/http"
)

// Call is one well-formed request on its way to its handler.
type Call struct {
	Action   *Action
	Identity Identity
	Request  any // *<Action>Request
	DryRun   bool
}

// Gate is asked before each handler. It may wait, and an error is the answer;
// chaos, throttling and policies are gates.
type Gate func(ctx context.Context, c Call) error

// Options of a server.
type Options struct {
	Handlers map[string]Handler // by action
	Gate     Gate               // nil: all pass
	Account  string             // of callers; "" is 123456789012
	Region   string             // of callers whose credential scope names none; "" is us-east-1
	Logger   *slog.Logger       // nil: slog.Default()
}

// Server is the EC2 endpoint as an http.Handler.
type Server struct {
	opts Options
}

// NewServer makes a Server. It panics if a handler's types are not its action's.
func NewServer(o Options) http.Handler {
	return &Server{opts: o}
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {}
