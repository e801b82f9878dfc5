package ec2

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/ipam"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// answer is one response of a scripted EC2.
type answer struct {
	status int // 0: the connection breaks within the body
	body   string
}

// scripted serves each action's answers in turn, the last one again and again,
// and remembers the requests.
func scripted(t *testing.T, answers map[string][]answer) (*Client, func() []url.Values) {
	t.Helper()
	var mu sync.Mutex
	var got []url.Values
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		q, _ := url.ParseQuery(string(b))
		mu.Lock()
		defer mu.Unlock()
		got = append(got, q)
		list := answers[q.Get("Action")]
		if len(list) == 0 {
			w.WriteHeader(500)
			return
		}
		a := list[0]
		if len(list) > 1 {
			answers[q.Get("Action")] = list[1:]
		}
		if a.status == 0 {
			breakOff(t, w, a.body)
			return
		}
		w.WriteHeader(a.status)
		fmt.Fprint(w, a.body)
	}))
	t.Cleanup(srv.Close)
	t.Setenv("AWS_ENDPOINT_URL_EC2", srv.URL)
	t.Setenv("AWS_ACCESS_KEY_ID", "AKIAX")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "x")
	t.Setenv("AWS_CONFIG_FILE", "/dev/null")
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
	c, err := New(context.Background(), "us-east-1")
	if err != nil {
		t.Fatal(err)
	}
	c.poll, c.again = time.Millisecond, time.Millisecond
	return c, func() []url.Values { mu.Lock(); defer mu.Unlock(); return got }
}

// breakOff answers with half of a body, and resets the connection.
func breakOff(t *testing.T, w http.ResponseWriter, body string) {
	c, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		t.Error(err)
		return
	}
	fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", 2*len(body), body)
	_ = c.(*net.TCPConn).SetLinger(0)
	c.Close()
}

// A read whose connection breaks is made once more, and no other call is.
func TestConnectionBreaks(t *testing.T) {
	c, got := scripted(t, map[string][]answer{
		"DescribeSubnets":        {{0, "<DescribeSubnetsResponse>"}, {200, `<DescribeSubnetsResponse><subnetSet><item><subnetId>subnet-1</subnetId><vpcId>vpc-1</vpcId><cidrBlock>10.0.0.0/24</cidrBlock></item></subnetSet></DescribeSubnetsResponse>`}},
		"DescribeInstances":      {{0, "<DescribeInstancesResponse>"}},
		"DeleteNetworkInterface": {{0, "<DeleteNetworkInterfaceResponse>"}},
	})
	ctx := context.Background()
	if s, err := c.Subnet(ctx, "subnet-1"); err != nil || s.VPC != "vpc-1" {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := c.Alive(ctx, []vpc.InstanceID{"i-1"}); err == nil {
		t.Error("an answer that never came whole is one")
	}
	if err := c.DeleteInterface(ctx, "eni-1", ""); err == nil {
		t.Error("a deletion whose answer broke off is done")
	}
	calls := map[string]int{}
	for _, q := range got() {
		calls[q.Get("Action")]++
	}
	if diff := cmp.Diff(map[string]int{"DescribeSubnets": 2, "DescribeInstances": 2, "DeleteNetworkInterface": 1}, calls); diff != "" {
		t.Errorf("calls:\n%s", diff)
	}
}

func fault(code, msg string) string {
	return `<Response><Errors><Error><Code>` + code + `</Code><Message>` + msg + `</Message></Error></Errors><RequestID>r</RequestID></Response>`
}

const eniXML = `<interfaceType>efa</interfaceType><networkInterfaceId>eni-1</networkInterfaceId><subnetId>subnet-1</subnetId><vpcId>vpc-1</vpcId><macAddress>02:AA:00:00:00:01</macAddress>
<privateIpAddress>10.0.0.4</privateIpAddress><status>in-use</status><requesterManaged>false</requesterManaged>
<groupSet><item><groupId>sg-1</groupId></item></groupSet><tagSet><item><key>k</key><value>v</value></item></tagSet>
<privateIpAddressesSet><item><privateIpAddress>10.0.0.4</privateIpAddress><primary>true</primary><association><publicIp>192.0.2.4</publicIp></association></item><item><privateIpAddress>10.0.0.9</privateIpAddress><primary>false</primary><association><publicIp>192.0.2.9</publicIp><allocationId>eipalloc-1</allocationId></association></item></privateIpAddressesSet>
<connectionTrackingConfiguration><tcpEstablishedTimeout>1200</tcpEstablishedTimeout><udpTimeout>45</udpTimeout></connectionTrackingConfiguration>
<ipv4PrefixSet><item><ipv4Prefix>10.0.0.32/28</ipv4Prefix></item></ipv4PrefixSet>`

func TestInterfacesArePagedFilteredAndMerged(t *testing.T) {
	att := func(status string) string {
		return `<attachment><attachmentId>eni-attach-1</attachmentId><instanceId>i-1</instanceId><deviceIndex>2</deviceIndex><status>` + status + `</status><deleteOnTermination>true</deleteOnTermination></attachment>`
	}
	page := func(items, next string) answer {
		return answer{200, `<DescribeNetworkInterfacesResponse><networkInterfaceSet>` + items + `</networkInterfaceSet><nextToken>` + next + `</nextToken></DescribeNetworkInterfacesResponse>`}
	}
	c, got := scripted(t, map[string][]answer{"DescribeNetworkInterfaces": {
		page(`<item>`+eniXML+att("attached")+`</item>`, "more"),
		page(`<item><networkInterfaceId>eni-2</networkInterfaceId>`+att("detaching")+`</item>`, ""),
		page(`<item>`+eniXML+`</item><item><networkInterfaceId>eni-3</networkInterfaceId></item>`, ""),
	}})
	out, err := c.Interfaces(t.Context(), "i-1", "tag/instance")
	if err != nil {
		t.Fatal(err)
	}
	want := []vpc.ENI{
		{ID: "eni-1", VPC: "vpc-1", Subnet: "subnet-1", MAC: "02:aa:00:00:00:01", Primary: netip.MustParseAddr("10.0.0.4"), Secondary: []netip.Addr{netip.MustParseAddr("10.0.0.9")},
			Prefixes: []netip.Prefix{netip.MustParsePrefix("10.0.0.32/28")}, Groups: []vpc.SecurityGroupID{"sg-1"}, Tags: map[string]string{"k": "v"},
			Idle:    vpc.IdleTimeouts{TCPEstablished: 20 * time.Minute, UDP: 45 * time.Second},
			Elastic: []netip.Addr{netip.MustParseAddr("10.0.0.9")}, Type: "efa", Instance: "i-1", Attachment: "eni-attach-1", DeviceIndex: 2, Attached: true, DeleteOnTermination: true},
		{ID: "eni-2", Tags: map[string]string{}}, // detaching: as good as off
		{ID: "eni-3", Tags: map[string]string{}},
	}
	eq := cmp.Options{cmp.Comparer(func(x, y netip.Addr) bool { return x == y }), cmp.Comparer(func(x, y netip.Prefix) bool { return x == y })}
	if diff := cmp.Diff(want, out, eq); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	qs := got()
	if qs[0].Get("Filter.1.Name") != "attachment.instance-id" || qs[0].Get("MaxResults") == "" || qs[1].Get("NextToken") != "more" || qs[2].Get("Filter.1.Name") != "tag:tag/instance" {
		t.Errorf("requests: %v", qs)
	}
}

func TestThrottledHalfOfAReadIsRepeatedAlone(t *testing.T) {
	none := answer{200, `<DescribeNetworkInterfacesResponse><networkInterfaceSet></networkInterfaceSet></DescribeNetworkInterfacesResponse>`}
	wait := answer{503, fault("RequestLimitExceeded", "wait")}
	c, got := scripted(t, map[string][]answer{"DescribeNetworkInterfaces": {none, wait, wait, none}})
	if _, err := c.Interfaces(t.Context(), "i-1", "tag"); err != nil {
		t.Fatal(err)
	}
	first := 0
	for _, q := range got() {
		if q.Get("Filter.1.Name") == "attachment.instance-id" {
			first++
		}
	}
	if first != 1 || len(got()) != 4 {
		t.Errorf("%d requests, %d of them for what is attached; want 4 and 1", len(got()), first)
	}
	// A throttled first half is the plan's to pace, and so is one that lasts.
	for _, list := range [][]answer{{wait}, {none, wait}} {
		c, _ := scripted(t, map[string][]answer{"DescribeNetworkInterfaces": list})
		if _, err := c.Interfaces(t.Context(), "i-1", "tag"); !isThrottled(err) {
			t.Errorf("%v, want throttled", err)
		}
	}
}

func TestAliveAsksByFilterAndPage(t *testing.T) {
	page := func(id, next string) answer {
		return answer{200, `<DescribeInstancesResponse><reservationSet><item><instancesSet><item><instanceId>` + id + `</instanceId></item></instancesSet></item></reservationSet><nextToken>` + next + `</nextToken></DescribeInstancesResponse>`}
	}
	c, got := scripted(t, map[string][]answer{"DescribeInstances": {page("i-1", "more"), page("i-2", ""), page("i-200", "")}})
	var ids []vpc.InstanceID
	for i := range 201 {
		ids = append(ids, vpc.InstanceID(fmt.Sprintf("i-%d", i)))
	}
	alive, err := c.Alive(t.Context(), ids)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[vpc.InstanceID]bool{"i-1": true, "i-2": true, "i-200": true}, alive); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	qs := got()
	if len(qs) != 3 || qs[1].Get("NextToken") != "more" || qs[0].Get("Filter.1.Value.200") != "i-199" || qs[2].Get("Filter.1.Value.1") != "i-200" || qs[0].Get("Filter.2.Name") != "instance-state-name" {
		t.Errorf("requests: %v", qs)
	}
}

func TestMutationsAreSentOnce(t *testing.T) {
	ise := []answer{{500, fault("InternalError", "oops")}}
	c, got := scripted(t, map[string][]answer{"AssignPrivateIpAddresses": ise, "AttachNetworkInterface": ise, "CreateNetworkInterface": ise})
	ctx := t.Context()
	_, err1 := c.AssignAddresses(ctx, "eni-1", 3)
	_, err2 := c.AttachInterface(ctx, "eni-1", "i-1", 2)
	_, err3 := c.CreateInterface(ctx, NewInterface{Subnet: "subnet-1", Groups: []vpc.SecurityGroupID{"sg-1"}, Addresses: 4, Tags: map[string]string{"b": "2", "a": "1"}, Token: "tok"})
	for _, err := range []error{err1, err2, err3} {
		if o, class := Outcome(err); o != ipam.Unknown || class != ipam.ClassUnavailable {
			t.Errorf("%v: %v, %v; want unknown", err, o, class)
		}
	}
	qs := got()
	if len(qs) != 3 {
		t.Fatalf("%d requests, want 3: somebody retried", len(qs))
	}
	for k, want := range map[string]string{"ClientToken": "tok", "TagSpecification.1.ResourceType": "network-interface", "TagSpecification.1.Tag.1.Key": "a", "SecondaryPrivateIpAddressCount": "4", "SecurityGroupId.1": "sg-1"} {
		if got := qs[2].Get(k); got != want {
			t.Errorf("CreateNetworkInterface %s = %q, want %q", k, got, want)
		}
	}
}

func TestDeleteWaitsForTheDetachment(t *testing.T) {
	item := func(status string) answer {
		return answer{200, `<DescribeNetworkInterfacesResponse><networkInterfaceSet><item><networkInterfaceId>eni-1</networkInterfaceId><status>` + status + `</status></item></networkInterfaceSet></DescribeNetworkInterfacesResponse>`}
	}
	c, got := scripted(t, map[string][]answer{
		"DetachNetworkInterface":    {{200, `<DetachNetworkInterfaceResponse><return>true</return></DetachNetworkInterfaceResponse>`}},
		"DescribeNetworkInterfaces": {item("in-use"), item("in-use"), {503, fault("RequestLimitExceeded", "slow down")}, item("available")},
		"DeleteNetworkInterface":    {{400, fault("InvalidNetworkInterfaceID.NotFound", "gone")}},
	})
	if err := c.DeleteInterface(t.Context(), "eni-1", "eni-attach-1"); err != nil {
		t.Fatal(err)
	}
	if qs := got(); len(qs) != 6 || qs[5].Get("Action") != "DeleteNetworkInterface" {
		t.Errorf("requests: %v", qs)
	}
}

func TestOutcome(t *testing.T) {
	for _, tc := range []struct {
		status  int
		code    string
		msg     string
		outcome ipam.Outcome
		class   ipam.Class
	}{
		{503, "RequestLimitExceeded", "", ipam.Refused, ipam.ClassThrottled},
		{403, "UnauthorizedOperation", "", ipam.Refused, ipam.ClassDenied},
		{400, "InsufficientFreeAddressesInSubnet", "", ipam.Refused, ipam.ClassSubnetFull},
		{400, "InsufficientCidrBlocks", "", ipam.Refused, ipam.ClassNoPrefix},
		{400, "InvalidParameterValue", "There aren't sufficient free Ipv4 addresses or prefixes", ipam.Refused, ipam.ClassNoPrefix},
		{400, "InvalidParameterValue", "Network interface 'eni-x' is currently in use.", ipam.Refused, ipam.ClassInUse},
		{400, "InvalidParameterValue", "what?", ipam.Refused, ipam.ClassOther},
		{400, "PrivateIpAddressLimitExceeded", "", ipam.Refused, ipam.ClassENIFull},
		{400, "AttachmentLimitExceeded", "", ipam.Refused, ipam.ClassSlots},
		{400, "InvalidNetworkInterfaceID.NotFound", "", ipam.Refused, ipam.ClassNotFound},
		{400, "NeverHeardOf", "", ipam.Refused, ipam.ClassOther},
		{500, "NeverHeardOf", "", ipam.Unknown, ipam.ClassUnavailable},
		{503, "Unavailable", "", ipam.Unknown, ipam.ClassUnavailable},
	} {
		t.Run(tc.code, func(t *testing.T) {
			c, _ := scripted(t, map[string][]answer{"UnassignPrivateIpAddresses": {{tc.status, fault(tc.code, tc.msg)}}})
			err := c.Unassign(t.Context(), "eni-1", nil, nil)
			if o, class := Outcome(err); o != tc.outcome || class != tc.class {
				t.Errorf("%v: %v, %v; want %v, %v", err, o, class, tc.outcome, tc.class)
			}
		})
	}
	t.Run("nobody listens", func(t *testing.T) {
		t.Setenv("AWS_ENDPOINT_URL_EC2", "http://127.0.0.1:1")
		t.Setenv("AWS_ACCESS_KEY_ID", "AKIAX")
		t.Setenv("AWS_SECRET_ACCESS_KEY", "x")
		c, err := New(t.Context(), "us-east-1")
		if err != nil {
			t.Fatal(err)
		}
		err = c.Unassign(t.Context(), "eni-1", nil, nil)
		if o, class := Outcome(err); o != ipam.Refused || class != ipam.ClassUnavailable {
			t.Errorf("%v: %v, %v", err, o, class)
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(errors.New("enough"))
		if o, _ := Outcome(c.Unassign(ctx, "eni-1", nil, nil)); o == ipam.Done {
			t.Error("a canceled call is done")
		}
	})
	t.Run("no credentials", func(t *testing.T) {
		for _, k := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"} {
			t.Setenv(k, "")
		}
		t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
		t.Setenv("AWS_CONFIG_FILE", "/dev/null")
		t.Setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
		c, err := New(t.Context(), "us-east-1")
		if err != nil {
			t.Fatal(err)
		}
		err = c.Unassign(t.Context(), "eni-1", nil, nil)
		if o, class := Outcome(err); o != ipam.Refused || class != ipam.ClassDenied {
			t.Errorf("%v: %v, %v", err, o, class)
		}
	})
	if o, _ := Outcome(nil); o != ipam.Done {
		t.Error("no error is not done")
	}
}

func TestLimitsOfANewType(t *testing.T) {
	c, _ := scripted(t, map[string][]answer{"DescribeInstanceTypes": {{200, `<DescribeInstanceTypesResponse><instanceTypeSet><item><instanceType>z9.huge</instanceType><hypervisor>nitro</hypervisor>
<networkInfo><connectionTrackingConfiguration><defaultTcpEstablishedTimeout>350</defaultTcpEstablishedTimeout></connectionTrackingConfiguration><maximumNetworkInterfaces>20</maximumNetworkInterfaces><ipv4AddressesPerInterface>50</ipv4AddressesPerInterface><defaultNetworkCardIndex>0</defaultNetworkCardIndex>
<networkCards><item><networkCardIndex>0</networkCardIndex><maximumNetworkInterfaces>15</maximumNetworkInterfaces></item></networkCards></networkInfo></item></instanceTypeSet></DescribeInstanceTypesResponse>`}}})
	l, err := c.Limits(t.Context(), "z9.huge")
	if err != nil || l.ENIs != 20 || l.ENIsDefaultCard != 15 || l.IPv4PerENI != 50 || l.TCPEstablished != 350 || !l.Nitro() {
		t.Errorf("%+v, %v", l, err)
	}
	if l, err := c.Limits(t.Context(), "m5.large"); err != nil || l.ENIs != 3 {
		t.Errorf("%+v, %v", l, err)
	}
}
