package api

import (
	"context"
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

// clock is a clock that tests move.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) Advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// world is an API behind the real decoder and encoder. Transitions that are due
// are finished before each call, as Run would.
type world struct {
	t      testing.TB
	path   string
	clock  *clock
	store  *store.Store
	chaos  *chaos.Control
	api    *API
	server http.Handler
}

func newWorld(t testing.TB) *world {
	w := &world{t: t, path: filepath.Join(t.TempDir(), "state.db"), clock: &clock{now: time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)}}
	w.open()
	t.Cleanup(func() { _ = w.store.Close() })
	return w
}

func (w *world) open() {
	w.t.Helper()
	s, err := store.Open(w.path, store.Options{Now: w.clock.Now})
	if err != nil {
		w.t.Fatal(err)
	}
	w.store, w.chaos = s, chaos.New(w.clock.Now)
	w.api = New(Options{Store: s, Chaos: w.chaos, Now: w.clock.Now})
	w.server = query.NewServer(query.Options{Handlers: w.api.Handlers(), Gate: w.chaos.Gate})
}

// restart closes and opens everything, as another process would.
func (w *world) restart() {
	w.t.Helper()
	if err := w.store.Close(); err != nil {
		w.t.Fatal(err)
	}
	w.open()
}

// node is an element of an answer.
type node struct {
	XMLName  xml.Name
	Text     string `xml:",chardata"`
	Children []node `xml:",any"`
}

// at returns the elements at a path of names; items of a list count as its own.
func (n node) at(path string) []node {
	all := []node{n}
	for name := range strings.SplitSeq(path, ".") {
		var next []node
		for _, a := range all {
			for _, c := range a.Children {
				if c.XMLName.Local != name {
					continue
				}
				if len(c.Children) > 0 && c.Children[0].XMLName.Local == "item" {
					next = append(next, c.Children...)
				} else {
					next = append(next, c)
				}
			}
		}
		all = next
	}
	return all
}

// get returns the text at a path: "" when there is nothing, all joined by
// commas when there is more than one.
func (n node) get(path string) string {
	var out []string
	for _, e := range n.at(path) {
		out = append(out, e.Text)
	}
	return strings.Join(out, ",")
}

// form makes a request body out of "Name=value" words.
func form(action string, params ...string) url.Values {
	v := url.Values{"Action": {action}, "Version": {query.Version}}
	for _, p := range params {
		name, value, _ := strings.Cut(p, "=")
		v.Set(name, value)
	}
	return v
}

// post sends a request and returns the answer and its status.
func (w *world) post(action string, params ...string) (node, int) {
	w.t.Helper()
	if err := w.api.Settle(); err != nil {
		w.t.Fatal(err)
	}
	r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(form(action, params...).Encode()))
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")
	r.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=AKIDTEST/20261122/us-east-1/ec2/aws4_request, SignedHeaders=host, Signature=00")
	rec := httptest.NewRecorder()
	w.server.ServeHTTP(rec, r.WithContext(context.Background()))
	body, err := io.ReadAll(rec.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	var n node
	if err := xml.Unmarshal(body, &n); err != nil {
		w.t.Fatalf("%s: %v in %s", action, err, body)
	}
	return n, rec.Code
}

// must sends a request that succeeds.
func (w *world) must(action string, params ...string) node {
	w.t.Helper()
	n, status := w.post(action, params...)
	if status != http.StatusOK {
		w.t.Fatalf("%s %v: %d %s: %s", action, params, status, n.get("Errors.Error.Code"), n.get("Errors.Error.Message"))
	}
	return n
}

// fails sends a request that is refused with a code, and returns the message.
func (w *world) fails(code, action string, params ...string) string {
	w.t.Helper()
	n, status := w.post(action, params...)
	if got := n.get("Errors.Error.Code"); got != code || status != query.StatusOf(code) {
		w.t.Errorf("%s %v: %d %q %s, want %s", action, params, status, got, n.get("Errors.Error.Message"), code)
	}
	return n.get("Errors.Error.Message")
}

// vpc makes a VPC and a subnet in the first zone.
func (w *world) vpc(cidr, subnet string) (vpcID, subnetID string) {
	w.t.Helper()
	vpcID = w.must("CreateVpc", "CidrBlock="+cidr).get("vpc.vpcId")
	return vpcID, w.must("CreateSubnet", "VpcId="+vpcID, "CidrBlock="+subnet, "AvailabilityZone=us-east-1a").get("subnet.subnetId")
}

const image = "ImageId=ami-0123456789abcdef0"

// instance runs an instance in a subnet and waits until it runs.
func (w *world) instance(subnet, typ string, params ...string) string {
	w.t.Helper()
	return w.must("RunInstances", append([]string{image, "InstanceType=" + typ, "MinCount=1", "MaxCount=1", "SubnetId=" + subnet}, params...)...).get("instancesSet.instanceId")
}

func (w *world) eni(subnet string, params ...string) string {
	w.t.Helper()
	return w.must("CreateNetworkInterface", append([]string{"SubnetId=" + subnet}, params...)...).get("networkInterface.networkInterfaceId")
}

// want compares what is at a path.
func (w *world) want(n node, path, want string) {
	w.t.Helper()
	if got := n.get(path); got != want {
		w.t.Errorf("%s = %q, want %q", path, got, want)
	}
}

// numbered makes Name.1=…, Name.2=… parameters.
func numbered(name string, values ...string) []string {
	out := make([]string, len(values))
	for i, v := range values {
		out[i] = fmt.Sprintf("%s.%d=%s", name, i+1, v)
	}
	return out
}

func TestFirstInstance(t *testing.T) {
	w := newWorld(t)
	vpcID, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/24")
	run := w.must("RunInstances", image, "InstanceType=m5.large", "MinCount=1", "MaxCount=1",
		"NetworkInterface.1.DeviceIndex=0", "NetworkInterface.1.SubnetId="+subnet, "NetworkInterface.1.SecondaryPrivateIpAddressCount=2",
		"NetworkInterface.2.DeviceIndex=1", "NetworkInterface.2.SubnetId="+subnet, "NetworkInterface.2.Ipv4PrefixCount=1",
		"TagSpecification.1.ResourceType=instance", "TagSpecification.1.Tag.1.Key=Name", "TagSpecification.1.Tag.1.Value=node-1")
	id := run.get("instancesSet.instanceId")
	w.want(run, "instancesSet.instanceState.name", "pending")
	d := w.must("DescribeInstances", "InstanceId.1="+id)
	w.want(d, "reservationSet.instancesSet.instanceState.name", "running")
	w.want(d, "reservationSet.instancesSet.vpcId", vpcID)
	w.want(d, "reservationSet.instancesSet.privateIpAddress", "10.0.0.4")
	w.want(d, "reservationSet.instancesSet.privateDnsName", "ip-10-0-0-4.ec2.internal")
	w.want(d, "reservationSet.instancesSet.tagSet.value", "node-1")
	w.want(d, "reservationSet.instancesSet.networkInterfaceSet.attachment.status", "attached,attached")
	w.want(d, "reservationSet.instancesSet.networkInterfaceSet.privateIpAddressesSet.privateIpAddress", "10.0.0.4,10.0.0.5,10.0.0.6,10.0.0.7")
	w.want(d, "reservationSet.instancesSet.networkInterfaceSet.ipv4PrefixSet.ipv4Prefix", "10.0.0.16/28")
	w.want(w.must("DescribeSubnets"), "subnetSet.availableIpAddressCount", fmt.Sprint(251-4-16))
}
