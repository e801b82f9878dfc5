package imds

import (
	"bufio"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/vpc"
)

var testNow = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// world is a Source.
type world map[vpc.InstanceID]*Instance

func (w world) Metadata(id vpc.InstanceID) (*Instance, bool) { i, ok := w[id]; return i, ok }

func testInstance() *Instance {
	return &Instance{
		ID: "i-0123456789abcdef0", Type: "m5.large", Image: "ami-0123456789abcdef0", Reservation: "r-1", LaunchIndex: 2,
		Launched: testNow, Account: "123456789012", Region: "us-east-1", Zone: "us-east-1b", ZoneID: "use1-az2", Arch: "x86_64",
		UserData: []byte("#!/bin/sh\n"), Profile: "arn:aws:iam::123456789012:instance-profile/node",
		Tags: map[string]string{"Name": "n1", "a/b": "c"},
		Interfaces: []Interface{
			{ID: "eni-1", MAC: "02:00:00:00:00:01", Device: 0, Subnet: "subnet-1", SubnetCIDR: netip.MustParsePrefix("10.0.1.0/24"),
				VPC: "vpc-1", VPCCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16"), netip.MustParsePrefix("100.64.0.0/16")},
				Primary: netip.MustParseAddr("10.0.1.5"), Secondary: []netip.Addr{netip.MustParseAddr("10.0.1.9"), netip.MustParseAddr("10.0.1.7")},
				GroupIDs: []vpc.SecurityGroupID{"sg-1", "sg-2"}, GroupNames: []string{"web", "db"}, OwnerID: "123456789012"},
			{ID: "eni-2", MAC: "02:00:00:00:00:02", Device: 1, Subnet: "subnet-1", SubnetCIDR: netip.MustParsePrefix("10.0.1.0/24"),
				VPC: "vpc-1", Primary: netip.MustParseAddr("10.0.1.6"),
				Prefixes: []netip.Prefix{netip.MustParsePrefix("10.0.1.16/28"), netip.MustParsePrefix("10.0.1.32/28")}, OwnerID: "123456789012"},
		},
		Options: Options{HopLimit: 1, TokenRequired: true, Tags: true},
	}
}

type fixture struct {
	*testing.T
	*Server
	now time.Time
	i   *Instance
}

func setup(t *testing.T) *fixture {
	f := &fixture{T: t, now: testNow, i: testInstance()}
	f.Server = New(Config{
		Instance: f.i.ID, Source: world{f.i.ID: f.i}, Key: []byte("0123456789abcdef0123456789abcdef"),
		Now: func() time.Time { return f.now }, Logger: slog.New(slog.DiscardHandler),
	})
	return f
}

// do sends a request; headers are "Name: value".
func (f *fixture) do(method, path string, headers ...string) *http.Response {
	r := httptest.NewRequest(method, "http://169.254.169.254/", nil)
	r.URL.Path = path
	for _, h := range headers {
		n, v, _ := strings.Cut(h, ": ")
		r.Header.Add(n, v)
	}
	w := httptest.NewRecorder()
	f.ServeHTTP(w, r)
	return w.Result()
}

func (f *fixture) token() string {
	f.Helper()
	resp := f.do("PUT", tokenPath, "X-aws-ec2-metadata-token-ttl-seconds: 60")
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 {
		f.Fatalf("token: %d %s %v", resp.StatusCode, b, err)
	}
	if got := resp.Header.Get("X-aws-ec2-metadata-token-ttl-seconds"); got != "60" || resp.Header.Get("Connection") != "close" {
		f.Errorf("token answer: %v", resp.Header)
	}
	return string(b)
}

func (f *fixture) get(path string) string {
	f.Helper()
	resp := f.do("GET", path, "X-aws-ec2-metadata-token: "+f.token())
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		f.Fatal(err)
	}
	if resp.StatusCode != 200 {
		return resp.Status
	}
	return string(b)
}

func TestItems(t *testing.T) {
	f := setup(t)
	const eth0, eth1 = "/latest/meta-data/network/interfaces/macs/02:00:00:00:00:01", "/latest/meta-data/network/interfaces/macs/02:00:00:00:00:02"
	tests := map[string]string{
		"/":                                              strings.Join(versions, "\n"),
		"/latest":                                        "dynamic\nmeta-data\nuser-data",
		"/latest/meta-data/instance-id":                  "i-0123456789abcdef0",
		"/2021-03-23/meta-data/instance-id":              "i-0123456789abcdef0",
		"//latest//meta-data//instance-id":               "i-0123456789abcdef0",
		"/latest/meta-data/instance-id/":                 "404 Not Found",
		"/latest/meta-data/instance-id/x":                "404 Not Found",
		"/latest/meta-data/nonsense":                     "404 Not Found",
		"/2001-01-01/meta-data/instance-id":              "404 Not Found",
		"/latest/meta-data/../meta-data/mac":             "404 Not Found",
		"/latest/user-data":                              "#!/bin/sh\n",
		"/latest/meta-data/instance-type":                "m5.large",
		"/latest/meta-data/local-ipv4":                   "10.0.1.5",
		"/latest/meta-data/mac":                          "02:00:00:00:00:01",
		"/latest/meta-data/hostname":                     "ip-10-0-1-5.ec2.internal",
		"/latest/meta-data/security-groups":              "web\ndb",
		"/latest/meta-data/reservation-id":               "r-1",
		"/latest/meta-data/ami-launch-index":             "2",
		"/latest/meta-data/placement":                    "availability-zone\navailability-zone-id\nregion",
		"/latest/meta-data/placement/region":             "us-east-1",
		"/latest/meta-data/services/domain":              "amazonaws.com",
		"/latest/meta-data/services/partition":           "aws",
		"/latest/meta-data/tags/instance/":               "Name",
		"/latest/meta-data/tags/instance/Name":           "n1",
		"/latest/meta-data/public-ipv4":                  "404 Not Found",
		"/latest/meta-data/iam/":                         "info\nsecurity-credentials/",
		"/latest/meta-data/iam/security-credentials/":    "node",
		"/latest/meta-data/network/":                     "interfaces/",
		"/latest/meta-data/network/interfaces/macs/":     "02:00:00:00:00:01/\n02:00:00:00:00:02/",
		"/latest/meta-data/network/interfaces/macs":      "02:00:00:00:00:01/\n02:00:00:00:00:02/",
		"/latest/meta-data/network/interfaces/macs/nil/": "404 Not Found",
		eth0 + "/device-number":                          "0",
		eth0 + "/interface-id":                           "eni-1",
		eth0 + "/local-ipv4s":                            "10.0.1.5\n10.0.1.9\n10.0.1.7",
		eth0 + "/ipv4-prefix":                            "404 Not Found",
		eth0 + "/security-group-ids":                     "sg-1\nsg-2",
		eth0 + "/security-groups":                        "web\ndb",
		eth0 + "/subnet-id":                              "subnet-1",
		eth0 + "/subnet-ipv4-cidr-block":                 "10.0.1.0/24",
		eth0 + "/vpc-id":                                 "vpc-1",
		eth0 + "/vpc-ipv4-cidr-block":                    "10.0.0.0/16",
		eth0 + "/vpc-ipv4-cidr-blocks":                   "10.0.0.0/16\n100.64.0.0/16",
		eth0 + "/owner-id":                               "123456789012",
		eth1 + "/device-number":                          "1",
		eth1 + "/network-card":                           "0",
		eth1 + "/network-card-index":                     "0",
		eth1 + "/local-ipv4s":                            "10.0.1.6",
		eth1 + "/ipv4-prefix":                            "10.0.1.16/28\n10.0.1.32/28",
		eth1 + "/local-hostname":                         "ip-10-0-1-6.ec2.internal",
	}
	for path, want := range tests {
		if got := f.get(path); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
	var doc map[string]any
	if err := json.Unmarshal([]byte(f.get("/latest/dynamic/instance-identity/document")), &doc); err != nil {
		t.Fatal(err)
	}
	if doc["instanceId"] != "i-0123456789abcdef0" || doc["privateIp"] != "10.0.1.5" || doc["region"] != "us-east-1" || doc["availabilityZone"] != "us-east-1b" {
		t.Errorf("identity document: %v", doc)
	}
	var cred map[string]string
	if err := json.Unmarshal([]byte(f.get("/latest/meta-data/iam/security-credentials/node")), &cred); err != nil {
		t.Fatal(err)
	}
	if cred["Code"] != "Success" || len(cred["AccessKeyId"]) != 20 || len(cred["SecretAccessKey"]) != 40 {
		t.Errorf("credentials: %v", cred)
	}
}

func TestItemsOfIPv6(t *testing.T) {
	f := setup(t)
	const eth0, eth1 = "/latest/meta-data/network/interfaces/macs/02:00:00:00:00:01", "/latest/meta-data/network/interfaces/macs/02:00:00:00:00:02"
	items := []string{"/ipv6s", "/ipv6-prefix", "/subnet-ipv6-cidr-blocks", "/vpc-ipv6-cidr-blocks"}
	for _, item := range items {
		if got := f.get(eth0 + item); got != "404 Not Found" {
			t.Errorf("without IPv6, %s: %q", item, got)
		}
	}
	if got := f.get("/latest/meta-data/ipv6"); got != "404 Not Found" {
		t.Errorf("without IPv6, ipv6: %q", got)
	}
	n := &f.i.Interfaces[1]
	n.IPv6 = []netip.Addr{netip.MustParseAddr("2001:db8:0:101::6")}
	if got := f.get("/latest/meta-data/ipv6"); got != "404 Not Found" {
		t.Errorf("of the second interface, ipv6: %q", got)
	}
	n = &f.i.Interfaces[0]
	n.IPv6 = []netip.Addr{netip.MustParseAddr("2001:db8:0:101::9"), netip.MustParseAddr("2001:db8:0:101::4")}
	n.IPv6Prefixes = []netip.Prefix{netip.MustParsePrefix("2001:db8:0:101:1::/80")}
	n.SubnetIPv6 = []netip.Prefix{netip.MustParsePrefix("2001:db8:0:101::/64")}
	n.VPCIPv6 = []netip.Prefix{netip.MustParsePrefix("2001:db8:0:100::/56"), netip.MustParsePrefix("2001:db8:0:200::/56")}
	for path, want := range map[string]string{
		"/latest/meta-data/ipv6":          "2001:db8:0:101::9",
		eth0 + "/ipv6s":                   "2001:db8:0:101::9\n2001:db8:0:101::4",
		eth0 + "/ipv6-prefix":             "2001:db8:0:101:1::/80",
		eth0 + "/subnet-ipv6-cidr-blocks": "2001:db8:0:101::/64",
		eth0 + "/vpc-ipv6-cidr-blocks":    "2001:db8:0:100::/56\n2001:db8:0:200::/56",
		eth1 + "/ipv6s":                   "2001:db8:0:101::6",
	} {
		if got := f.get(path); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
}

// Every item of the listings is there, and every directory is listed.
func TestListingsAreTrue(t *testing.T) {
	f := setup(t)
	n := 0
	var walk func(path string)
	walk = func(path string) {
		for name := range strings.SplitSeq(f.get(path), "\n") {
			n++
			if got := f.get(path + name); strings.HasPrefix(got, "404") {
				t.Errorf("%s is listed in %s but not there", name, path)
			}
			if strings.HasSuffix(name, "/") {
				walk(path + name)
			}
		}
	}
	walk("/latest/meta-data/")
	walk("/latest/dynamic/")
	if n < 60 {
		t.Errorf("saw %d items only", n)
	}
}

func TestRules(t *testing.T) {
	f := setup(t)
	token := f.token()
	const idPath = "/latest/meta-data/instance-id"
	tests := []struct {
		name, method, path string
		headers            []string
		change             func()
		status             int
	}{
		{name: "token", method: "GET", path: idPath, headers: []string{"X-aws-ec2-metadata-token: " + token}, status: 200},
		{name: "head", method: "HEAD", path: idPath, headers: []string{"X-aws-ec2-metadata-token: " + token}, status: 200},
		{name: "no token", method: "GET", path: idPath, status: 401},
		{name: "garbage token", method: "GET", path: idPath, headers: []string{"X-aws-ec2-metadata-token: AAAA"}, status: 401},
		{name: "two tokens", method: "GET", path: idPath, headers: []string{"X-aws-ec2-metadata-token: " + token, "X-aws-ec2-metadata-token: " + token}, status: 401},
		{name: "no token, missing item", method: "GET", path: "/latest/nonsense", status: 401},
		{name: "post", method: "POST", path: idPath, status: 405},
		{name: "put elsewhere", method: "PUT", path: idPath, status: 405},
		{name: "get token path", method: "GET", path: tokenPath, headers: []string{"X-aws-ec2-metadata-token: " + token}, status: 405},
		{name: "token of a version", method: "PUT", path: "/2021-03-23/api/token", headers: []string{"X-aws-ec2-metadata-token-ttl-seconds: 60"}, status: 403},
		{name: "forwarded", method: "PUT", path: tokenPath, headers: []string{"X-aws-ec2-metadata-token-ttl-seconds: 60", "X-Forwarded-For: 1.2.3.4"}, status: 403},
		{name: "forwarded for nobody", method: "PUT", path: tokenPath, headers: []string{"X-aws-ec2-metadata-token-ttl-seconds: 60", "X-Forwarded-For: "}, status: 403},
		{name: "no ttl", method: "PUT", path: tokenPath, status: 400},
		{name: "ttl 0", method: "PUT", path: tokenPath, headers: []string{"X-aws-ec2-metadata-token-ttl-seconds: 0"}, status: 400},
		{name: "ttl 21600", method: "PUT", path: tokenPath, headers: []string{"X-aws-ec2-metadata-token-ttl-seconds: 21600"}, status: 200},
		{name: "ttl 21601", method: "PUT", path: tokenPath, headers: []string{"X-aws-ec2-metadata-token-ttl-seconds: 21601"}, status: 400},
		{name: "ttl -1", method: "PUT", path: tokenPath, headers: []string{"X-aws-ec2-metadata-token-ttl-seconds: -1"}, status: 400},
		{name: "ttl words", method: "PUT", path: tokenPath, headers: []string{"X-aws-ec2-metadata-token-ttl-seconds: soon"}, status: 400},
		{name: "last second", method: "GET", path: idPath, headers: []string{"X-aws-ec2-metadata-token: " + token}, status: 200, change: func() { f.now = testNow.Add(59 * time.Second) }},
		{name: "expired", method: "GET", path: idPath, headers: []string{"X-aws-ec2-metadata-token: " + token}, status: 401, change: func() { f.now = testNow.Add(60 * time.Second) }},
		{name: "v1", method: "GET", path: idPath, status: 200, change: func() { f.i.Options.TokenRequired = false }},
		{name: "v1, expired token", method: "GET", path: idPath, headers: []string{"X-aws-ec2-metadata-token: " + token}, status: 401},
		{name: "tags hidden", method: "GET", path: "/latest/meta-data/tags/instance/Name", status: 404, change: func() { f.i.Options.Tags = false }},
		{name: "off", method: "GET", path: idPath, status: 403, change: func() { f.i.Options.Disabled = true }},
		{name: "token, off", method: "PUT", path: tokenPath, headers: []string{"X-aws-ec2-metadata-token-ttl-seconds: 60"}, status: 403},
	}
	for _, tt := range tests {
		if tt.change != nil {
			tt.change()
		}
		resp := f.do(tt.method, tt.path, tt.headers...)
		b, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != tt.status {
			t.Errorf("%s: %d %s, want %d", tt.name, resp.StatusCode, b, tt.status)
		}
		if tt.method == "HEAD" && len(b) != 0 {
			t.Errorf("HEAD answered %q", b)
		}
	}
}

func TestTokenIsOfOneInstance(t *testing.T) {
	f := setup(t)
	other := New(Config{Instance: "i-other", Source: world{"i-other": f.i}, Key: f.key, Now: func() time.Time { return testNow }})
	token := f.token()
	r := httptest.NewRequest("GET", "/latest/meta-data/instance-id", nil)
	r.Header.Set(tokenHeader, token)
	w := httptest.NewRecorder()
	other.ServeHTTP(w, r)
	if w.Code != 401 {
		t.Errorf("the other instance answers %d", w.Code)
	}
	// The same instance knows it after a restart.
	again := New(Config{Instance: f.i.ID, Source: f.source, Key: f.key, Now: func() time.Time { return testNow }})
	w = httptest.NewRecorder()
	again.ServeHTTP(w, r)
	if w.Code != 200 {
		t.Errorf("after a restart: %d", w.Code)
	}
}

func TestHopLimit(t *testing.T) {
	f := setup(t)
	f.i.Options.HopLimit = 2
	srv := f.HTTP()
	ttls := make(chan int, 2)
	srv.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.ServeHTTP(w, r)
		raw, err := r.Context().Value(connKey{}).(syscall.Conn).SyscallConn()
		if err != nil {
			t.Error(err)
			return
		}
		_ = raw.Control(func(fd uintptr) {
			ttl, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TTL)
			if err != nil {
				t.Error(err)
			}
			ttls <- ttl
		})
	})
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = srv.Serve(l) }()
	defer srv.Close()
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// One connection: a GET leaves it as it is, the token's answer ends it.
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\nPUT /latest/api/token HTTP/1.1\r\nHost: x\r\nX-aws-ec2-metadata-token-ttl-seconds: 9\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(c)
	var closes []bool
	for range 2 {
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(resp.Body); err != nil {
			t.Fatal(err)
		}
		closes = append(closes, resp.Close)
	}
	if d := cmp.Diff([]bool{false, true}, closes); d != "" {
		t.Errorf("closing: %s", d)
	}
	if a, b := <-ttls, <-ttls; a <= 2 || b != 2 {
		t.Errorf("TTL %d, then %d", a, b)
	}
	if _, err := in.ReadByte(); err != io.EOF {
		t.Errorf("after the token: %v, want EOF", err)
	}
}

func FuzzPath(f *testing.F) {
	for _, p := range []string{"/", "/latest/meta-data/", "/latest/meta-data/network/interfaces/macs/02:00:00:00:00:01/local-ipv4s", "//..//", "/latest/dynamic/instance-identity/document/", "/latest/user-data/"} {
		f.Add("GET", p, "60")
	}
	f.Add("PUT", tokenPath, "21600")
	f.Fuzz(func(t *testing.T, method, path, ttl string) {
		if method != "GET" && method != "PUT" && method != "HEAD" {
			method = "POST"
		}
		fx := setup(t)
		fx.i.Options.TokenRequired = false
		resp := fx.do(method, path, "X-aws-ec2-metadata-token-ttl-seconds: "+ttl)
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		switch resp.StatusCode {
		case 200, 400, 403, 404, 405:
		default:
			t.Errorf("%s %q: %d", method, path, resp.StatusCode)
		}
		if method == "PUT" && resp.StatusCode == 200 && !checkToken(fx.key, fx.i.ID, string(b), testNow) {
			t.Errorf("token %q is none", b)
		}
	})
}

func FuzzToken(f *testing.F) {
	key := make([]byte, KeySize)
	f.Add(newToken(key, "i-1", testNow.Add(time.Minute)))
	f.Add("")
	f.Fuzz(func(t *testing.T, token string) {
		if checkToken(key, "i-2", token, testNow) {
			t.Errorf("%q is a token of an instance that has none", token)
		}
	})
}

// A VPC's DHCP options may name another domain, as AWS's IMDS then shows.
func TestDomainOfDHCPOptions(t *testing.T) {
	f := setup(t)
	f.i.Domain = "corp.example"
	for path, want := range map[string]string{
		"/latest/meta-data/hostname":                                                 "ip-10-0-1-5.corp.example",
		"/latest/meta-data/local-hostname":                                           "ip-10-0-1-5.corp.example",
		"/latest/meta-data/network/interfaces/macs/02:00:00:00:00:02/local-hostname": "ip-10-0-1-6.corp.example",
	} {
		if got := f.get(path); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
	f.i.ByResource = true
	if got := f.get("/latest/meta-data/hostname"); got != "i-0123456789abcdef0.corp.example" {
		t.Errorf("by resource: %q", got)
	}
}

func TestPublicAddresses(t *testing.T) {
	f := setup(t)
	n := &f.i.Interfaces[0]
	public := netip.MustParseAddr
	n.Elastic = []Elastic{{public("198.51.100.1"), n.Primary}, {public("198.51.100.9"), n.Secondary[0]}}
	const eth0 = "/latest/meta-data/network/interfaces/macs/02:00:00:00:00:01"
	for path, want := range map[string]string{
		"/latest/meta-data/public-ipv4":               "198.51.100.1",
		eth0 + "/public-ipv4s":                        "198.51.100.1\n198.51.100.9",
		eth0 + "/ipv4-associations/":                  "198.51.100.1\n198.51.100.9",
		eth0 + "/ipv4-associations/198.51.100.9":      n.Secondary[0].String(),
		eth0 + "/ipv4-associations/" + "198.51.100.2": "404 Not Found",
	} {
		if got := f.get(path); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
}
