package chaos

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/vpcd/query"
)

func TestParseFailure(t *testing.T) {
	tests := []struct {
		in   string
		want Failure
		err  string
	}{
		{in: "AssignPrivateIpAddresses=InternalError:3", want: Failure{Action: "AssignPrivateIpAddresses", Code: "InternalError", Count: 3}},
		{in: "*=RequestLimitExceeded:0.1", want: Failure{Action: "*", Code: "RequestLimitExceeded", Probability: 0.1}},
		{in: "*=InvalidVpcID.NotFound:1.0", want: Failure{Action: "*", Code: "InvalidVpcID.NotFound", Probability: 1}},
		{in: "DescribeVpcs", err: "write ACTION=CODE:COUNT"},
		{in: "DescribeVpcs=X", err: "write ACTION=CODE:COUNT"},
		{in: "DescribeVpcs=X:", err: "neither a count"},
		{in: "DescribeVpcs=X:0", err: "give a count"},
		{in: "DescribeVpcs=X:-1", err: "give a count"},
		{in: "DescribeVpcs=X:1.5", err: "give a count"},
		{in: "DescribeVpcs=X:NaN", err: "neither a count"},
		{in: "DescribeVpcs=:1", err: "give an error code"},
		{in: "DescribeVpcs=<x>:1", err: "give an error code"},
		{in: "MakeCoffee=X:1", err: "no such action"},
	}
	for _, tt := range tests {
		got, err := ParseFailure(tt.in)
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("ParseFailure(%q) = %v, %v; want error with %q", tt.in, got, err, tt.err)
			}
			continue
		}
		if err != nil || got != tt.want {
			t.Errorf("ParseFailure(%q) = %+v, %v", tt.in, got, err)
		}
		if got.String() != tt.in {
			t.Errorf("%q prints as %q", tt.in, got)
		}
	}
}

func TestSettingsJSON(t *testing.T) {
	want := Settings{
		Latency: 50 * time.Millisecond, AttachLatency: time.Second, IMDSLag: 500 * time.Millisecond, MappingLag: 1, ReadLag: 2, FreshReads: 0.25,
		Throttle: ThrottleAWS, Addresses: AddressesScattered, Quotas: map[Quota]int{QuotaVPCs: 7}, Fail: []Failure{{Action: "*", Code: "InternalError", Count: 2}},
	}
	b, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b), `"latency":"50ms"`) {
		t.Errorf("JSON: %s", b)
	}
	var got Settings
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	for _, bad := range []string{`{"latncy":"1s"}`, `{"latency":"fast"}`, `{"latency":5}`, `[]`} {
		if err := json.Unmarshal([]byte(bad), &got); err == nil {
			t.Errorf("%s was read", bad)
		}
	}
	if b, err = json.Marshal(Defaults()); err != nil || !strings.Contains(string(b), `"fail":[]`) {
		t.Errorf("defaults: %s, %v", b, err)
	}
}

func TestValidate(t *testing.T) {
	bad := Settings{Latency: -1, ReadLag: time.Hour, FreshReads: math.NaN(), Throttle: "maybe", Addresses: "anyhow", Fail: []Failure{{Action: "*", Code: "X"}}}
	err := bad.Validate()
	for _, want := range []string{"latency", "readLag", "freshReads", "throttle", `"lowest" or "scattered"`, "failure *=X:0"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not tell of %s", err, want)
		}
	}
	c := New(nil)
	if c.Set(bad) == nil {
		t.Error("Set took it")
	}
	if d := cmp.Diff(Defaults(), c.Get()); d != "" {
		t.Errorf("after a refused Set: %s", d)
	}
}

func call(action string, req any) query.Call {
	return query.Call{Action: query.Actions[action], Request: req, Identity: query.Identity{Account: "1", Region: "r"}}
}

func codeOf(err error) string {
	var e *query.Error
	if errors.As(err, &e) {
		return e.Code
	}
	if err != nil {
		return err.Error()
	}
	return ""
}

func TestFailuresByCount(t *testing.T) {
	c := New(nil)
	if err := c.Set(Settings{Throttle: ThrottleOff, Fail: []Failure{
		{Action: "DescribeVpcs", Code: "InternalError", Count: 2},
		{Action: "*", Code: "Unavailable", Count: 1},
	}}); err != nil {
		t.Fatal(err)
	}
	var got []string
	for range 4 {
		got = append(got, codeOf(c.Gate(t.Context(), call("DescribeVpcs", &query.DescribeVpcsRequest{}))))
	}
	if d := cmp.Diff([]string{"InternalError", "InternalError", "Unavailable", ""}, got); d != "" {
		t.Error(d)
	}
	if f := c.Get().Fail; len(f) != 0 {
		t.Errorf("left over: %v", f)
	}
}

func TestFailuresByProbability(t *testing.T) {
	c := New(nil)
	c.random = func() float64 { return 0.3 }
	for p, want := range map[float64]string{0.31: "InternalError", 0.3: "", 1: "InternalError"} {
		if err := c.Set(Settings{Throttle: ThrottleOff, Fail: []Failure{{Action: "*", Code: "InternalError", Probability: p}}}); err != nil {
			t.Fatal(err)
		}
		if got := codeOf(c.Gate(t.Context(), call("DescribeVpcs", &query.DescribeVpcsRequest{}))); got != want {
			t.Errorf("probability %v: %q", p, got)
		}
	}
}

func TestLatencyEndsWithTheCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(nil)
		if err := c.Set(Settings{Throttle: ThrottleOff, Latency: time.Second}); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if err := c.Gate(t.Context(), call("DescribeVpcs", &query.DescribeVpcsRequest{})); err != nil || time.Since(start) != time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		start = time.Now()
		if err := c.Gate(ctx, call("DescribeVpcs", &query.DescribeVpcsRequest{})); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != 10*time.Millisecond {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

func TestThrottle(t *testing.T) {
	run := func(n int64) *query.RunInstancesRequest {
		return &query.RunInstancesRequest{MinCount: &n, MaxCount: &n}
	}
	tests := []struct {
		name        string
		call        query.Call
		burst       int           // calls that pass at once
		refill      time.Duration // until one more passes
		stillShort  time.Duration // until then none does
		afterRefill int
	}{
		{"non-mutating", call("DescribeSubnets", &query.DescribeSubnetsRequest{}), 100, 50 * time.Millisecond, 49 * time.Millisecond, 1},
		{"unfiltered", call("DescribeInstances", &query.DescribeInstancesRequest{}), 50, 100 * time.Millisecond, 99 * time.Millisecond, 1},
		{"filtered", call("DescribeInstances", &query.DescribeInstancesRequest{Filter: []query.Filter{{}}}), 100, 50 * time.Millisecond, 49 * time.Millisecond, 1},
		{"paginated", call("DescribeInstances", &query.DescribeInstancesRequest{MaxResults: new(int64(5))}), 100, 50 * time.Millisecond, 49 * time.Millisecond, 1},
		{"own", call("AssignPrivateIpAddresses", &query.AssignPrivateIpAddressesRequest{}), 100, 200 * time.Millisecond, 199 * time.Millisecond, 1},
		{"default mutating", call("AttachNetworkInterface", &query.AttachNetworkInterfaceRequest{}), 50, 200 * time.Millisecond, 199 * time.Millisecond, 1},
		{"intensive", call("AuthorizeSecurityGroupIngress", &query.AuthorizeSecurityGroupIngressRequest{}), 50, 200 * time.Millisecond, 199 * time.Millisecond, 1},
		{"run one", call("RunInstances", run(1)), 5, 500 * time.Millisecond, 499 * time.Millisecond, 1},
		{"run 400: resources", call("RunInstances", run(400)), 2, 100 * time.Second, 99 * time.Second, 1},
		{"run 5000: a full bucket", call("RunInstances", run(5000)), 1, 500 * time.Second, 499 * time.Second, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			now := time.Unix(1000, 0)
			c := New(func() time.Time { return now })
			if err := c.Set(Settings{Throttle: ThrottleAWS}); err != nil {
				t.Fatal(err)
			}
			passing := func() int {
				for n := 0; ; n++ {
					if err := c.Gate(t.Context(), tt.call); err != nil {
						if codeOf(err) != "RequestLimitExceeded" {
							t.Fatal(err)
						}
						return n
					}
				}
			}
			if n := passing(); n != tt.burst {
				t.Errorf("%d calls passed at once, want %d", n, tt.burst)
			}
			start := now
			now = start.Add(tt.stillShort)
			if n := passing(); n != 0 {
				t.Errorf("%d passed after %v", n, tt.stillShort)
			}
			now = start.Add(tt.refill)
			if n := passing(); n != tt.afterRefill {
				t.Errorf("%d passed after %v, want %d", n, tt.refill, tt.afterRefill)
			}
			// Another action is not concerned.
			if err := c.Gate(t.Context(), call("DescribeVpcs", &query.DescribeVpcsRequest{})); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestThrottleTable(t *testing.T) {
	l := table()
	for name, b := range l.Own {
		if b[0] < 1 || b[1] <= 0 {
			t.Errorf("%s: bucket %v", name, b)
		}
	}
	for _, b := range []limit{l.Categories.NonMutating, l.Categories.Unfiltered.Bucket, l.Categories.Mutating, l.Categories.Intensive.Bucket, l.Resources["RunInstances"]} {
		if b[0] < 1 || b[1] <= 0 {
			t.Errorf("bucket %v", b)
		}
	}
}

func TestResetForgets(t *testing.T) {
	c := New(nil)
	if err := c.Set(Settings{Throttle: ThrottleAWS, Latency: time.Second, Fail: []Failure{{Action: "*", Code: "X", Count: 1}}}); err != nil {
		t.Fatal(err)
	}
	c.Reset()
	if d := cmp.Diff(Defaults(), c.Get()); d != "" {
		t.Error(d)
	}
}

func FuzzSettings(f *testing.F) {
	f.Add(`{"latency":"50ms","throttle":"aws","fail":[{"action":"*","code":"X","probability":0.5}]}`)
	f.Fuzz(func(t *testing.T, in string) {
		var s, again Settings
		if json.Unmarshal([]byte(in), &s) != nil || s.Validate() != nil {
			return
		}
		b, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, &again); err != nil {
			t.Fatal(err)
		}
		s.Fail = append([]Failure{}, s.Fail...)
		again.Fail = append([]Failure{}, again.Fail...)
		if d := cmp.Diff(s, again); d != "" {
			t.Error(d)
		}
	})
}
