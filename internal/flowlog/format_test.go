package flowlog

import (
	"strings"
	"testing"

	"github.com/underlay-cni/underlay/internal/packet"
)

func TestLine(t *testing.T) {
	n := Node{Name: "node-1", Account: "123456789012", VPC: "vpc-1", Instance: "i-1", Region: "us-east-1", ZoneID: "use1-az1"}
	ask := tuple(web.Addr, api.Addr, 40000, 8080)
	sent := Record{Interface: web, Start: at(1), End: at(3), Direction: Egress, Tuple: ask, Packets: 5, Bytes: 300, TCPFlags: 3, Accepted: true, Verdict: Verdict{"allow", "sg-1 sgr-1"}}
	got := Record{Interface: api, Start: at(1), End: at(3), Direction: Ingress, Tuple: ask, Packets: 5, Bytes: 300, TCPFlags: 3}
	ping := Record{Interface: web, Start: at(1), End: at(3), Tuple: packet.FiveTuple{Src: web.Addr, Dst: api.Addr, SrcPort: 7, DstPort: 8 << 8, Proto: packet.ProtoICMP}, Packets: 1, Bytes: 84, Accepted: true}
	skip := Record{Interface: web, Status: SkipData, Start: at(0), End: at(60), Packets: 10, Bytes: 1000}
	const v2 = "${version} ${account-id} ${interface-id} ${srcaddr} ${dstaddr} ${srcport} ${dstport} ${protocol} ${packets} ${bytes} ${start} ${end} ${action} ${log-status}"
	for _, tc := range []struct {
		format string
		r      Record
		want   string
	}{
		{v2, sent, "2 123456789012 eni-0000000000000000a 10.0.0.9 10.0.0.22 40000 8080 6 5 300 1772366401 1772366403 ACCEPT OK"},
		{v2, got, "2 123456789012 eni-0000000000000000a 10.0.0.21 10.0.0.9 40000 8080 6 5 300 1772366401 1772366403 REJECT OK"},
		{v2, ping, "2 123456789012 eni-0000000000000000a 10.0.0.9 10.0.0.22 0 0 1 1 84 1772366401 1772366403 ACCEPT OK"},
		{v2, skip, "2 123456789012 eni-0000000000000000a - - - - - - - 1772366400 1772366460 - SKIPDATA"},
		{"${pkt-srcaddr} ${pkt-dstaddr} ${tcp-flags} ${flow-direction} ${type} ${version}", sent, "10.0.0.21 10.0.0.22 3 egress IPv4 5"},
		{"${pod} ${namespace} ${node} ${direction} ${verdict} ${rule} ${version}", sent, "web-1 shop node-1 egress allow sg-1_sgr-1 2"},
		{"${vpc-id} ${subnet-id} ${instance-id} ${region} ${az-id} ${traffic-path} ${reject-reason} ${version}", got, "vpc-1 subnet-1 i-1 us-east-1 use1-az1 - - 8"},
	} {
		f, err := ParseFormat(tc.format)
		if err != nil {
			t.Fatal(err)
		}
		if got := f.Line(n, tc.r); got != tc.want {
			t.Errorf("%s:\n got %s\nwant %s", tc.format, got, tc.want)
		}
	}
	f, err := ParseFormat(Default)
	if err != nil {
		t.Fatal(err)
	}
	if want := strings.NewReplacer("${", "", "}", "").Replace(Default); f.Header() != want {
		t.Errorf("header %q, want %q", f.Header(), want)
	}
}

func TestParseFormatRefuses(t *testing.T) {
	for _, s := range []string{"", "version", "${version}  ${start}", "${versions}", "${start} ${start}", "${start", "{start}", "${start},${end}"} {
		if _, err := ParseFormat(s); err == nil {
			t.Errorf("ParseFormat(%q) accepts it", s)
		}
	}
}

func FuzzParseFormat(f *testing.F) {
	f.Add(Default)
	f.Add("${start} ${start}")
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParseFormat(s)
		if err != nil {
			return
		}
		if line := p.Line(Node{}, Record{}); len(strings.Fields(line)) != len(strings.Fields(p.Header())) {
			t.Errorf("%q: the line %q has not as many fields as the header", s, line)
		}
	})
}
