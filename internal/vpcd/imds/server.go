package imds

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/vpc"
)

const (
	tokenPath   = "/latest/api/token"
	tokenHeader = "X-Aws-Ec2-Metadata-Token"
	ttlHeader   = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds"
)

// Config of a Server. Only Now and Logger may be left out.
type Config struct {
	Instance vpc.InstanceID
	Source   Source
	Key      []byte // KeySize bytes; tokens live as long as it does
	Now      func() time.Time
	Logger   *slog.Logger
}

// Server answers the metadata requests of one instance.
type Server struct {
	id     vpc.InstanceID
	source Source
	key    []byte
	now    func() time.Time
	log    *slog.Logger
}

// New makes a Server.
func New(c Config) *Server {
	s := &Server{id: c.Instance, source: c.Source, key: c.Key, now: c.Now, log: c.Logger}
	if s.now == nil {
		s.now = time.Now
	}
	if s.log == nil {
		s.log = slog.Default()
	}
	return s
}

type connKey struct{}

// HTTP returns an http.Server for the listener of one ENI. Without it the
// handler cannot set the hop limit of token answers.
func (s *Server) HTTP() *http.Server {
	return &http.Server{
		Handler: s,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, c)
		},
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      10 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	status, body := s.answer(w, r)
	h := w.Header()
	if status != http.StatusOK {
		h.Set("Content-Type", "text/html")
		body = fmt.Sprintf("<!DOCTYPE html>\n<html><head><title>%d - %s</title></head><body><h1>%[1]d - %[2]s</h1></body></html>\n", status, http.StatusText(status))
	} else if h.Get("Content-Type") == "" {
		h.Set("Content-Type", "text/plain")
	}
	h.Set("Server", "EC2ws")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	if r.Method != http.MethodHead {
		_, _ = io.WriteString(w, body) // a client that is gone does not mind
	}
	s.log.Debug("imds request", "instance", s.id, "method", r.Method, "path", r.URL.Path, "status", status)
}

func (s *Server) answer(w http.ResponseWriter, r *http.Request) (status int, body string) {
	i, ok := s.source.Metadata(s.id)
	if !ok {
		return http.StatusNotFound, ""
	}
	if i.Options.Disabled {
		return http.StatusForbidden, ""
	}
	switch r.Method {
	case http.MethodPut:
		return s.putToken(w, r, i)
	case http.MethodGet, http.MethodHead:
	default:
		w.Header().Set("Allow", "GET, HEAD, PUT")
		return http.StatusMethodNotAllowed, ""
	}
	tokens, given := r.Header[tokenHeader]
	switch {
	case given && (len(tokens) != 1 || !checkToken(s.key, s.id, tokens[0], s.now())),
		!given && i.Options.TokenRequired:
		return http.StatusUnauthorized, ""
	}
	if r.URL.Path == tokenPath {
		w.Header().Set("Allow", "PUT")
		return http.StatusMethodNotAllowed, ""
	}
	body, ok = s.lookup(i, r.URL.Path)
	if !ok {
		return http.StatusNotFound, ""
	}
	switch {
	case strings.HasSuffix(r.URL.Path, "/user-data"):
		w.Header().Set("Content-Type", "application/octet-stream")
	case strings.HasSuffix(r.URL.Path, "/iam/info"), strings.Contains(r.URL.Path, "/iam/security-credentials/") && strings.HasPrefix(body, "{"):
		w.Header().Set("Content-Type", "application/json")
	}
	return http.StatusOK, body
}

// putToken makes a token. The answer must not travel further than the hop limit.
func (s *Server) putToken(w http.ResponseWriter, r *http.Request, i *Instance) (int, string) {
	if r.URL.Path != tokenPath {
		if strings.HasSuffix(r.URL.Path, "/api/token") {
			return http.StatusForbidden, "" // a token path of one version only
		}
		w.Header().Set("Allow", "GET, HEAD")
		return http.StatusMethodNotAllowed, ""
	}
	// A proxy would carry the answer past the hop limit.
	if _, proxied := r.Header["X-Forwarded-For"]; proxied {
		return http.StatusForbidden, ""
	}
	ttls := r.Header[ttlHeader]
	if len(ttls) != 1 {
		return http.StatusBadRequest, ""
	}
	ttl, err := strconv.ParseUint(ttls[0], 10, 32)
	if err != nil || ttl < minTTL || ttl > maxTTL {
		return http.StatusBadRequest, ""
	}
	if c, ok := r.Context().Value(connKey{}).(net.Conn); ok {
		if err := setTTL(c, i.Options.HopLimit); err != nil {
			// Rather no token than one that leaves the instance.
			s.log.Error("hop limit not set", "instance", s.id, "err", err)
			return http.StatusInternalServerError, ""
		}
	}
	w.Header().Set("Connection", "close")
	w.Header().Set(ttlHeader, strconv.FormatUint(ttl, 10))
	return http.StatusOK, newToken(s.key, s.id, s.now().Add(time.Duration(ttl)*time.Second))
}

// setTTL sets the IP TTL of all that the connection sends from now on.
func setTTL(c net.Conn, ttl int) error {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return fmt.Errorf("set TTL: %T is no socket", c)
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return fmt.Errorf("set TTL: %w", err)
	}
	var optErr error
	if err := raw.Control(func(fd uintptr) {
		optErr = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TTL, min(max(ttl, 1), 64))
	}); err != nil {
		return fmt.Errorf("set TTL: %w", err)
	}
	if optErr != nil {
		return fmt.Errorf("set TTL: %w", optErr)
	}
	return nil
}
