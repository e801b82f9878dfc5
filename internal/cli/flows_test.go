package cli

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// What vpcd says of three packets: a pod's request at both interfaces, refused
// at the second, and an interval with something left out. A line each.
const someFlows = `{"account-id":"123456789012","action":"ACCEPT","bytes":120,"dstaddr":"10.0.0.11","dstport":80,"end":1767323045,"flow-direction":"egress","instance-id":"i-00000000000000001","interface-id":"eni-00000000000000001","log-status":"OK","machine":"node-1","packets":2,"pkt-dstaddr":"10.0.0.11","pkt-srcaddr":"10.0.0.22","protocol":6,"srcaddr":"10.0.0.10","srcport":40000,"start":1767323045,"tcp-flags":2,"traffic-path":1,"subnet-id":"subnet-1","running":true}
{"account-id":"123456789012","action":"REJECT","bytes":60,"dstaddr":"10.0.0.11","dstport":80,"end":1767323046,"flow-direction":"ingress","instance-id":"i-00000000000000003","interface-id":"eni-00000000000000003","log-status":"OK","machine":"vm-1","packets":1,"pkt-dstaddr":"10.0.0.11","pkt-srcaddr":"10.0.0.22","protocol":6,"srcaddr":"10.0.0.22","srcport":40000,"start":1767323045,"tcp-flags":23,"refused-by":"security-group","subnet-id":"subnet-1"}
{"account-id":"123456789012","action":"ACCEPT","bytes":84,"dstaddr":"10.0.0.10","end":1767323044,"flow-direction":"ingress","interface-id":"eni-00000000000000001","log-status":"OK","machine":"node-1","packets":1,"pkt-dstaddr":"10.0.0.30","pkt-srcaddr":"10.0.9.9","protocol":1,"srcaddr":"10.0.9.9","srcport":0,"dstport":0,"start":1767323044,"tcp-flags":0}
{"account-id":"123456789012","end":1767323060,"interface-id":"eni-00000000000000003","log-status":"SKIPDATA","machine":"vm-1","start":1767323050}
`

// flowsFrom serves lines as vpcd does; asked gets the query.
func flowsFrom(t *testing.T, f *labFile, lines string, asked *string) {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/_vpcd/flows" {
			t.Errorf("path %s", r.URL.Path)
		}
		*asked = r.URL.RawQuery
		_, _ = w.Write([]byte(lines))
	}))
	t.Cleanup(srv.Close)
	f.Lab.Endpoint = srv.URL
}

func TestFlows(t *testing.T) {
	t.Setenv("TZ", "UTC")
	local := time.Local
	time.Local = time.UTC
	t.Cleanup(func() { time.Local = local })
	h, f := aLab(t)
	var asked string
	flowsFrom(t, f, someFlows, &asked)
	if err := h.save(f); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) (string, string, int) {
		a, out, errOut := testApp(h.run)
		code := a.Run(t.Context(), append([]string{"flows"}, args...))
		return out.String(), errOut.String(), code
	}
	for name, args := range map[string][]string{"flows.txt": nil, "flows-wide.txt": {"-o", "wide"}, "flows-aws.txt": {"-o", "aws"}} {
		out, errOut, code := run(args...)
		if code != 0 {
			t.Fatalf("%v: %s", args, errOut)
		}
		golden(t, name, out)
	}
	out, _, _ := run("-o", "aws", "--format", "${pkt-srcaddr} ${version} ${traffic-path} ${reject-reason}")
	if want := "10.0.9.9 8 - -\n10.0.0.22 8 1 -\n10.0.0.22 8 - -\n- 8 - -\n"; out != want {
		t.Errorf("custom format:\n%s", out)
	}
	out, _, _ = run("-o", "json", "--since", "90s", "--pod", "web-2", "--action", "reject", "--eni", "eni-00000000000000003")
	if want := "action=REJECT&address=10.0.0.22%2F32&eni=eni-00000000000000003&since=" + strings.ReplaceAll(aDay.Format(time.RFC3339Nano), ":", "%3A"); asked != want {
		t.Errorf("asked %s, want %s", asked, want)
	}
	var one map[string]any
	if err := json.NewDecoder(strings.NewReader(out)).Decode(&one); err != nil || one["destination-name"] != "web-10" || strings.Count(out, "\n") != 4 {
		t.Errorf("%v %s", err, out)
	}
	out, _, _ = run("-o", "aws", "--lines", "1")
	if !strings.HasSuffix(out, "SKIPDATA\n") || strings.Count(out, "\n") != 1 {
		t.Errorf("the latest:\n%s", out)
	}
	// A stream that ends is vpcd's end.
	out, errOut, code := run("--follow")
	if code == 0 || !strings.Contains(errOut, "vpcd ended") || strings.Count(out, "\n") != 5 || asked != "follow=true" {
		t.Errorf("follow: %d %s\n%s", code, errOut, out)
	}
	for args, want := range map[string]string{
		"--lines 3 --follow":        "choose by --since",
		"--lines -1":                "or 0 for all",
		"--action maybe":            "give ACCEPT or REJECT",
		"--eni web":                 "underlay status lists them",
		"--address web":             "give an address or a CIDR block",
		"--pod nobody":              `there is no pod "nobody"`,
		"--pod web-2 --address ::1": "not both",
		"--since yesterday":         "a duration as in 5m",
		"--format ${srcaddr}":       "--format is for -o aws",
		"-o aws --format srcaddr":   "there are account-id, action",
		"-o yaml":                   "-o text or -o json or -o aws or -o wide",
	} {
		if _, errOut, code := run(strings.Fields(args)...); code == 0 || !strings.Contains(errOut, want) {
			t.Errorf("%s: %d %s; want %q", args, code, errOut, want)
		}
	}
	// Other commands have not got more outputs.
	a, _, errOut2 := testApp(h.run)
	if code := a.Run(t.Context(), []string{"pods", "-o", "aws"}); code == 0 || !strings.Contains(errOut2.String(), "use -o text or -o json\n") {
		t.Errorf("pods -o aws: %s", errOut2)
	}
}

func TestFlowsWithoutAny(t *testing.T) {
	h, f := aLab(t)
	var asked string
	flowsFrom(t, f, "", &asked)
	if err := h.save(f); err != nil {
		t.Fatal(err)
	}
	a, out, errOut := testApp(h.run)
	if code := a.Run(t.Context(), []string{"flows"}); code != 0 || !strings.HasPrefix(out.String(), "no flow records") {
		t.Errorf("%d %s %s", code, out, errOut)
	}
	f.Lab.Endpoint = "http://127.0.0.1:1"
	if err := h.save(f); err != nil {
		t.Fatal(err)
	}
	a, _, errOut = testApp(h.run)
	if code := a.Run(t.Context(), []string{"flows"}); code == 0 || !strings.Contains(errOut.String(), "underlay status") {
		t.Errorf("%d %s", code, errOut)
	}
}

// An unknown name is asked for again, but not for each record.
func TestFlowNames(t *testing.T) {
	now, reads := aDay, 0
	known := map[netip.Addr]string{}
	n := &flowNames{now: func() time.Time { return now }, read: func() map[netip.Addr]string {
		reads++
		out := map[netip.Addr]string{}
		for a, name := range known {
			out[a] = name
		}
		return out
	}}
	a := netip.MustParseAddr("10.0.0.1")
	for range 3 {
		if n.of(a) != "" {
			t.Error("named")
		}
	}
	known[a] = "web"
	now = now.Add(namesAgain)
	if d := cmp.Diff([]any{"web", 2}, []any{n.of(a), reads}); d != "" {
		t.Error(d)
	}
}

// The rows of a table that never ends stand under their heads.
func TestFollowedRowsAreAligned(t *testing.T) {
	h, f := aLab(t)
	var out bytes.Buffer
	a := &App{Out: &out, Err: os.Stderr, run: h.run, output: "text", now: func() time.Time { return aDay }}
	p, _, err := a.flowPrinter(h, f, flowOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for d := json.NewDecoder(strings.NewReader(someFlows)); d.More(); {
		var r flowRecord
		if err := d.Decode(&r); err != nil {
			t.Fatal(err)
		}
		if err := p.print(r); err != nil {
			t.Fatal(err)
		}
	}
	rows := strings.Split(strings.TrimSpace(out.String()), "\n")
	for _, head := range []string{"ACTION", "INTERFACE", "SOURCE", "DESTINATION"} {
		at := strings.Index(rows[0], head)
		for _, r := range rows[1:4] {
			if at < 1 || r[at-1] != ' ' || r[at] == ' ' {
				t.Errorf("nothing stands under %s in\n%s\n%s", head, rows[0], r)
			}
		}
	}
}
