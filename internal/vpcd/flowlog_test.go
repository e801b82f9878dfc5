package vpcd

import (
	"bufio"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/parquet-go/parquet-go"

	"github.com/underlay-cni/underlay/internal/vpc"
	"github.com/underlay-cni/underlay/internal/vpcd/fabric"
)

// logFiles returns the files of a flow log, oldest first.
func logFiles(t *testing.T, dir, id string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() && strings.Contains(path, "_"+id+"_") && !strings.HasSuffix(path, ".part") {
			out = append(out, path)
		}
		return err
	})
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return out
}

// logLines returns the lines of a flow log's text files, without headers.
func logLines(t *testing.T, dir, id string) []string {
	t.Helper()
	var out []string
	for _, path := range logFiles(t, dir, id) {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		z, err := gzip.NewReader(f)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		b, err := io.ReadAll(z)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		f.Close()
		out = append(out, strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")[1:]...)
	}
	return out
}

// flows asks for flow records.
func (r *running) flows(query string) []map[string]any {
	r.t.Helper()
	resp, err := http.Get(r.url + AdminPath + "flows?" + query)
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(resp.Body)
		r.t.Fatalf("flows?%s: %s: %s", query, resp.Status, b)
	}
	var out []map[string]any
	for d := json.NewDecoder(resp.Body); ; {
		var one map[string]any
		if err := d.Decode(&one); err == io.EOF {
			return out
		} else if err != nil {
			r.t.Fatal(err)
		}
		out = append(out, one)
	}
}

// twoInstances makes a VPC with an instance in each of two subnets, 10.0.1.10
// (and 10.0.1.20) and 10.0.2.10. It returns ids by name, and namespaces by instance.
func (r *running) twoInstances() (ids, netns map[string]string) {
	r.t.Helper()
	ids = map[string]string{"vpc": r.id("vpc", "CreateVpc", "CidrBlock=10.0.0.0/16")}
	for n, name := range []string{"a", "b"} {
		subnet := r.id("subnet", "CreateSubnet", "VpcId="+ids["vpc"], fmt.Sprintf("CidrBlock=10.0.%d.0/24", n+1))
		ids["subnet-"+name] = subnet
		ids[name] = r.id("i", "RunInstances", "ImageId=ami-00000000000000001", "InstanceType=m5.large", "MinCount=1", "MaxCount=1", "SubnetId="+subnet,
			fmt.Sprintf("PrivateIpAddress=10.0.%d.10", n+1), "TagSpecification.1.ResourceType=instance", "TagSpecification.1.Tag.1.Key=Name", "TagSpecification.1.Tag.1.Value="+name)
		ids["eni-"+name] = r.id("eni", "DescribeNetworkInterfaces", "Filter.1.Name=attachment.instance-id", "Filter.1.Value.1="+ids[name])
	}
	r.ec2("AssignPrivateIpAddresses", "NetworkInterfaceId="+ids["eni-a"], "PrivateIpAddress.1=10.0.1.20")
	// The default group lets its members talk to each other.
	netns = map[string]string{}
	eventually(r.t, "running", func() bool {
		var instances []InstanceInfo
		r.admin("GET", "instances", nil, &instances)
		for _, i := range instances {
			netns[i.InstanceID] = i.Netns
			if i.State != "running" {
				return false
			}
		}
		return len(instances) == 2
	})
	return ids, netns
}

func send(t *testing.T, from *net.UDPConn, to string, n int) {
	t.Helper()
	for range n {
		if _, err := from.WriteToUDPAddrPort([]byte("datagram"), netip.MustParseAddrPort(to)); err != nil {
			t.Fatal(err)
		}
	}
}

// From the API to the files: each flow log has the records of what it covers, in
// the format and with the verdict that it asks for.
func TestFlowLogFiles(t *testing.T) {
	o := labOptions(t)
	o.FlowInterval, o.FileInterval = time.Second, time.Second
	o.S3Dir = filepath.Join(filepath.Dir(o.Dir), "buckets")
	r := start(t, o)
	ids, netns := r.twoInstances()
	var service ManagedServiceInfo
	if code := r.admin("POST", "managed-services", ManagedService{Name: "db", SubnetID: ids["subnet-b"]}, &service); code != 200 {
		t.Fatalf("managed service: %d", code)
	}
	create := func(kind, resource, traffic string, more ...string) string {
		return r.id("fl", "CreateFlowLogs", append([]string{"ResourceType=" + kind, "ResourceId.1=" + resource, "TrafficType=" + traffic, "LogDestinationType=s3"}, more...)...)
	}
	const custom = "${interface-id} ${instance-id} ${srcaddr} ${dstaddr} ${pkt-srcaddr} ${pkt-dstaddr} ${dstport} ${packets} ${bytes} ${action} ${flow-direction} ${traffic-path} ${subnet-id} ${vpc-id} ${az-id} ${log-status}"
	all := create("VPC", ids["vpc"], "ALL", "LogDestination=arn:aws:s3:::logs/all/", "LogFormat="+custom, "MaxAggregationInterval=60")
	byDefault := create("NetworkInterface", ids["eni-a"], "ACCEPT", "LogDestination=arn:aws:s3:::logs")
	refused := create("Subnet", ids["subnet-b"], "REJECT", "LogDestination=arn:aws:s3:::logs", "LogFormat="+custom)
	columns := create("NetworkInterface", ids["eni-b"], "ALL", "LogDestination=arn:aws:s3:::columns", "LogFormat=${pkt-srcaddr} ${dstport} ${packets} ${tcp-flags}",
		"DestinationOptions.FileFormat=parquet", "DestinationOptions.HiveCompatiblePartitions=true", "DestinationOptions.PerHourPartition=true")

	if out, err := exec.Command("ip", "-n", filepath.Base(netns[ids["a"]]), "addr", "add", "10.0.1.20/32", "dev", "lo").CombinedOutput(); err != nil {
		t.Fatalf("add an address: %v: %s", err, out)
	}
	listenUDP(t, netns[ids["b"]], "10.0.2.10:53")
	pod := listenUDP(t, netns[ids["a"]], "10.0.1.20:4000")
	send(t, pod, "10.0.2.10:53", 3)
	send(t, pod, service.PrivateIPAddress+":5432", 2) // the default group of the service allows members alone, and a is one
	// Now b's side refuses what a's side sends.
	group := r.id("sg", "CreateSecurityGroup", "GroupName=closed", "GroupDescription=x", "VpcId="+ids["vpc"])
	r.ec2("ModifyNetworkInterfaceAttribute", "NetworkInterfaceId="+ids["eni-b"], "SecurityGroupId.1="+group)
	send(t, pod, "10.0.2.10:54", 4)

	line := func(eni, instance, src, dst, pktDst, port string, n int, action, way, subnet, az string) string {
		return strings.Join([]string{eni, instance, src, dst, "10.0.1.20", pktDst, port, strconv.Itoa(n), strconv.Itoa(36 * n), action, way, subnet, ids["vpc"], az, "OK"}, " ")
	}
	db := service.PrivateIPAddress
	subnets := r.ec2("DescribeSubnets")
	az := regexp.MustCompile(`<availabilityZoneId>([^<]+)<`).FindStringSubmatch(subnets)[1]
	want := []string{
		line(ids["eni-a"], ids["a"], "10.0.1.10", "10.0.2.10", "10.0.2.10", "53", 3, "ACCEPT", "egress 1", ids["subnet-a"], az),
		line(ids["eni-a"], ids["a"], "10.0.1.10", db, db, "5432", 2, "ACCEPT", "egress 1", ids["subnet-a"], az),
		line(ids["eni-a"], ids["a"], "10.0.1.10", "10.0.2.10", "10.0.2.10", "54", 4, "ACCEPT", "egress 1", ids["subnet-a"], az),
		line(ids["eni-b"], ids["b"], "10.0.1.20", "10.0.2.10", "10.0.2.10", "53", 3, "ACCEPT", "ingress -", ids["subnet-b"], az),
		line(ids["eni-b"], ids["b"], "10.0.1.20", "10.0.2.10", "10.0.2.10", "54", 4, "REJECT", "ingress -", ids["subnet-b"], az),
		line(service.NetworkInterfaceID, "-", "10.0.1.20", db, db, "5432", 2, "ACCEPT", "ingress -", ids["subnet-b"], az),
	}
	// An interval may end in the middle of what is sent: add up.
	added := func(id string) []string {
		sums := map[string][2]int{}
		for _, l := range logLines(t, o.S3Dir, id) {
			f := strings.Fields(l)
			if f[len(f)-1] != "OK" || f[6] == "7424" {
				continue
			}
			packets, _ := strconv.Atoi(f[7])
			size, _ := strconv.Atoi(f[8])
			f[7], f[8] = "%d", "%d"
			k := strings.Join(f, " ")
			sums[k] = [2]int{sums[k][0] + packets, sums[k][1] + size}
		}
		var out []string
		for k, n := range sums {
			out = append(out, fmt.Sprintf(k, n[0], n[1]))
		}
		slices.Sort(out)
		return out
	}
	udp := func(lines []string) []string { // without the ICMP that answers port 5432
		return slices.DeleteFunc(lines, func(l string) bool { return strings.Fields(l)[6] == "0" })
	}
	slices.Sort(want)
	eventually(t, "all records in files", func() bool { return len(udp(added(all))) == len(want) })
	if d := cmp.Diff(want, udp(added(all))); d != "" {
		t.Errorf("of the VPC (-want +got):\n%s", d)
	}
	eventually(t, "the REJECT in a file", func() bool { return len(added(refused)) > 0 })
	if d := cmp.Diff([]string{want[slices.IndexFunc(want, func(l string) bool { return strings.Contains(l, "REJECT") })]}, added(refused)); d != "" {
		t.Errorf("of the subnet, refused alone (-want +got):\n%s", d)
	}
	eventually(t, "the default format", func() bool { return len(logLines(t, o.S3Dir, byDefault)) > 1 })
	for _, l := range logLines(t, o.S3Dir, byDefault) {
		if !regexp.MustCompile(`^2 123456789012 ` + ids["eni-a"] + ` (10\.0\.[0-9.]+ 10\.0\.[0-9.]+ \d+ \d+ \d+ \d+ \d+ \d{10} \d{10} ACCEPT OK|- - - - - - - \d{10} \d{10} - NODATA)$`).MatchString(l) {
			t.Errorf("of an interface in the default format: %q", l)
		}
	}
	name := regexp.MustCompile(`/logs/all/AWSLogs/123456789012/vpcflowlogs/us-east-1/\d{4}/\d\d/\d\d/123456789012_vpcflowlogs_us-east-1_` + all + `_\d{8}T\d{4}Z_[0-9a-f]{8}\.log\.gz$`)
	for _, f := range logFiles(t, o.S3Dir, all) {
		if !name.MatchString(f) {
			t.Errorf("file %s", f)
		}
	}
	eventually(t, "no data", func() bool {
		return slices.ContainsFunc(logLines(t, o.S3Dir, all), func(l string) bool { return strings.HasSuffix(l, "NODATA") })
	})

	hive := regexp.MustCompile(`/columns/AWSLogs/aws-account-id=123456789012/aws-service=vpcflowlogs/aws-region=us-east-1/year=\d{4}/month=\d\d/day=\d\d/hour=\d\d/.*\.log\.parquet$`)
	var packets int64
	for _, f := range logFiles(t, o.S3Dir, columns) {
		if !hive.MatchString(f) {
			t.Errorf("file %s", f)
		}
		type row struct {
			Source  string `parquet:"pkt_srcaddr"`
			Port    *int32 `parquet:"dstport,optional"`
			Packets *int64 `parquet:"packets,optional"`
			Flags   *int32 `parquet:"tcp_flags,optional"`
		}
		rows, err := parquet.ReadFile[row](f)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range rows {
			if r.Source == "10.0.1.20" && r.Port != nil && *r.Port == 53 {
				packets += *r.Packets
			}
		}
	}
	if packets != 3 {
		t.Errorf("%d packets to port 53 in Parquet files, want 3", packets)
	}
	if d := r.ec2("DescribeFlowLogs", "FlowLogId.1="+all); !strings.Contains(d, "<deliverLogsStatus>SUCCESS</deliverLogsStatus>") {
		t.Errorf("delivered: %s", d)
	}

	// A bucket that cannot be written to: the flow log says so, and when it can,
	// what was lost meanwhile.
	if err := os.RemoveAll(filepath.Join(o.S3Dir, "columns")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(o.S3Dir, "columns"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "failed", func() bool {
		d := r.ec2("DescribeFlowLogs", "Filter.1.Name=deliver-log-status", "Filter.1.Value.1=FAILED")
		return strings.Contains(d, columns) && strings.Contains(d, "<deliverLogsErrorMessage>Access error: ") && !strings.Contains(d, all)
	})
	if err := os.Remove(filepath.Join(o.S3Dir, "columns")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "delivered again", func() bool {
		return strings.Contains(r.ec2("DescribeFlowLogs", "FlowLogId.1="+columns), "SUCCESS")
	})
}

// What vpcd tells of flows: at once, of the interval that runs; filtered; and
// for those who follow, as intervals end.
func TestFlowsAreTold(t *testing.T) {
	o := labOptions(t)
	o.FlowInterval = 10 * time.Minute
	r := start(t, o)
	ids, netns := r.twoInstances()
	listenUDP(t, netns[ids["b"]], "10.0.2.10:53")
	send(t, listenUDP(t, netns[ids["a"]], "10.0.1.10:4000"), "10.0.2.10:53", 2)
	var now []map[string]any
	eventually(t, "a record of the running interval", func() bool {
		now = r.flows("eni=" + ids["eni-b"] + "&address=10.0.1.10")
		return len(now) == 1
	})
	want := map[string]any{
		"account-id": "123456789012", "region": "us-east-1", "az-id": now[0]["az-id"], "vpc-id": ids["vpc"], "subnet-id": ids["subnet-b"], "interface-id": ids["eni-b"], "instance-id": ids["b"],
		"machine": "b", "running": true, "srcaddr": "10.0.1.10", "dstaddr": "10.0.2.10", "pkt-srcaddr": "10.0.1.10", "pkt-dstaddr": "10.0.2.10", "srcport": 4000.0, "dstport": 53.0, "protocol": 17.0,
		"packets": 2.0, "bytes": 72.0, "start": now[0]["start"], "end": now[0]["end"], "action": "ACCEPT", "log-status": "OK", "tcp-flags": 0.0, "type": "IPv4", "flow-direction": "ingress",
	}
	if d := cmp.Diff(want, now[0]); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if got := r.flows("action=REJECT"); len(got) != 0 {
		t.Errorf("refused: %v", got)
	}
	if got := r.flows("since=2199-01-01T00:00:00Z"); len(got) != 0 {
		t.Errorf("in the future: %v", got)
	}
	for _, bad := range []string{"eni=b", "action=MAYBE", "address=b", "since=now", "colour=red"} {
		var e map[string]string
		if code := r.admin("GET", "flows?"+bad, nil, &e); code != 400 || e["error"] == "" {
			t.Errorf("%s: %d %v", bad, code, e)
		}
	}

	resp, err := http.Get(r.url + AdminPath + "flows?follow=true&eni=" + ids["eni-b"])
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var chaos map[string]any
	r.admin("PUT", "chaos", map[string]any{"flowInterval": "1s", "fileInterval": "1s"}, &chaos)
	got := map[string]any{}
	if err := json.NewDecoder(bufio.NewReader(resp.Body)).Decode(&got); err != nil {
		t.Fatal(err)
	}
	delete(want, "running")
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("followed (-want +got):\n%s", d)
	}
	r.stop() // and does not wait for who follows
	if _, err := io.ReadAll(resp.Body); err != nil {
		t.Errorf("the stream ends with %v", err)
	}

	// The next vpcd tells of it, too.
	r = start(t, o)
	eventually(t, "what was recorded before", func() bool {
		for _, line := range r.flows("eni=" + ids["eni-b"] + "&address=10.0.1.10") {
			if line["running"] == nil && line["packets"] == 2.0 && line["machine"] == "b" {
				return true
			}
		}
		return false
	})
}

// Killed under traffic again and again, vpcd has each packet in a file, once.
func TestKillLosesNoFlowRecord(t *testing.T) {
	o := labOptions(t)
	r, kill := startChild(t, o)
	var chaos map[string]any
	ids, netns := r.twoInstances()
	id := r.id("fl", "CreateFlowLogs", "ResourceType=NetworkInterface", "ResourceId.1="+ids["eni-a"], "TrafficType=ALL", "LogDestinationType=s3", "LogDestination=arn:aws:s3:::logs",
		"LogFormat=${flow-direction} ${dstport} ${packets} ${bytes} ${log-status}")
	listenUDP(t, netns[ids["b"]], "10.0.2.10:53")
	client := listenUDP(t, netns[ids["a"]], "10.0.1.10:4000")
	for range 4 {
		r.admin("PUT", "chaos", map[string]any{"flowInterval": "1s", "fileInterval": "1s"}, &chaos)
		before := len(logFiles(t, filepath.Join(o.Dir, s3Folder), id))
		eventually(t, "a file more, and packets meanwhile", func() bool {
			send(t, client, "10.0.2.10:53", 50)
			return len(logFiles(t, filepath.Join(o.Dir, s3Folder), id)) > before
		})
		kill()
		send(t, client, "10.0.2.10:53", 50)
		r, kill = startChild(t, o)
	}
	r.admin("PUT", "chaos", map[string]any{"flowInterval": "1s", "fileInterval": "1s"}, &chaos)
	sums := func() (packets, size uint64) {
		for _, l := range logLines(t, filepath.Join(o.Dir, s3Folder), id) {
			f := strings.Fields(l)
			if f[len(f)-1] == "SKIPDATA" {
				t.Errorf("something was skipped: %q", l)
			}
			if f[0] == "egress" {
				p, _ := strconv.ParseUint(f[2], 10, 64)
				s, _ := strconv.ParseUint(f[3], 10, 64)
				packets, size = packets+p, size+s
			}
		}
		return packets, size
	}
	var packets, size, wantPackets, wantSize uint64
	eventually(t, "logged and exempt is what is counted", func() bool {
		var counters map[vpc.ENIID]fabric.Counters
		r.admin("GET", "counters", nil, &counters)
		c := counters[vpc.ENIID(ids["eni-a"])]
		packets, size = sums()
		wantPackets, wantSize = c.TxPackets-c.ExemptTxPackets, c.TxBytes-c.ExemptTxBytes
		return packets == wantPackets && size == wantSize && packets > 0
	})
	t.Logf("%d packets, %d bytes in %d files", packets, size, len(logFiles(t, filepath.Join(o.Dir, s3Folder), id)))
}

// A vpcd that is killed as soon as it serves has ended the interval that was due:
// however often that happens, records find room.
func TestKilledEarlyEndsIntervals(t *testing.T) {
	o := labOptions(t)
	o.FlowInterval = time.Millisecond
	// The latest interval that there is, by its pin.
	latest := func() (n uint64) {
		pins, err := filepath.Glob(filepath.Join(o.BPFFS, "v*", "intervals", "*"))
		if err != nil || len(pins) == 0 {
			t.Fatalf("pins %v, %v", pins, err)
		}
		for _, p := range pins {
			number, _, _ := strings.Cut(filepath.Base(p), "-")
			i, err := strconv.ParseUint(number, 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			n = max(n, i)
		}
		return n
	}
	_, kill := startChild(t, o)
	kill()
	for range 3 {
		before := latest()
		_, kill := startChild(t, o)
		kill()
		if after := latest(); after == before {
			t.Errorf("interval %d still runs", after)
		}
	}
}

// Who refused is no matter of AWS's records: they are one.
func TestMergedRefusals(t *testing.T) {
	e := &fabric.Logged{ENI: "eni-1"}
	r := fabric.Record{Interface: e, Refused: fabric.RefusedGroups, Source: netip.MustParseAddr("10.0.0.1"), Destination: netip.MustParseAddr("10.0.0.2"), Packets: 2, Bytes: 80, First: time.Unix(5, 0), Last: time.Unix(6, 0), TCPFlags: 2}
	o := r
	o.Refused, o.Packets, o.Bytes, o.First, o.Last, o.TCPFlags = fabric.RefusedACL, 1, 40, time.Unix(3, 0), time.Unix(9, 0), 1
	passed := r
	passed.Refused = fabric.Accepted
	other := o
	other.DestinationPort = 1
	var got []string
	for _, s := range newFlowWorld(t).log.records(&fabric.Interval{Records: []fabric.Record{r, passed, o, other}}) {
		got = append(got, fmt.Sprint(s.Action, " ", s.RefusedBy, " to port ", s.DestinationPort, ": ", s.Packets, " packets, ", s.Bytes, " bytes, ", s.Start.Unix(), "-", s.End.Unix(), ", flags ", s.TCPFlags))
	}
	want := []string{
		"REJECT security-group,network-acl to port 0: 3 packets, 120 bytes, 3-9, flags 3",
		"REJECT network-acl to port 1: 1 packets, 40 bytes, 3-9, flags 1",
		"ACCEPT  to port 0: 2 packets, 80 bytes, 5-6, flags 2",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}
