package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"
)

// admin is vpcd's own interface, beside the EC2 API on the same address.
type admin struct {
	endpoint string // "http://127.0.0.1:7424"
	client   http.Client
}

func newAdmin(endpoint string) *admin {
	return &admin{
		endpoint: endpoint,
		// A proxy of the person's environment has no business here.
		client: http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
			DialContext: (&net.Dialer{Timeout: 2 * time.Second}).DialContext,
		}},
	}
}

func (a *admin) do(ctx context.Context, method, path string, in, out any) error {
	what := method + " " + a.endpoint + "/_vpcd/" + path
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, a.endpoint+"/_vpcd/"+path, body)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return fmt.Errorf("ask vpcd: %w", err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("%s: %s: %s", what, resp.Status, shorten(strings.TrimSpace(string(b)), 500))
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("%s: decode the answer: %w", what, err)
	}
	return nil
}

// health returns nil when the vpcd of this lab serves.
func (a *admin) health(ctx context.Context, lab string) error {
	var h struct {
		Status string   `json:"status"`
		Name   string   `json:"name"`
		Errors []string `json:"errors"`
	}
	if err := a.do(ctx, http.MethodGet, "health", nil, &h); err != nil {
		return err
	}
	if h.Name != lab {
		return fmt.Errorf("what answers at %s is vpcd of another lab, %q", a.endpoint, h.Name)
	}
	if h.Status != "ok" || len(h.Errors) > 0 {
		return fmt.Errorf("vpcd says that it is %q: %s", h.Status, strings.Join(h.Errors, "; "))
	}
	return nil
}

type adminInstance struct {
	InstanceID string `json:"instanceId"`
	Name       string `json:"name"`
	Netns      string `json:"netns"`
	State      string `json:"state"`
}

func (a *admin) instances(ctx context.Context) ([]adminInstance, error) {
	var all []adminInstance
	return all, a.do(ctx, http.MethodGet, "instances", nil, &all)
}

type managedService struct {
	Name               string     `json:"name"`
	NetworkInterfaceID string     `json:"networkInterfaceId"`
	PrivateIPAddress   netip.Addr `json:"privateIpAddress"`
	Netns              string     `json:"netns"`
}

// createManagedService makes what RDS would make of a database in a subnet: a
// requester-managed interface that belongs to no instance of ours.
func (a *admin) createManagedService(ctx context.Context, name, subnet string, groups []string, description string) (managedService, error) {
	var s managedService
	in := map[string]any{"name": name, "subnetId": subnet, "securityGroupIds": groups, "description": description}
	if err := a.do(ctx, http.MethodPost, "managed-services", in, &s); err != nil {
		return s, fmt.Errorf("make managed service %s: %w", name, err)
	}
	if s.Netns == "" || !s.PrivateIPAddress.IsValid() {
		return s, errors.New("make managed service " + name + ": vpcd names no namespace and address for it")
	}
	return s, nil
}

// checkFree returns an error when address cannot be listened on.
func checkFree(address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("%w; choose another with --listen, or leave the flag out and a free one is found", err)
	}
	return l.Close()
}

// freeListen returns want when it can be listened on, else an address on
// another free port of the same host. The port may be taken by another program
// before vpcd has it; vpcd then says so.
func freeListen(want string) (string, error) {
	l, err := net.Listen("tcp", want)
	if err != nil {
		host, _, serr := net.SplitHostPort(want)
		if serr != nil {
			return "", fmt.Errorf("read the address %q: %w", want, serr)
		}
		if l, err = net.Listen("tcp", net.JoinHostPort(host, "0")); err != nil {
			return "", fmt.Errorf("find a free port: %w", err)
		}
	}
	defer l.Close()
	return l.Addr().String(), nil
}
