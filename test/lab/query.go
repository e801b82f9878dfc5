package lab

import (
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"github.com/underlay-cni/underlay/internal/agentapi"
)

// Call sends one EC2 call by hand, without a client that would try again.
func (l *Lab) Call(action string, params map[string]string, v any) error {
	form := url.Values{"Action": {action}, "Version": {"2016-11-15"}}
	for k, p := range params {
		form.Set(k, p)
	}
	req, err := http.NewRequest(http.MethodPost, l.Endpoint, strings.NewReader(form.Encode()))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")
	req.Header.Set("X-Amz-Date", time.Now().UTC().Format("20060102T150405Z"))
	req.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=test/"+time.Now().UTC().Format("20060102")+"/us-east-1/ec2/aws4_request, SignedHeaders=host, Signature=0")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s: %s", action, resp.Status, b)
	}
	return xml.Unmarshal(b, v)
}

// CreateGroup creates a security group and returns its ID once vpcd said so.
func (l *Lab) CreateGroup(name string) (string, error) {
	var out struct {
		GroupID string `xml:"groupId"`
	}
	err := l.Call("CreateSecurityGroup", map[string]string{"GroupName": name, "GroupDescription": "made by a test", "VpcId": l.VPCID}, &out)
	return out.GroupID, err
}

// Groups returns the IDs of all security groups.
func (l *Lab) Groups() map[string]bool {
	l.t.Helper()
	var out struct {
		Items []struct {
			GroupID string `xml:"groupId"`
		} `xml:"securityGroupInfo>item"`
	}
	if err := l.Call("DescribeSecurityGroups", nil, &out); err != nil {
		l.t.Fatal(err)
	}
	ids := map[string]bool{}
	for _, g := range out.Items {
		ids[g.GroupID] = true
	}
	return ids
}

// Writes returns how many calls that change something vpcd has served.
func (l *Lab) Writes() int {
	l.t.Helper()
	resp, err := http.Get(l.Endpoint + "/_vpcd/calls")
	if err != nil {
		l.t.Fatal(err)
	}
	defer resp.Body.Close()
	var calls map[string]int
	if err := json.NewDecoder(resp.Body).Decode(&calls); err != nil {
		l.t.Fatalf("/_vpcd/calls: %v", err)
	}
	if calls["DescribeNetworkInterfaces"] == 0 {
		l.t.Fatalf("vpcd counts no DescribeNetworkInterfaces, though agents run: %v", calls)
	}
	n := 0
	for action, count := range calls {
		if !strings.HasPrefix(action, "Describe") && !strings.HasPrefix(action, "Get") {
			n += count
		}
	}
	return n
}

// Chaos sets one of vpcd's knobs.
func (l *Lab) Chaos(args ...string) {
	l.t.Helper()
	_, stderr, code := Execute(l.t, filepath.Join(Bin, "vpcd"), append([]string{"chaos", "set", "--endpoint", l.Endpoint}, args...)...)
	if code != 0 {
		l.t.Fatalf("vpcd chaos set %v: %s", args, stderr)
	}
}

// Inspect asks a node's agent, once it has identified its node, what it knows.
func (l *Lab) Inspect(n Node) *agentapi.Inspection {
	l.t.Helper()
	var in *agentapi.Inspection
	Eventually(l.t, 10*time.Second, "the agent of "+n.Name+" serves", func() (err error) {
		c := agentapi.Client{Socket: n.AgentSocket}
		if in, err = c.Inspect(l.t.Context()); err == nil && len(in.ENIs) == 0 {
			err = fmt.Errorf("it knows no ENI: %s", in.Reason)
		}
		return err
	})
	return in
}

// Pods returns the live endpoints of all nodes as their agents know them.
func (l *Lab) Pods() map[string]string {
	l.t.Helper()
	out := map[string]string{}
	for _, n := range l.Nodes {
		in := l.Inspect(n)
		for _, e := range in.Endpoints {
			if e.State == "live" {
				out[n.Name+"/"+e.Pod.Name] = e.IP.String()
			}
		}
	}
	return out
}

// FillSubnet takes every free address of a subnet with interfaces that are
// attached to nothing.
func (l *Lab) FillSubnet(subnet string) {
	l.t.Helper()
	for {
		var out struct {
			Items []struct {
				Available int `xml:"availableIpAddressCount"`
			} `xml:"subnetSet>item"`
		}
		if err := l.Call("DescribeSubnets", map[string]string{"SubnetId.1": subnet}, &out); err != nil {
			l.t.Fatal(err)
		}
		free := out.Items[0].Available
		if free == 0 {
			return
		}
		var made struct {
			ID string `xml:"networkInterface>networkInterfaceId"`
		}
		params := map[string]string{"SubnetId": subnet}
		if n := min(free-1, 49); n > 0 {
			params["SecondaryPrivateIpAddressCount"] = fmt.Sprint(n)
		}
		if err := l.Call("CreateNetworkInterface", params, &made); err != nil {
			l.t.Fatalf("with %d free: %v", free, err)
		}
	}
}

// AwaitFree waits until a node has count addresses to spare, at most limit.
func (l *Lab) AwaitFree(n Node, count int, limit time.Duration) {
	l.t.Helper()
	Eventually(l.t, limit, fmt.Sprintf("%s has %d addresses to spare", n.Name, count), func() error {
		free := 0
		for _, eni := range l.Inspect(n).ENIs {
			free += eni.Addresses.Free
		}
		if free < count {
			return fmt.Errorf("%d are free", free)
		}
		return nil
	})
}

// Held returns the interfaces that EC2 says a node has, and how many addresses
// of the VPC they take.
func (l *Lab) Held(n Node) (enis, addresses int) {
	l.t.Helper()
	var out struct {
		Items []struct {
			Addresses []struct{} `xml:"privateIpAddressesSet>item"`
			Prefixes  []struct{} `xml:"ipv4PrefixSet>item"`
		} `xml:"networkInterfaceSet>item"`
	}
	err := l.Call("DescribeNetworkInterfaces", map[string]string{"Filter.1.Name": "attachment.instance-id", "Filter.1.Value.1": n.InstanceID}, &out)
	if err != nil {
		l.t.Fatal(err)
	}
	for _, e := range out.Items {
		addresses += len(e.Addresses) + 16*len(e.Prefixes)
	}
	return len(out.Items), addresses
}
