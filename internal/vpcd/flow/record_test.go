package flow

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/parquet-go/parquet-go"

	"github.com/underlay-cni/underlay/internal/vpc"
)

var at = time.Unix(1767323045, 600e6)

func base() Record {
	return Record{
		Account: "123456789012", Region: "us-east-1", ZoneID: "use1-az1", Interface: "eni-1", VPC: "vpc-1", Subnet: "subnet-1", Instance: "i-1",
		Primary: netip.MustParseAddr("10.0.0.4"), Start: at, End: at.Add(59 * time.Second), Status: OK,
	}
}

// sample are an ENI's records: a pod's connection that goes out and its answer,
// a refused query, an interval with nothing, and one with something left out.
func sample() []Record {
	out, in, refused, none, some := base(), base(), base(), base(), base()
	pod, far := netip.MustParseAddr("10.0.0.40"), netip.MustParseAddr("10.0.1.4")
	out.Egress, out.Source, out.Destination, out.SourcePort, out.DestinationPort = true, pod, far, 4000, 80
	out.Protocol, out.Packets, out.Bytes, out.Action, out.TCPFlags, out.TrafficPath = 6, 4, 1<<40, Accept, 3, 1
	in.Source, in.Destination, in.SourcePort, in.DestinationPort = far, pod, 80, 4000
	in.Protocol, in.Packets, in.Bytes, in.Action, in.TCPFlags, in.TrafficPath = 6, 3, 120, Accept, 19, 1
	refused.Source, refused.Destination, refused.Protocol, refused.Packets, refused.Bytes = far, netip.MustParseAddr("10.0.0.4"), 1, 1, 84
	refused.Action, refused.RefusedBy, refused.Instance = Reject, "security-group", ""
	none.Status, some.Status = NoData, SkipData
	return []Record{out, in, refused, none, some}
}

const everything = "${version} ${account-id} ${interface-id} ${srcaddr} ${dstaddr} ${srcport} ${dstport} ${protocol} ${packets} ${bytes} ${start} ${end} ${action} ${log-status}" +
	" ${vpc-id} ${subnet-id} ${instance-id} ${tcp-flags} ${type} ${pkt-srcaddr} ${pkt-dstaddr} ${region} ${az-id} ${sublocation-type} ${sublocation-id}" +
	" ${pkt-src-aws-service} ${pkt-dst-aws-service} ${flow-direction} ${traffic-path} ${ecs-task-id} ${reject-reason}"

func parse(t *testing.T, s string) Format {
	t.Helper()
	f, err := ParseFormat(s)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestText(t *testing.T) {
	for format, want := range map[string][]string{
		Default: {
			"version account-id interface-id srcaddr dstaddr srcport dstport protocol packets bytes start end action log-status",
			"2 123456789012 eni-1 10.0.0.4 10.0.1.4 4000 80 6 4 1099511627776 1767323045 1767323104 ACCEPT OK",
			"2 123456789012 eni-1 10.0.1.4 10.0.0.4 80 4000 6 3 120 1767323045 1767323104 ACCEPT OK",
			"2 123456789012 eni-1 10.0.1.4 10.0.0.4 0 0 1 1 84 1767323045 1767323104 REJECT OK",
			"2 123456789012 eni-1 - - - - - - - 1767323045 1767323104 - NODATA",
			"2 123456789012 eni-1 - - - - - - - 1767323045 1767323104 - SKIPDATA",
		},
		everything: {
			"version account-id interface-id srcaddr dstaddr srcport dstport protocol packets bytes start end action log-status vpc-id subnet-id instance-id tcp-flags type pkt-srcaddr pkt-dstaddr region az-id sublocation-type sublocation-id pkt-src-aws-service pkt-dst-aws-service flow-direction traffic-path ecs-task-id reject-reason",
			"8 123456789012 eni-1 10.0.0.4 10.0.1.4 4000 80 6 4 1099511627776 1767323045 1767323104 ACCEPT OK vpc-1 subnet-1 i-1 3 IPv4 10.0.0.40 10.0.1.4 us-east-1 use1-az1 - - - - egress 1 - -",
			"8 123456789012 eni-1 10.0.1.4 10.0.0.4 80 4000 6 3 120 1767323045 1767323104 ACCEPT OK vpc-1 subnet-1 i-1 19 IPv4 10.0.1.4 10.0.0.40 us-east-1 use1-az1 - - - - ingress - - -",
			"8 123456789012 eni-1 10.0.1.4 10.0.0.4 0 0 1 1 84 1767323045 1767323104 REJECT OK vpc-1 subnet-1 - 0 IPv4 10.0.1.4 10.0.0.4 us-east-1 use1-az1 - - - - ingress - - -",
			"8 123456789012 eni-1 - - - - - - - 1767323045 1767323104 - NODATA vpc-1 subnet-1 i-1 - - - - us-east-1 use1-az1 - - - - - - - -",
			"8 123456789012 eni-1 - - - - - - - 1767323045 1767323104 - SKIPDATA vpc-1 subnet-1 i-1 - - - - us-east-1 use1-az1 - - - - - - - -",
		},
	} {
		var file bytes.Buffer
		if err := WriteText(&file, parse(t, format), sample()); err != nil {
			t.Fatal(err)
		}
		z, err := gzip.NewReader(&file)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(z)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")); d != "" {
			t.Errorf("(-want +got):\n%s", d)
		}
	}
}

// Every value that a record gives has the type of its field.
func TestValuesHaveTheirTypes(t *testing.T) {
	for _, r := range sample() {
		for name, f := range vpc.FlowFields() {
			v := r.Value(name)
			ok := v == nil
			switch v.(type) {
			case string:
				ok = f.Type == vpc.FlowString
			case int32:
				ok = f.Type == vpc.FlowInt32
			case int64:
				ok = f.Type == vpc.FlowInt64
			}
			if !ok {
				t.Errorf("%s: %T", name, v)
			}
		}
	}
}

func TestParquet(t *testing.T) {
	f := parse(t, everything)
	var file bytes.Buffer
	if err := WriteParquet(&file, f, sample()); err != nil {
		t.Fatal(err)
	}
	in, err := parquet.OpenFile(bytes.NewReader(file.Bytes()), int64(file.Len()))
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[vpc.FlowFieldType]string{vpc.FlowString: "STRING", vpc.FlowInt32: "INT(32,true)", vpc.FlowInt64: "INT(64,true)"}
	for i, c := range in.Schema().Fields() {
		if i >= len(f) || c.Name() != f[i].Column() || c.Type().String() != kinds[f[i].Type] {
			t.Errorf("column %d is %s %s", i, c.Name(), c.Type())
		}
	}
	var rows []map[string]any
	r := parquet.NewGenericReader[map[string]any](bytes.NewReader(file.Bytes()), in.Schema())
	for {
		batch := []map[string]any{{}}
		n, err := r.Read(batch)
		rows = append(rows, batch[:n]...)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(rows) != 5 {
		t.Fatalf("%d rows", len(rows))
	}
	for _, c := range []struct {
		row  int
		name string
		want any
	}{
		{0, "version", int32(8)}, {0, "srcaddr", "10.0.0.4"}, {0, "pkt_srcaddr", "10.0.0.40"}, {0, "bytes", int64(1 << 40)}, {0, "traffic_path", int32(1)},
		{1, "traffic_path", nil}, {1, "tcp_flags", int32(19)}, {2, "instance_id", "-"}, {3, "srcaddr", "-"}, {3, "packets", nil}, {3, "start", int64(1767323045)}, {4, "log_status", "SKIPDATA"},
	} {
		if got := rows[c.row][c.name]; got != c.want {
			t.Errorf("row %d, %s: %#v, want %#v", c.row, c.name, got, c.want)
		}
	}
}

func TestKey(t *testing.T) {
	end := time.Date(2026, 3, 4, 5, 6, 7, 0, time.FixedZone("", 3600))
	p := Place{Prefix: "all/", Account: "123456789012", Region: "us-east-1", ID: "fl-1"}
	check := func(want string) {
		t.Helper()
		got := p.Key(5, end)
		if got != p.Key(5, end) {
			t.Error("the key of an interval changes")
		}
		i := strings.LastIndex(got, "_")
		if len(got) < i+9 || got[:i+1]+"HASH"+got[i+9:] != want || got[i+5:i+9] != "0005" {
			t.Errorf("key %s, want %s", got, want)
		}
	}
	check("all/AWSLogs/123456789012/vpcflowlogs/us-east-1/2026/03/04/123456789012_vpcflowlogs_us-east-1_fl-1_20260304T0406Z_HASH.log.gz")
	p.Hours, p.Prefix = true, ""
	check("AWSLogs/123456789012/vpcflowlogs/us-east-1/2026/03/04/04/123456789012_vpcflowlogs_us-east-1_fl-1_20260304T0406Z_HASH.log.gz")
	p.Hive, p.Parquet = true, true
	check("AWSLogs/aws-account-id=123456789012/aws-service=vpcflowlogs/aws-region=us-east-1/year=2026/month=03/day=04/hour=04/123456789012_vpcflowlogs_us-east-1_fl-1_20260304T0406Z_HASH.log.parquet")
}

// TestIPv6: a record of IPv6 shows the packets' addresses on both sides.
func TestIPv6(t *testing.T) {
	a := netip.MustParseAddr
	r := Record{Interface: "eni-1", Primary: a("10.0.0.4"), Status: OK, Egress: true, Source: a("2001:db8::7"), Destination: a("2001:db8:1::4"), Protocol: 58, Action: Accept, TrafficPath: 1}
	var file bytes.Buffer
	in := r
	in.Egress, in.Source, in.Destination = false, r.Destination, r.Source
	if err := WriteText(&file, parse(t, "${srcaddr} ${dstaddr} ${pkt-srcaddr} ${pkt-dstaddr} ${type} ${protocol} ${flow-direction} ${traffic-path}"), []Record{r, in}); err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(&file)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	want := "2001:db8::7 2001:db8:1::4 2001:db8::7 2001:db8:1::4 IPv6 58 egress 1\n2001:db8:1::4 2001:db8::7 2001:db8:1::4 2001:db8::7 IPv6 58 ingress -\n"
	if _, got, _ := strings.Cut(string(b), "\n"); got != want {
		t.Errorf("records\n%s, want\n%s", got, want)
	}
}
