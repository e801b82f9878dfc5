package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/underlay-cni/underlay/internal/agent"
)

// checkTimeout is how long a health check waits for the agent, which answers
// between two steps of work: below the second that kubelet gives by default.
const checkTimeout = 800 * time.Millisecond

// handler serves what is asked of the agent over HTTP.
//
//	/metrics  Prometheus
//	/livez    the agent does its work: 200, whatever it waits for; else a
//	          restart may help
//	/readyz   pods can be added, as CNI's STATUS has it, and the runtime has the
//	          plugin: 200; else 503 and why not, with the next step
func handler(a *agent.Agent, n *node) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", a.Metrics())
	mux.Handle("GET /livez", check(a.Alive))
	mux.Handle("GET /readyz", check(func(ctx context.Context) error {
		if err := a.Status(ctx); err != nil {
			return err
		}
		return n.installed()
	}))
	return mux
}

func check(fn func(context.Context) error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), checkTimeout)
		defer cancel()
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		if err := fn(ctx); err != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprintln(w, err)
			return
		}
		fmt.Fprintln(w, "ok")
	})
}

// serveHTTP serves until ctx ends.
func serveHTTP(ctx context.Context, addr string, h http.Handler) error {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
	if err != nil {
		return fmt.Errorf("listen for metrics: %w; choose another --metrics-listen", err)
	}
	s := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second}
	defer context.AfterFunc(ctx, func() { s.Close() })()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve metrics: %w", err)
	}
	return nil
}
