package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
)

// Options configure a Client.
type Options struct {
	Node       string // the node's name in the API
	Kubeconfig string // path; "": in-cluster, by the pod's service account
	Namespace  string // of our DaemonSet; "": not known
	DaemonSet  string // its name; "": not known
	Version    string // ours, for the user agent
	Logger     *slog.Logger
}

// Client speaks to the API server for one node. Make it with New, then call
// Run. Its methods are safe for concurrent use; Publish, Tell and Served never
// wait.
type Client struct {
	opts   Options
	log    *slog.Logger
	api    rest.Interface
	node   node
	events recorder

	mu    sync.Mutex
	known bool // our DaemonSet was read once: see Leaving
}

// requestTimeout bounds one request, its retries after "429 Too Many Requests"
// included.
const requestTimeout = 10 * time.Second

// New returns a client. It speaks to nobody yet: an API server that is away, or
// a token that comes later, is no error here.
func New(opts Options) (*Client, error) {
	var cfg *rest.Config
	var err error
	if opts.Kubeconfig != "" {
		if cfg, err = clientcmd.BuildConfigFromFlags("", opts.Kubeconfig); err != nil {
			return nil, fmt.Errorf("read --kubeconfig: %w", err)
		}
	} else if cfg, err = rest.InClusterConfig(); errors.Is(err, rest.ErrNotInCluster) {
		return nil, errors.New("--node-name is set, but this is no pod of a cluster (KUBERNETES_SERVICE_HOST is not set); give --kubeconfig, or leave --node-name out")
	} else if err != nil {
		return nil, fmt.Errorf("find the API server as a pod does: %w; the pod needs a service account token (automountServiceAccountToken)", err)
	}
	return newClient(cfg, opts)
}

func newClient(cfg *rest.Config, opts Options) (*Client, error) {
	if opts.Logger == nil {
		opts.Logger = slog.Default()
	}
	klog.SetSlogLogger(opts.Logger) // what client-go has to say goes where all goes
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return nil, fmt.Errorf("register the API's types: %w", err)
	}
	cfg = rest.CopyConfig(cfg)
	cfg.APIPath, cfg.GroupVersion = "/api", &corev1.SchemeGroupVersion
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	cfg.UserAgent = "underlay-agent/" + opts.Version
	cfg.Timeout = requestTimeout
	// Our own loops send far less; this is what a fault of theirs may cost.
	cfg.QPS, cfg.Burst = 5, 10
	api, err := rest.RESTClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("make a client of the API server: %w", err)
	}
	c := &Client{opts: opts, log: opts.Logger, api: api}
	c.node.init()
	c.events.init()
	return c, nil
}

// Run keeps the node's object as Publish says and delivers events, until ctx
// ends. An API server that is away is waited for.
func (c *Client) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, loop := range []func(context.Context){c.keepNode, c.sendEvents, c.findDaemonSet} {
		wg.Go(func() { loop(ctx) })
	}
	wg.Wait()
	return nil
}

// backoff is the growing delay after failures of the API server.
type backoff struct{ delay time.Duration }

const (
	firstDelay = time.Second
	mostDelay  = time.Minute
)

// fail returns how long to wait, ±25 %, so that nodes that lost the API server
// together do not return together. The server's own Retry-After counts where it
// is longer.
func (b *backoff) fail(err error) time.Duration {
	b.delay = min(max(2*b.delay, firstDelay), mostDelay)
	d := spread(b.delay)
	if s, ok := apierrors.SuggestsClientDelay(err); ok {
		d = max(d, min(time.Duration(s)*time.Second, mostDelay))
	}
	return d
}

func (b *backoff) reset() { b.delay = 0 }

// absent reports whether the API server says that an object is not there.
func absent(err error) bool { return apierrors.IsNotFound(err) }

// refused reports whether the API server does not let us.
func refused(err error) bool { return apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) }

// wait waits for d, or until one of wake has something; it reports whether ctx
// is still on.
func wait(ctx context.Context, d time.Duration, wake <-chan struct{}) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-wake:
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}

// signal wakes who waits on a channel of size 1, or who will.
func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// object is the part of any object that Leaving looks at.
type object struct {
	Metadata metav1.ObjectMeta `json:"metadata"`
}
