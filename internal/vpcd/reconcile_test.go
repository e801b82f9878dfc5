package vpcd

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/dns"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
	"github.com/underlay-cni/underlay/internal/vpcd/imds"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// fakeNet is a fabric whose interfaces listen on the loopback interface.
type fakeNet struct {
	mu        sync.Mutex
	config    fabric.Config
	sets      []fabric.Config // all there were
	err       error
	listeners map[vpc.ENIID]map[netip.AddrPort]net.Listener
}

func (f *fakeNet) Set(_ context.Context, c fabric.Config) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.config = c
	f.sets = append(f.sets, c)
	return f.err
}

func (f *fakeNet) exists(netns string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Contains(f.config.Guests, fabric.Guest{Netns: netns})
}

func (f *fakeNet) ListenTCP(eni vpc.ENIID, at netip.AddrPort) (net.Listener, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.listeners[eni] == nil {
		f.listeners[eni] = map[netip.AddrPort]net.Listener{}
	}
	f.listeners[eni][at] = l
	return l, nil
}

func (f *fakeNet) Counters() (map[vpc.ENIID]fabric.Counters, error) { return nil, nil }

func (f *fakeNet) addresses(id vpc.ENIID) []netip.Prefix {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, i := range f.config.Interfaces {
		if i.ID == id {
			return i.Addresses
		}
	}
	return nil
}

func (f *fakeNet) listener(id vpc.ENIID, at netip.AddrPort) net.Listener {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.listeners[id][at]
}

func (f *fakeNet) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

// eventually polls until ok, for at most half a minute.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		<-time.After(time.Millisecond)
	}
}

func startReconciler(t *testing.T, w *world, lag func() time.Duration) (*reconciler, *fakeNet) {
	t.Helper()
	f := &fakeNet{listeners: map[vpc.ENIID]map[netip.AddrPort]net.Listener{}}
	log := slog.New(slog.DiscardHandler)
	source := &metadata{store: w.Store, lag: func() time.Duration { return 0 }, now: time.Now}
	r := &reconciler{
		names: names{"demo"}, store: w.Store, net: f, mappingLag: lag, now: time.Now, log: log, changed: w.Changed(), again: make(chan struct{}, 1), exists: f.exists,
		ec2: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ec2") })},
		dns: &dns.Server{Region: dns.Region{Name: "us-east-1"}, View: w.View, Logger: log},
		imds: func(id vpc.InstanceID) *imds.Server {
			return imds.New(imds.Config{Instance: id, Source: source, Key: make([]byte, imds.KeySize), Logger: log})
		},
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		_ = r.ec2.Close()
	})
	return r, f
}

func noLag() time.Duration { return 0 }

func fetch(t *testing.T, l net.Listener, path string) (int, string) {
	t.Helper()
	resp, err := http.Get("http://" + l.Addr().String() + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func TestReconcilerServesEachInterface(t *testing.T) {
	w := newWorld(t)
	r, f := startReconciler(t, w, noLag)
	if err := r.wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	const eth0 = "eni-00000000000000001"
	if code, _ := fetch(t, f.listener(eth0, imdsAt), "/latest/meta-data/mac"); code != 401 {
		t.Errorf("IMDS without a token: %d", code)
	}
	if code, body := fetch(t, f.listener(eth0, ec2At), "/"); code != 200 || body != "ec2" {
		t.Errorf("EC2: %d %s", code, body)
	}
	// A listener that the fabric closed is opened again, without a change.
	old := f.listener(eth0, imdsAt)
	_ = old.Close()
	eventually(t, "reopened", func() bool { return f.listener(eth0, imdsAt) != old })
	// What is detached is no longer served.
	l := f.listener(eth0, imdsAt)
	w.change(func(tx *store.Tx) { e := *tx.ENI(eth0); e.Attachment = nil; tx.PutENI(&e) })
	eventually(t, "closed", func() bool {
		c, err := net.Dial("tcp4", l.Addr().String())
		if err == nil {
			_ = c.Close()
		}
		return err != nil
	})
}

func TestReconcilerReportsAndRetries(t *testing.T) {
	w := newWorld(t)
	r, f := startReconciler(t, w, noLag)
	if err := r.wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.fail(errors.New("no room"))
	w.change(func(tx *store.Tx) { tx.SetTags("x", map[string]string{"a": "b"}) })
	if err := r.wait(t.Context()); err == nil || !strings.Contains(err.Error(), "no room") {
		t.Errorf("wait: %v", err)
	}
	f.fail(nil)
	eventually(t, "well again", func() bool { _, err := r.problem(); return err == nil })
}

func TestReconcilerAppliesLaggingMappingsWhenDue(t *testing.T) {
	w := newWorld(t)
	w.now = time.Now()
	lag := 300 * time.Millisecond
	r, f := startReconciler(t, w, func() time.Duration { return lag })
	changedAt := time.Now()
	w.now = changedAt
	w.change(func(tx *store.Tx) {
		e := *tx.ENI("eni-00000000000000001")
		e.Secondary = []netip.Addr{addr("10.0.1.20")}
		tx.PutENI(&e)
	})
	if err := r.wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := f.addresses("eni-00000000000000001"); len(got) == 2 && time.Since(changedAt) < lag {
		t.Errorf("the address was mapped at once: %v", got)
	}
	eventually(t, "mapped", func() bool { return len(f.addresses("eni-00000000000000001")) == 2 })
	if took := time.Since(changedAt); took < lag {
		t.Errorf("mapped after %v", took)
	}
}

// A namespace goes before it comes anew, also when the stop and the start fall
// into one look of the reconciler.
func TestPowerCycle(t *testing.T) {
	w := newWorld(t)
	r, f := startReconciler(t, w, noLag)
	guests := func() []bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		var out []bool
		for _, c := range f.sets {
			out = append(out, slices.Contains(c.Guests, fabric.Guest{Netns: "ul-demo-" + string(testNode)}))
		}
		f.sets = nil
		return out
	}
	power := func(p store.Power) {
		t.Helper()
		w.change(func(tx *store.Tx) {
			i := *tx.Instance(testNode)
			i.Power = p
			tx.PutInstance(&i)
		})
		if err := r.wait(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	power(store.PowerOn)
	guests()
	power(store.PowerCycle)
	if got := guests(); !slices.Contains(got, false) || !got[len(got)-1] {
		t.Errorf("power cycled: %v", got)
	}
	if p := w.View().Instance(testNode).Power; p != store.PowerOn {
		t.Errorf("after the cycle the power is %q", p)
	}
	power(store.PowerOff)
	if got := guests(); got[len(got)-1] {
		t.Errorf("powered off: %v", got)
	}
	if _, ok := (&metadata{store: w.Store, lag: noLag, now: time.Now}).Metadata(testNode); ok {
		t.Error("an instance without power has metadata")
	}
	if e := w.View().ENI("eni-00000000000000001"); e.Attachment == nil || f.addresses(e.ID) != nil {
		t.Error("the interface is detached, or still on the wire")
	}
}
