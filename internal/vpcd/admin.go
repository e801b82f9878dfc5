package vpcd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/api"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// AdminPath is below which the admin endpoints are, beside the EC2 API.
const AdminPath = "/_vpcd/"

// settleWait is how long a call waits for the fabric to catch up. It is done in
// milliseconds, unless the machine is busy with something else.
const settleWait = 30 * time.Second

// maxAdminBody bounds a request to an admin endpoint.
const maxAdminBody = 1 << 20

// The values of Health.Status.
const (
	StatusStarting = "starting" // answered with 503
	StatusOK       = "ok"
	StatusDegraded = "degraded" // the API answers, the fabric is not as wanted
)

// Health answers GET /_vpcd/health.
type Health struct {
	Status  string   `json:"status"`
	Name    string   `json:"name"`
	Region  string   `json:"region"`
	Account string   `json:"account"`
	Fabric  bool     `json:"fabric"`
	Errors  []string `json:"errors,omitempty"` // of the fabric, as of the last try
}

// ManagedService is the body of POST /_vpcd/managed-services.
type ManagedService struct {
	Name             string   `json:"name"`
	Kind             string   `json:"kind"` // "database" (also ""), or "load-balancer"
	SubnetID         string   `json:"subnetId"`
	SecurityGroupIDs []string `json:"securityGroupIds"`
	Description      string   `json:"description"` // of the interface; "" is what AWS writes
}

// ManagedServiceInfo answers it, and is one of GET /_vpcd/managed-services.
type ManagedServiceInfo struct {
	Name               string `json:"name"`
	Kind               string `json:"kind"`
	NetworkInterfaceID string `json:"networkInterfaceId"`
	PrivateIPAddress   string `json:"privateIpAddress"`
	Netns              string `json:"netns"` // path; "" without a fabric
}

// InstanceInfo is one of GET /_vpcd/instances.
type InstanceInfo struct {
	InstanceID string `json:"instanceId"`
	Name       string `json:"name"`  // tag Name
	Netns      string `json:"netns"` // path; "" without a fabric, or when stopped or terminated
	State      string `json:"state"`
}

// admin serves what is vpcd's own and not EC2's.
type admin struct {
	options Options
	chaos   *chaos.Control
	store   *store.Store
	api     *api.API
	calls   *callCounter
	fabric  *reconciler // nil without a fabric
	flow    *flowLogger // nil without a fabric
}

// wrap serves the admin endpoints before next. Requests that a browser makes
// for a page of somebody else are refused.
func (a *admin) wrap(next http.Handler) http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, h func(r *http.Request) (any, error)) {
		method, path, _ := strings.Cut(pattern, " ")
		mux.HandleFunc(method+" "+AdminPath+path, func(w http.ResponseWriter, r *http.Request) {
			r.Body = http.MaxBytesReader(w, r.Body, maxAdminBody)
			v, err := h(r)
			a.respond(w, r, v, err)
		})
	}
	handle("GET health", a.health)
	handle("GET chaos", func(*http.Request) (any, error) { return a.chaos.Get(), nil })
	handle("PUT chaos", a.putChaos)
	handle("DELETE chaos", a.resetChaos)
	handle("GET instances", a.instances)
	handle("GET counters", a.counters)
	handle("GET calls", func(*http.Request) (any, error) { return a.calls.all(), nil })
	handle("GET managed-services", a.services)
	handle("POST managed-services", a.createService)
	handle("DELETE managed-services/{name}", a.deleteService)
	mux.HandleFunc("GET "+AdminPath+"flows", a.flows)
	mux.HandleFunc(AdminPath, func(w http.ResponseWriter, r *http.Request) {
		a.respond(w, r, nil, httpError{http.StatusNotFound, fmt.Errorf("there is no %s %s; there are health, chaos, instances, counters, flows, calls, managed-services", r.Method, r.URL.Path)})
	})
	guarded := http.NewCrossOriginProtection().Handler(mux)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, AdminPath) {
			guarded.ServeHTTP(w, r)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// httpError is an error with its HTTP status.
type httpError struct {
	status int
	error
}

func (e httpError) Unwrap() error { return e.error }

// respond writes v, or {"error": …}.
func (a *admin) respond(w http.ResponseWriter, r *http.Request, v any, err error) {
	status := http.StatusOK
	if h, ok := v.(Health); ok && h.Status == StatusStarting {
		status = http.StatusServiceUnavailable
	}
	if err != nil {
		status = http.StatusInternalServerError
		var he httpError
		var qe *query.Error
		switch {
		case errors.As(err, &he):
			status = he.status
		case errors.As(err, &qe):
			status = qe.Status
		case errors.Is(err, api.ErrNoService):
			status = http.StatusNotFound
		default:
			a.options.Logger.Error("admin request broke", "op", r.Method+" "+r.URL.Path, "err", err)
		}
		v = map[string]string{"error": err.Error()}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	_ = enc.Encode(v) // the client may have gone
}

// decode reads a JSON body.
func decode(r *http.Request, v any) error {
	dec := json.NewDecoder(r.Body)
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return httpError{http.StatusBadRequest, fmt.Errorf("read the request: %w", err)}
	}
	return nil
}

func (a *admin) health(*http.Request) (any, error) {
	h := Health{Status: StatusOK, Name: a.options.Name, Region: a.options.Region, Account: a.options.Account, Fabric: a.fabric != nil}
	if a.fabric != nil {
		tried, err := a.fabric.problem()
		switch {
		case !tried:
			h.Status = StatusStarting
		case err != nil:
			h.Status, h.Errors = StatusDegraded, strings.Split(err.Error(), "\n")
		}
	}
	return h, nil
}

func (a *admin) putChaos(r *http.Request) (any, error) {
	var s chaos.Settings
	if err := decode(r, &s); err != nil {
		return nil, err
	}
	if err := a.chaos.Set(s); err != nil {
		return nil, httpError{http.StatusBadRequest, err}
	}
	return a.chaosChanged()
}

func (a *admin) resetChaos(*http.Request) (any, error) {
	a.chaos.Reset()
	return a.chaosChanged()
}

func (a *admin) chaosChanged() (any, error) {
	s := a.chaos.Get()
	a.options.Logger.Info("chaos set", "settings", s)
	if a.fabric != nil {
		a.fabric.lookAgain() // a shorter mapping lag is felt at once
	}
	return s, nil
}

// settled waits for the fabric, so that what an answer names is there.
func (a *admin) settled(ctx context.Context) error {
	if a.fabric == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, settleWait)
	defer cancel()
	if err := a.fabric.wait(ctx); err != nil {
		return httpError{http.StatusServiceUnavailable, fmt.Errorf("%w; see %shealth and vpcd's log", err, AdminPath)}
	}
	return nil
}

// enforce waits for the fabric after a call that is committed already: should
// the fabric be in trouble, the call has succeeded all the same, and health
// tells. What is due at once, as nothing lags, is finished before.
func (a *admin) enforce(ctx context.Context) {
	err := a.api.Settle()
	if err == nil {
		err = a.settled(ctx)
	}
	if err != nil && ctx.Err() == nil {
		a.options.Logger.Warn("call answered before the fabric does what it says", "err", err)
	}
}

func (a *admin) netns(name string) string {
	if a.fabric == nil {
		return ""
	}
	return fabric.NetnsPath(name)
}

// instances lists the instances. What it names as a namespace is there with its
// interfaces, configured, unless the fabric is in trouble, which health tells.
func (a *admin) instances(r *http.Request) (any, error) {
	// What is due is done first: who goes to a namespace by its name, and
	// changes addresses, must not meet us at configuring an interface.
	if err := a.api.Settle(); err != nil {
		return nil, err
	}
	// First the view, then the wait: what became true meanwhile may not be in
	// the fabric yet, and is not told.
	state := a.store.View()
	if err := a.settled(r.Context()); err != nil {
		a.options.Logger.Warn("instances listed without the fabric", "err", err)
	}
	out := []InstanceInfo{}
	for _, i := range state.Instances.All() {
		info := InstanceInfo{InstanceID: string(i.ID), Name: state.TagsOf(string(i.ID))["Name"], State: string(i.State)}
		if lives(i) || i.Power == store.PowerCycle { // which has ended by now
			info.Netns = a.netns(names{a.options.Name}.instance(i.ID))
		}
		out = append(out, info)
	}
	return out, nil
}

func (a *admin) counters(*http.Request) (any, error) {
	if a.fabric == nil {
		return map[vpc.ENIID]fabric.Counters{}, nil
	}
	c, err := a.fabric.net.Counters()
	if err != nil {
		return nil, fmt.Errorf("read the fabric's counters: %w", err)
	}
	return c, nil
}

func (a *admin) createService(r *http.Request) (any, error) {
	var m ManagedService
	if err := decode(r, &m); err != nil {
		return nil, err
	}
	want := api.ManagedService{Name: m.Name, Kind: api.ServiceKind(m.Kind), Subnet: vpc.SubnetID(m.SubnetID), Description: m.Description}
	for _, g := range m.SecurityGroupIDs {
		want.Groups = append(want.Groups, vpc.SecurityGroupID(g))
	}
	e, err := a.api.CreateManagedService(r.Context(), want)
	if err != nil {
		return nil, err
	}
	if err := a.settled(r.Context()); err != nil {
		return nil, err
	}
	return a.service(e), nil
}

// service describes the managed service of an interface.
func (a *admin) service(e *store.ENI) ManagedServiceInfo {
	return ManagedServiceInfo{
		Name: e.Service, Kind: string(api.KindOf(e)), NetworkInterfaceID: string(e.ID), PrivateIPAddress: e.Primary.String(),
		Netns: a.netns(names{a.options.Name}.service(e.Service)),
	}
}

func (a *admin) services(*http.Request) (any, error) {
	state := a.store.View()
	out := []ManagedServiceInfo{}
	for _, s := range state.Services.All() {
		out = append(out, a.service(state.ENI(s.ENI)))
	}
	return out, nil
}

func (a *admin) deleteService(r *http.Request) (any, error) {
	name := r.PathValue("name")
	if err := a.api.DeleteManagedService(r.Context(), name); err != nil {
		return nil, err
	}
	return map[string]string{"deleted": name}, a.settled(r.Context())
}
