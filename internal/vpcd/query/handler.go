package query

import (
	"context"
	"fmt"
	"reflect"
)

// Handler serves one action. Make it with Handle.
type Handler struct {
	// Refused are the parameters of the action that the function answers with
	// an error, whatever their value or, as NAME≠VALUE, but for one value.
	Refused []string

	request, response reflect.Type // *Req, *Resp
	call              func(ctx context.Context, req any) (any, error)
}

// Handle makes a Handler of a function. Req and Resp are the action's
// generated types; NewServer panics if they are another action's. A nil Resp
// with a nil error answers as an empty one.
//
// ctx ends when the client goes away; Caller(ctx) tells who it is. The request
// belongs to the function.
func Handle[Req, Resp any](fn func(ctx context.Context, req *Req) (*Resp, error)) Handler {
	return Handler{
		request:  reflect.TypeFor[*Req](),
		response: reflect.TypeFor[*Resp](),
		call: func(ctx context.Context, req any) (any, error) {
			resp, err := fn(ctx, req.(*Req))
			if err != nil {
				return nil, err
			}
			if resp == nil {
				resp = new(Resp)
			}
			return resp, nil
		},
	}
}

// Then returns a Handler that does as h does and, when that was without an
// error, calls fn before it answers.
func (h Handler) Then(fn func(ctx context.Context)) Handler {
	call := h.call
	h.call = func(ctx context.Context, req any) (any, error) {
		resp, err := call(ctx, req)
		if err == nil {
			fn(ctx)
		}
		return resp, err
	}
	return h
}

// Invoke calls the function of h: for those who use a handler without HTTP. Req
// and Resp must be those that h was made with.
func Invoke[Req, Resp any](ctx context.Context, h Handler, req *Req) (*Resp, error) {
	if h.request != reflect.TypeFor[*Req]() || h.response != reflect.TypeFor[*Resp]() {
		return nil, fmt.Errorf("call a handler of %v with %T", h.request, req)
	}
	resp, err := h.call(ctx, req)
	if err != nil {
		return nil, err
	}
	return resp.(*Resp), nil
}

// fits panics unless the handler serves the action.
func (h Handler) fits(a *Action) {
	if h.call == nil {
		panic("query: the handler of " + a.Name + " was not made by Handle")
	}
	req, resp := reflect.TypeOf(a.newRequest()), reflect.TypeOf(a.newResponse())
	if h.request != req || h.response != resp {
		panic(fmt.Sprintf("query: the handler of %s takes %v and returns %v, not %v and %v", a.Name, h.request, h.response, req, resp))
	}
}

// Identity is what a request says about its sender. It is believed: the
// signature's credential scope selects account and region, the signature
// itself is not verified.
type Identity struct {
	Account   string
	Region    string
	AccessKey string
	RequestID string
}

type identityKey struct{}

// Caller returns the identity that the request of ctx came with, or the zero
// Identity outside a handler.
func Caller(ctx context.Context) Identity {
	id, _ := ctx.Value(identityKey{}).(Identity)
	return id
}

// WithCaller returns a context whose Caller is id: for those who call a
// handler's function themselves.
func WithCaller(ctx context.Context, id Identity) context.Context {
	return context.WithValue(ctx, identityKey{}, id)
}
