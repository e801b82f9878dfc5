package query

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"reflect"
	"runtime/debug"
	"time"
)

// maxBody bounds a request: user data of 16 KiB and a thousand identifiers are
// a small part of it.
const maxBody = 1 << 20

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
	Account  string             // of all callers; "" is 123456789012
	Region   string             // the one region there is; "" is us-east-1
	Now      func() time.Time   // nil: time.Now
	Logger   *slog.Logger       // nil: slog.Default()
}

type server struct{ Options }

// NewServer is the EC2 endpoint. It panics if a handler is not of an action of
// the model, or its types are not the action's. An action without a handler
// answers InvalidAction, as does one that does not exist.
func NewServer(o Options) http.Handler {
	for name, h := range o.Handlers {
		a := Actions[name]
		if a == nil {
			panic("query: the model has no action " + name)
		}
		h.fits(a)
	}
	if o.Account == "" {
		o.Account = "123456789012"
	}
	if o.Region == "" {
		o.Region = defaultRegion
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	return &server{o}
}

// ServeHTTP answers one request.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	id := newRequestID()
	action, body, err := s.answer(w, r, id)
	status, code := http.StatusOK, ""
	if err != nil {
		if errors.Is(err, context.Canceled) && r.Context().Err() != nil {
			s.Logger.Debug("ec2 client gone", "action", action, "request", id)
			return
		}
		var e *Error
		if !errors.As(err, &e) {
			s.Logger.Error("ec2 request broke", "action", action, "request", id, "err", err)
			e = Errorf("InternalError", "An internal error has occurred")
		}
		status, code, body = e.Status, e.Code, e.body(id)
	}
	h := w.Header()
	h.Set("Content-Type", "text/xml;charset=UTF-8")
	h.Set("x-amzn-RequestId", id)
	w.WriteHeader(status)
	if _, err := w.Write(body); err != nil {
		s.Logger.Debug("ec2 client gone", "action", action, "request", id, "err", err)
	}
	s.Logger.Debug("ec2 request", "action", action, "request", id, "code", code, "took", time.Since(start))
}

func (s *server) answer(w http.ResponseWriter, r *http.Request, requestID string) (action string, body []byte, err error) {
	form, err := readForm(w, r)
	if err != nil {
		return "", nil, err
	}
	action = printable(form.Get("Action"))
	id, authErr := identify(r, form, s.Now())
	if authErr != nil {
		return action, nil, authErr
	}
	if id.Region != "" && id.Region != s.Region {
		return action, nil, Errorf("AuthFailure", "Credential should be scoped to a valid region, not '%s': this endpoint is %s.", printable(id.Region), s.Region)
	}
	id.Account, id.Region, id.RequestID = s.Account, s.Region, requestID

	if action == "" {
		return action, nil, Errorf("MissingAction", "The request must contain the parameter Action")
	}
	switch v := form.Get("Version"); v {
	case Version:
	case "":
		return action, nil, Errorf("MissingParameter", "The request must contain the parameter Version")
	default:
		return action, nil, Errorf("NoSuchVersion", "The requested version (%s) of service AmazonEC2 does not exist", printable(v))
	}
	act := Actions[action]
	h, ok := s.Handlers[action]
	if act == nil || !ok {
		return action, nil, Errorf("InvalidAction", "The action %s is not valid for this web service.", action)
	}
	req, err := act.DecodeRequest(form)
	if err != nil {
		return action, nil, err
	}
	ctx := WithCaller(r.Context(), id)
	c := Call{Action: act, Identity: id, Request: req, DryRun: isDryRun(req)}
	if s.Gate != nil {
		if err := s.Gate(ctx, c); err != nil {
			return action, nil, err
		}
	}
	if c.DryRun {
		return action, nil, Errorf("DryRunOperation", "Request would have succeeded, but DryRun flag is set.")
	}
	resp, err := invoke(ctx, h, req)
	if err != nil {
		return action, nil, err
	}
	return action, act.EncodeResponse(resp, requestID), nil
}

// readForm reads the parameters of a GET's query or a POST's query and body.
func readForm(w http.ResponseWriter, r *http.Request) (url.Values, error) {
	if r.Method != http.MethodGet && r.Method != http.MethodPost {
		return nil, &Error{Code: "InvalidRequest", Message: "The method " + printable(r.Method) + " is not supported: use POST or GET.", Status: http.StatusMethodNotAllowed}
	}
	// ParseForm alone would ignore a body of another media type, and answer
	// that the action is missing.
	if r.Method == http.MethodPost {
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		if r.Header.Get("Content-Type") == "" {
			r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		}
	}
	if err := r.ParseForm(); err != nil {
		var tooLarge *http.MaxBytesError
		if errors.As(err, &tooLarge) {
			return nil, &Error{Code: "RequestEntityTooLarge", Message: fmt.Sprintf("The request is larger than %d bytes.", maxBody), Status: http.StatusRequestEntityTooLarge}
		}
		return nil, Errorf("MalformedQueryString", "The query string contains a syntax error: %s", printable(err.Error()))
	}
	return r.Form, nil
}

// invoke calls the handler; its panic is this request's error and nobody else's.
func invoke(ctx context.Context, h Handler, req any) (resp any, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("handler panicked: %v\n%s", p, debug.Stack())
		}
	}()
	return h.call(ctx, req)
}

func isDryRun(req any) bool {
	f := reflect.ValueOf(req).Elem().FieldByName("DryRun")
	return f.IsValid() && !f.IsNil() && f.Elem().Bool()
}

// newRequestID is a random UUID (RFC 9562, version 4).
func newRequestID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails since Go 1.24
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:])
}
