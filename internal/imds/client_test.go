package imds

import (
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// metadata serves items as the service does, to those who have a token.
type metadata struct {
	mu    sync.Mutex
	items map[string]string
	asked map[string]int
}

func (m *metadata) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	defer m.mu.Unlock()
	path := strings.TrimPrefix(r.URL.Path, "/latest/")
	if r.Method == http.MethodPut && path == "api/token" {
		w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "300")
		_, _ = w.Write([]byte("secret"))
		return
	}
	if r.Header.Get("X-Aws-Ec2-Metadata-Token") != "secret" {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	path = strings.TrimPrefix(path, "meta-data/")
	m.asked[path]++
	v, ok := m.items[path]
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	_, _ = w.Write([]byte(v))
}

func node() *metadata {
	m := &metadata{asked: map[string]int{}, items: map[string]string{
		"instance-id": "i-0123456789abcdef0", "instance-type": "m5.large", "placement/availability-zone": "us-east-1a", "placement/availability-zone-id": "use1-az1", "placement/region": "us-east-1", "mac": "02:00:00:00:00:01",
		"network/interfaces/macs/": "02:00:00:00:00:01/\n02:00:00:00:00:02/\n02:00:00:00:00:03/",
	}}
	for k, v := range map[string]string{"local-ipv4s": "10.0.0.4\n10.0.0.9", "vpc-id": "vpc-1", "vpc-ipv4-cidr-blocks": "10.0.0.0/16\n100.64.0.0/16", "subnet-id": "subnet-1",
		"subnet-ipv4-cidr-block": "10.0.0.0/24", "security-group-ids": "sg-1\nsg-2", "interface-id": "eni-1", "device-number": "0", "owner-id": "123456789012"} {
		m.items["network/interfaces/macs/02:00:00:00:00:01/"+k] = v
	}
	for k, v := range map[string]string{"local-ipv4s": "10.0.0.5", "ipv4-prefix": "10.0.0.32/28\n10.0.0.48/28", "interface-id": "eni-2", "device-number": "1"} {
		m.items["network/interfaces/macs/02:00:00:00:00:02/"+k] = v
	}
	return m // the third interface is listed and not there: it goes away
}

var byValue = cmp.Options{cmp.Comparer(func(x, y netip.Addr) bool { return x == y }), cmp.Comparer(func(x, y netip.Prefix) bool { return x == y })}

func TestIdentity(t *testing.T) {
	m := node()
	srv := httptest.NewServer(m)
	defer srv.Close()
	got, err := New(srv.URL).Identity(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := Identity{Instance: "i-0123456789abcdef0", Type: "m5.large", AvailabilityZone: "us-east-1a", ZoneID: "use1-az1", Region: "us-east-1", Account: "123456789012", MAC: "02:00:00:00:00:01", Addr: netip.MustParseAddr("10.0.0.4"),
		VPC: "vpc-1", VPCCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16"), netip.MustParsePrefix("100.64.0.0/16")}, Subnet: "subnet-1", SubnetCIDR: netip.MustParsePrefix("10.0.0.0/24"),
		Groups: []vpc.SecurityGroupID{"sg-1", "sg-2"}, ENI: "eni-1"}
	if diff := cmp.Diff(want, got, byValue); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	for item, v := range map[string]string{"instance-id": "nonsense", "network/interfaces/macs/02:00:00:00:00:01/local-ipv4s": "10.0.0.400", "mac": strings.Repeat("a", maxItem+1)} {
		m := node()
		m.items[item] = v
		srv := httptest.NewServer(m)
		if id, err := New(srv.URL).Identity(t.Context()); err == nil {
			t.Errorf("%s = %.20s was believed: %+v", item, v, id)
		}
		srv.Close()
	}
}

func TestVPCCIDRs(t *testing.T) {
	m := node()
	srv := httptest.NewServer(m)
	defer srv.Close()
	c := New(srv.URL)
	for _, more := range []string{"", "\n198.51.100.0/24"} {
		m.mu.Lock()
		m.items["network/interfaces/macs/02:00:00:00:00:01/vpc-ipv4-cidr-blocks"] += more
		m.mu.Unlock()
		want := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16"), netip.MustParsePrefix("100.64.0.0/16")}
		if more != "" {
			want = append(want, netip.MustParsePrefix("198.51.100.0/24"))
		}
		got, err := c.VPCCIDRs(t.Context(), "02:00:00:00:00:01")
		if diff := cmp.Diff(want, got, byValue); err != nil || diff != "" {
			t.Errorf("%v; -want +got:\n%s", err, diff)
		}
	}
}

func TestInterfaces(t *testing.T) {
	m := node()
	srv := httptest.NewServer(m)
	defer srv.Close()
	c := New(srv.URL)
	for range 3 {
		got, err := c.Interfaces(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		want := []Interface{
			{MAC: "02:00:00:00:00:01", ID: "eni-1", Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.4"), netip.MustParseAddr("10.0.0.9")}},
			{MAC: "02:00:00:00:00:02", ID: "eni-2", Device: 1, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.5")},
				Prefixes: []netip.Prefix{netip.MustParsePrefix("10.0.0.32/28"), netip.MustParsePrefix("10.0.0.48/28")}},
		}
		if diff := cmp.Diff(want, got, byValue); diff != "" {
			t.Fatalf("-want +got:\n%s", diff)
		}
	}
	if n := m.asked["network/interfaces/macs/02:00:00:00:00:01/interface-id"]; n != 1 {
		t.Errorf("an ID that never changes was asked for %d times", n)
	}
	srv.Close()
	if _, err := c.Interfaces(t.Context()); err == nil {
		t.Error("no service, no error")
	}
}
