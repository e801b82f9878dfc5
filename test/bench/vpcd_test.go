package bench

import (
	"bufio"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/test/lab"
)

// The fleet that vpcd holds while it is measured, and who asks.
const (
	fleetInstances  = 2000
	fleetInterfaces = 10 // of each
	apiClients      = 64
	describeCalls   = 8000 // of a round
	assignCalls     = 1500 // of a round
	mixedRate       = 500  // calls per second
	mixedFor        = 20 * time.Second

	// What is asked of it.
	describeGoal = 2000 // calls per second
	assignGoal   = 500  // calls per second
	memoryGoal   = 1024 // MiB
)

// apiServer is a `vpcd serve --no-fabric` of its own.
type apiServer struct {
	dir, listen string
	cmd         *exec.Cmd
}

func (s *apiServer) start(b *testing.B) {
	b.Helper()
	s.cmd = exec.Command(filepath.Join(lab.Bin, "vpcd"), "serve", "--no-fabric", "--dir", s.dir, "--listen", s.listen)
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	s.cmd.Env = append(os.Environ(), "GOMAXPROCS=2")
	if err := s.cmd.Start(); err != nil {
		b.Fatal(err)
	}
	cmd := s.cmd
	b.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	lab.Eventually(b, 60*time.Second, "vpcd serves", func() error {
		r, err := http.Get("http://" + s.listen + "/_vpcd/health")
		if err == nil {
			_ = r.Body.Close()
		}
		return err
	})
}

// cpu returns the seconds of CPU that vpcd has used.
func (s *apiServer) cpu(b *testing.B) float64 {
	b.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.cmd.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	// After the name, which ends with the last parenthesis, come the fields from
	// the third on; utime and stime are the 14th and 15th (proc(5)).
	fields := strings.Fields(string(raw[strings.LastIndexByte(string(raw), ')')+1:]))
	var ticks float64
	for _, f := range fields[11:13] {
		n, err := strconv.ParseFloat(f, 64)
		if err != nil {
			b.Fatal(err)
		}
		ticks += n
	}
	return ticks / 100 // USER_HZ
}

// memory returns a line of vpcd's /proc status, in MiB.
func (s *apiServer) memory(b *testing.B, line string) float64 {
	b.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	for l := range strings.SplitSeq(string(raw), "\n") {
		if rest, ok := strings.CutPrefix(l, line+":"); ok {
			kb, err := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(rest, "kB")), 64)
			if err != nil {
				b.Fatal(err)
			}
			return kb / 1024
		}
	}
	b.Fatalf("no %s in the status", line)
	return 0
}

// apiClient is one connection, and asks as cheaply as it can: it shares the
// cores with the server.
type apiClient struct {
	conn net.Conn
	r    *bufio.Reader
	host string
}

func dialAPI(b *testing.B, listen string) *apiClient {
	b.Helper()
	c, err := net.Dial("tcp", listen)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = c.Close() })
	return &apiClient{c, bufio.NewReaderSize(c, 64<<10), listen}
}

// call posts an action and returns the body of an answer with success.
func (c *apiClient) call(action string, params ...string) ([]byte, error) {
	form := url.Values{"Action": {action}, "Version": {"2016-11-15"}}
	for _, p := range params {
		name, value, _ := strings.Cut(p, "=")
		form.Set(name, value)
	}
	body := form.Encode()
	if _, err := fmt.Fprintf(c.conn, "POST / HTTP/1.1\r\nHost: %s\r\nContent-Type: application/x-www-form-urlencoded\r\n"+
		"Authorization: AWS4-HMAC-SHA256 Credential=AKIDBENCH/20260102/us-east-1/ec2/aws4_request, Signature=0\r\nContent-Length: %d\r\n\r\n%s", c.host, len(body), body); err != nil {
		return nil, err
	}
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s %s", action, resp.Status, answer)
	}
	return answer, err
}

// texts returns the text of all elements of a name.
func texts(b *testing.B, doc []byte, name string) []string {
	b.Helper()
	var out []string
	d := xml.NewDecoder(strings.NewReader(string(doc)))
	for {
		t, err := d.Token()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			b.Fatal(err)
		}
		if s, ok := t.(xml.StartElement); ok && s.Name.Local == name {
			var text string
			if err := d.DecodeElement(&text, &s); err != nil {
				b.Fatal(err)
			}
			out = append(out, text)
		}
	}
}

// storm makes n calls by all clients at once and returns how many those were per
// second, and the CPU time of vpcd that each took, in s. A call that fails ends it.
func storm(b *testing.B, s *apiServer, n int, call func(c *apiClient, k int) error) (rate, used float64) {
	b.Helper()
	clients := make([]*apiClient, apiClients)
	for i := range clients {
		clients[i] = dialAPI(b, s.listen)
	}
	var next atomic.Int64
	errs := make(chan error, apiClients)
	cpu, start := s.cpu(b), time.Now()
	var all sync.WaitGroup
	for _, c := range clients {
		all.Go(func() {
			for {
				k := int(next.Add(1)) - 1
				if k >= n {
					return
				}
				if err := call(c, k); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	all.Wait()
	took := time.Since(start).Seconds()
	select {
	case err := <-errs:
		b.Fatal(err)
	default:
	}
	return float64(n) / took, (s.cpu(b) - cpu) / float64(n)
}

// storms makes a storm of n calls in each round and returns the row of their
// rate to the goal. call has the number of the call, from 0 over all rounds.
func storms(b *testing.B, s *apiServer, what string, n int, goal float64, call func(c *apiClient, k int) error) Row {
	b.Helper()
	var rates, goals, cpu []float64
	for round := range *turns {
		rate, used := storm(b, s, n, func(c *apiClient, k int) error { return call(c, round*n+k) })
		rates, goals, cpu = append(rates, rate), append(goals, goal), append(cpu, used)
	}
	b.Logf("%s: %d rounds of %d calls by %d clients: %.0f per second; vpcd used %.0f µs of CPU for each, so that its two cores alone would make %.0f per second",
		what, *turns, n, apiClients, Median(rates), Median(cpu)*1e6, 2/Median(cpu))
	b.ReportMetric(Median(rates), what+"/s")
	b.ReportMetric(Median(cpu)*1e6, what+"-µs-CPU")
	r := RowOf("vpcd/"+what, fmt.Sprintf("%.0f calls per second with %d clients; higher is better", goal, apiClients), rates, goals)
	r.Subject, r.Floor, r.Unit = Median(rates), goal, "calls per second"
	return r
}

// BenchmarkVPCD measures the API with a fleet of 20,000 interfaces: Describe and
// Assign by 64 clients, what is left of them after SIGKILL, and the memory under
// a mixed load. Clients and server share the machine's cores; the CPU that a
// call takes of vpcd does not depend on who else is on the machine.
func BenchmarkVPCD(b *testing.B) {
	s := &apiServer{dir: b.TempDir(), listen: lab.FreeAddress(b)}
	s.start(b)
	b.Logf("%d cores", runtime.NumCPU())
	settings, err := http.NewRequestWithContext(b.Context(), http.MethodPut, "http://"+s.listen+"/_vpcd/chaos", strings.NewReader(`{"quotas":{"interfaces-per-zone":30000}}`))
	if err != nil {
		b.Fatal(err)
	}
	r, err := http.DefaultClient.Do(settings)
	if err != nil || r.StatusCode != http.StatusOK {
		b.Fatalf("set the quota: %v %v", r, err)
	}
	_ = r.Body.Close()

	c := dialAPI(b, s.listen)
	must := func(action string, params ...string) []byte {
		b.Helper()
		out, err := c.call(action, params...)
		if err != nil {
			b.Fatal(err)
		}
		return out
	}
	vpc := texts(b, must("CreateVpc", "CidrBlock=10.0.0.0/16"), "vpcId")[0]
	subnet := texts(b, must("CreateSubnet", "VpcId="+vpc, "CidrBlock=10.0.0.0/16"), "subnetId")[0]
	launch := []string{"ImageId=ami-00000000000000000", "InstanceType=m5.24xlarge", "MinCount=500", "MaxCount=500"}
	for d := range fleetInterfaces {
		launch = append(launch, fmt.Sprintf("NetworkInterface.%d.DeviceIndex=%d", d+1, d), fmt.Sprintf("NetworkInterface.%d.SubnetId=%s", d+1, subnet))
	}
	var instances, interfaces []string
	for range fleetInstances / 500 {
		out := must("RunInstances", launch...)
		instances = append(instances, texts(b, out, "instanceId")...)
		interfaces = append(interfaces, texts(b, out, "networkInterfaceId")...)
	}
	slices.Sort(instances)
	instances = slices.Compact(instances)
	if len(instances) != fleetInstances || len(interfaces) != fleetInstances*fleetInterfaces {
		b.Fatalf("%d instances with %d interfaces", len(instances), len(interfaces))
	}
	b.Logf("with %d instances of %d interfaces: %.0f MiB resident, %.0f MiB at most", fleetInstances, fleetInterfaces, s.memory(b, "VmRSS"), s.memory(b, "VmHWM"))

	if *turns*assignCalls > len(interfaces) {
		b.Fatalf("%d turns of %d assignments are more than one for each interface; use at most %d", *turns, assignCalls, len(interfaces)/assignCalls)
	}
	for b.Loop() {
		var rows []Row
		rows = append(rows, storms(b, s, "describe", describeCalls, describeGoal, func(c *apiClient, k int) error {
			_, err := c.call("DescribeNetworkInterfaces", "Filter.1.Name=attachment.instance-id", "Filter.1.Value.1="+instances[k%len(instances)])
			return err
		}))
		// Every interface once: who asks knows what it was given.
		given := make([]string, *turns*assignCalls)
		rows = append(rows, storms(b, s, "assign", assignCalls, assignGoal, func(c *apiClient, k int) error {
			out, err := c.call("AssignPrivateIpAddresses", "NetworkInterfaceId="+interfaces[k], "SecondaryPrivateIpAddressCount=1")
			_, rest, _ := strings.Cut(string(out), "<privateIpAddress>")
			given[k], _, _ = strings.Cut(rest, "<")
			return err
		}))
		most := s.memory(b, "VmHWM")
		if err := s.cmd.Process.Kill(); err != nil {
			b.Fatal(err)
		}
		_ = s.cmd.Wait() // "signal: killed"
		began := time.Now()
		s.start(b)
		b.Logf("after SIGKILL vpcd serves again in %.1f s, %.0f MiB resident", time.Since(began).Seconds(), s.memory(b, "VmRSS"))
		c = dialAPI(b, s.listen)
		lost := 0
		for k := range given {
			if k%500 != 0 {
				continue
			}
			params := make([]string, 0, 500)
			for j := k; j < min(k+500, len(given)); j++ {
				params = append(params, fmt.Sprintf("NetworkInterfaceId.%d=%s", j-k+1, interfaces[j]))
			}
			there := map[string]bool{}
			for _, a := range texts(b, must("DescribeNetworkInterfaces", params...), "privateIpAddress") {
				there[a] = true
			}
			for j := k; j < min(k+500, len(given)); j++ {
				if given[j] == "" || !there[given[j]] {
					lost++
				}
			}
		}
		if lost > 0 {
			b.Errorf("%d of %d acknowledged assignments are lost", lost, len(given))
		}
		b.Logf("all of %d acknowledged assignments are there", len(given)-lost)

		rate := mixed(b, s, instances, interfaces)
		most = max(most, s.memory(b, "VmHWM"))
		b.ReportMetric(most, "MiB")
		memory := RowOf("vpcd/memory", fmt.Sprintf("1 GiB, under %.0f calls per second; lower is better", rate), []float64{most}, []float64{memoryGoal})
		memory.Subject, memory.Floor, memory.Unit = most, memoryGoal, "MiB resident at most"
		if err := Write(kept(b, "vpcd.json"), append(rows, memory)); err != nil {
			b.Fatal(err)
		}
		for k := range given { // as it was, should it be measured again
			must("UnassignPrivateIpAddresses", "NetworkInterfaceId="+interfaces[k], "PrivateIpAddress.1="+given[k])
		}
	}
}

// mixed asks at a steady rate, a tenth of it changes, and returns the rate that
// was held. A call whose time comes while all clients wait for an answer is made
// late, not left out: so what is missing to the rate shows.
func mixed(b *testing.B, s *apiServer, instances, interfaces []string) float64 {
	b.Helper()
	total := int(mixedFor.Seconds() * mixedRate)
	due := make(chan int, total)
	errs := make(chan error, apiClients)
	var late atomic.Int64
	var all sync.WaitGroup
	start := time.Now()
	for range apiClients {
		c := dialAPI(b, s.listen)
		all.Go(func() {
			for k := range due {
				var err error
				switch {
				case k%10 == 0:
					_, err = c.call("ModifyNetworkInterfaceAttribute", "NetworkInterfaceId="+interfaces[k%len(interfaces)], fmt.Sprintf("Description.Value=%d", k))
				case k%50 == 1: // a page of all, as a controller polls them
					_, err = c.call("DescribeNetworkInterfaces", "MaxResults=1000")
				default:
					_, err = c.call("DescribeNetworkInterfaces", "Filter.1.Name=attachment.instance-id", "Filter.1.Value.1="+instances[k%len(instances)])
				}
				if err != nil {
					errs <- err
					return
				}
				if time.Since(start).Seconds() > float64(k)/mixedRate+1 {
					late.Add(1)
				}
			}
		})
	}
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for n := 0; n < total; <-t.C {
		for now := min(total, int(time.Since(start).Seconds()*mixedRate)); n < now; n++ {
			due <- n
		}
	}
	close(due)
	all.Wait()
	select {
	case err := <-errs:
		b.Fatal(err)
	default:
	}
	rate := float64(total) / time.Since(start).Seconds()
	b.Logf("%d calls, %d per second due: %.1f per second held, %d answered more than a second after their time; %.0f MiB resident, %.0f MiB at most",
		total, mixedRate, rate, late.Load(), s.memory(b, "VmRSS"), s.memory(b, "VmHWM"))
	return rate
}
