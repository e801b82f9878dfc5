package vpcd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// running is a vpcd, and a client of it.
type running struct {
	t    *testing.T
	url  string
	stop func() // and wait
}

func start(t *testing.T, o Options) *running {
	t.Helper()
	o.Listen = "127.0.0.1:0"
	o.Logger = slog.New(slog.NewTextHandler(testLog{t}, &slog.HandlerOptions{Level: slog.LevelWarn}))
	ready, done := make(chan string, 1), make(chan error, 1)
	o.Ready = func(a net.Addr) { ready <- a.String() }
	ctx, cancel := context.WithCancel(context.Background())
	go func() { done <- Run(ctx, o) }()
	r := &running{t: t}
	stopped := false
	r.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
	t.Cleanup(func() { r.stop() })
	select {
	case a := <-ready:
		r.url = "http://" + a
	case err := <-done:
		stopped = true
		cancel()
		t.Fatalf("Run: %v", err)
	}
	return r
}

// testLog writes to the test's log.
type testLog struct{ t *testing.T }

func (l testLog) Write(b []byte) (int, error) {
	l.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

// ec2 calls an action and returns the answer; params are "Name=value".
func (r *running) ec2(action string, params ...string) string {
	r.t.Helper()
	answer, err := r.try(action, params...)
	if err != nil {
		r.t.Fatal(err)
	}
	return answer
}

// try is ec2 where no answer may come.
func (r *running) try(action string, params ...string) (string, error) {
	form := url.Values{"Action": {action}, "Version": {"2016-11-15"}}
	for _, p := range params {
		n, v, _ := strings.Cut(p, "=")
		form.Set(n, v)
	}
	req, err := http.NewRequest(http.MethodPost, r.url+"/", strings.NewReader(form.Encode()))
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=A/20260102/us-east-1/ec2/aws4_request, Signature=0")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

// id calls an action and returns the first id of this kind in the answer.
func (r *running) id(kind, action string, params ...string) string {
	r.t.Helper()
	answer := r.ec2(action, params...)
	id := regexp.MustCompile(`\b` + kind + `-[0-9a-f]{17}\b`).FindString(answer)
	if id == "" {
		r.t.Fatalf("%s: %s", action, answer)
	}
	return id
}

// admin calls an admin endpoint and decodes its answer into v.
func (r *running) admin(method, path string, body, v any) int {
	r.t.Helper()
	var b bytes.Buffer
	if body != nil {
		if err := json.NewEncoder(&b).Encode(body); err != nil {
			r.t.Fatal(err)
		}
	}
	req, err := http.NewRequest(method, r.url+AdminPath+path, &b)
	if err != nil {
		r.t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(v); err != nil {
		r.t.Fatalf("%s %s: %v", method, path, err)
	}
	return resp.StatusCode
}

func TestRunWithoutFabric(t *testing.T) {
	dir := t.TempDir()
	o := Options{Name: "t", Dir: dir, NoFabric: true}
	r := start(t, o)
	var h Health
	if code := r.admin("GET", "health", nil, &h); code != 200 || h.Status != StatusOK || h.Fabric || h.Account != "123456789012" {
		t.Errorf("health: %d %+v", code, h)
	}
	v := r.id("vpc", "CreateVpc", "CidrBlock=10.0.0.0/16")
	s := r.id("subnet", "CreateSubnet", "VpcId="+v, "CidrBlock=10.0.1.0/24")
	i := r.id("i", "RunInstances", "ImageId=ami-00000000000000001", "InstanceType=m5.large", "MinCount=1", "MaxCount=1", "SubnetId="+s,
		"TagSpecification.1.ResourceType=instance", "TagSpecification.1.Tag.1.Key=Name", "TagSpecification.1.Tag.1.Value=n1")

	var service ManagedServiceInfo
	if code := r.admin("POST", "managed-services", ManagedService{Name: "db-1", SubnetID: s}, &service); code != 200 || service.PrivateIPAddress == "" || service.Netns != "" {
		t.Errorf("managed service: %d %+v", code, service)
	}
	eni := r.ec2("DescribeNetworkInterfaces", "NetworkInterfaceId.1="+service.NetworkInterfaceID)
	if !strings.Contains(eni, "<requesterManaged>true</requesterManaged>") {
		t.Errorf("its interface: %s", eni)
	}
	r.stop()

	// All of it is there after a restart, and chaos is over.
	r = start(t, o)
	var instances []InstanceInfo
	eventually(t, "running", func() bool {
		r.admin("GET", "instances", nil, &instances)
		return len(instances) == 1 && instances[0].State == "running"
	})
	if instances[0].InstanceID != i || instances[0].Name != "n1" {
		t.Errorf("instances: %+v", instances)
	}
	var deleted map[string]string
	if code := r.admin("DELETE", "managed-services/db-1", nil, &deleted); code != 200 {
		t.Errorf("delete: %d %v", code, deleted)
	}
	if code := r.admin("DELETE", "managed-services/db-1", nil, &deleted); code != 404 || deleted["error"] == "" {
		t.Errorf("delete again: %d %v", code, deleted)
	}
}

// What is due is done before instances are listed: with no attach latency, an
// instance that is named has its interface, and nobody who goes there by that
// name meets vpcd at configuring it.
func TestInstancesListedAttached(t *testing.T) {
	r := start(t, Options{Name: "t", Dir: t.TempDir(), NoFabric: true})
	v := r.id("vpc", "CreateVpc", "CidrBlock=10.0.0.0/16")
	s := r.id("subnet", "CreateSubnet", "VpcId="+v, "CidrBlock=10.0.1.0/24")
	for n := range 20 {
		id := r.id("i", "RunInstances", "ImageId=ami-00000000000000001", "InstanceType=m5.large", "MinCount=1", "MaxCount=1", "SubnetId="+s)
		var instances []InstanceInfo
		r.admin("GET", "instances", nil, &instances)
		i := slices.IndexFunc(instances, func(i InstanceInfo) bool { return i.InstanceID == id })
		if i < 0 || instances[i].State != "running" {
			t.Fatalf("instance %d, %s: %+v", n, id, instances)
		}
	}
}

func TestAdminChaos(t *testing.T) {
	r := start(t, Options{Name: "t", Dir: t.TempDir(), NoFabric: true})
	var s map[string]any
	if code := r.admin("PUT", "chaos", map[string]any{"fail": []map[string]any{{"action": "DescribeVpcs", "code": "InternalError", "count": 1}}}, &s); code != 200 {
		t.Fatalf("PUT: %d %v", code, s)
	}
	if got := r.ec2("DescribeVpcs"); !strings.Contains(got, "<Code>InternalError</Code>") {
		t.Errorf("first call: %s", got)
	}
	if got := r.ec2("DescribeVpcs"); !strings.Contains(got, "<vpcSet/>") {
		t.Errorf("second call: %s", got)
	}
	for _, bad := range []any{map[string]any{"throttle": "maybe"}, map[string]any{"nonsense": 1}, []int{1}} {
		if code := r.admin("PUT", "chaos", bad, &s); code != 400 || s["error"] == "" {
			t.Errorf("PUT %v: %d %v", bad, code, s)
		}
	}
	if code := r.admin("DELETE", "chaos", nil, &s); code != 200 || s["throttle"] != "off" {
		t.Errorf("DELETE: %d %v", code, s)
	}
	if code := r.admin("GET", "nonsense", nil, &s); code != 404 {
		t.Errorf("nonsense: %d", code)
	}
}

func TestAdminRefusesOtherPeoplesPages(t *testing.T) {
	r := start(t, Options{Name: "t", Dir: t.TempDir(), NoFabric: true})
	req, err := http.NewRequest("DELETE", r.url+AdminPath+"chaos", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Origin", "https://example.com")
	req.Header.Set("Sec-Fetch-Site", "cross-site")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 403 {
		t.Errorf("status %d", resp.StatusCode)
	}
}

func TestRunRefuses(t *testing.T) {
	dir := t.TempDir()
	r := start(t, Options{Name: "t", Dir: dir, NoFabric: true})
	quiet := slog.New(slog.DiscardHandler)
	err := Run(t.Context(), Options{Name: "t", Dir: t.TempDir(), NoFabric: true, Listen: strings.TrimPrefix(r.url, "http://"), Logger: quiet})
	if err == nil || !strings.Contains(err.Error(), "--listen") {
		t.Errorf("address in use: %v", err)
	}
	err = Run(t.Context(), Options{Name: "t", Dir: dir, NoFabric: true, Listen: "127.0.0.1:0", Logger: quiet})
	if err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("directory in use: %v", err)
	}
	file := dir + "/file"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Run(t.Context(), Options{Name: "t", Dir: file, NoFabric: true, Listen: "127.0.0.1:0", Logger: quiet}); err == nil {
		t.Error("a file for a directory was taken")
	}
}

func TestShutdownLetsRequestsFinish(t *testing.T) {
	r := start(t, Options{Name: "t", Dir: t.TempDir(), NoFabric: true})
	var s map[string]any
	fail := []map[string]any{{"action": "DescribeVpcs", "code": "Unavailable", "count": 2}}
	if code := r.admin("PUT", "chaos", map[string]any{"latency": "300ms", "fail": fail}, &s); code != 200 {
		t.Fatal(s)
	}
	answer := make(chan string, 1)
	go func() { answer <- r.ec2("DescribeVpcs") }()
	// Failures are counted before the latency: once it is, the request waits.
	eventually(t, "under way", func() bool {
		r.admin("GET", "chaos", nil, &s)
		return strings.Contains(fmt.Sprint(s["fail"]), "count:1")
	})
	r.stop()
	if got := <-answer; !strings.Contains(got, "<Code>Unavailable</Code>") {
		t.Errorf("the request ended with %s", got)
	}
}

func ExampleHealth() {
	b, _ := json.Marshal(Health{Status: StatusOK, Name: "demo", Region: "us-east-1", Account: "123456789012", Fabric: true})
	fmt.Println(string(b))
	// Output: {"status":"ok","name":"demo","region":"us-east-1","account":"123456789012","fabric":true}
}
