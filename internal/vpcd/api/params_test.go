package api

import (
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/underlay-cni/underlay/internal/vpcd/query"
)

func TestHarmlessNamesHandlers(t *testing.T) {
	handlers := newWorld(t).api.Handlers()
	for action, params := range harmless {
		if _, ok := handlers[action]; !ok && action != "*" {
			t.Errorf("%s has no handler", action)
		}
		for p, reason := range params {
			if reason == "" {
				t.Errorf("%s %s is accepted for no reason", action, p)
			}
		}
	}
	for action := range handlers {
		if query.Actions[action] == nil {
			t.Errorf("%s is no action", action)
		}
	}
}

func TestGuard(t *testing.T) {
	ok := map[string]bool{}
	for _, p := range strings.Fields("SubnetId NetworkInterface.DeviceIndex NetworkInterface.PrivateIpAddresses EbsOptimized=false MaintenanceOptions.AutoRecovery=default DryRun") {
		ok[p] = true
	}
	g := guard{action: "RunInstances", ok: ok}
	nic := func(n query.RunInstancesNetworkInterface) query.RunInstancesRequest {
		return query.RunInstancesRequest{NetworkInterface: []query.RunInstancesNetworkInterface{{DeviceIndex: new(int64(0))}, n}}
	}
	refused, _ := g.refused(reflect.TypeFor[query.RunInstancesRequest](), "")
	for p, want := range map[string]bool{
		"SubnetId": false, "KeyName": true, "NetworkInterface": false, "NetworkInterface.PrivateIpAddresses": false, "NetworkInterface.EnaQueueCount": true,
		"EbsOptimized": false, "EbsOptimized≠false": true, "MaintenanceOptions": false, "MaintenanceOptions.AutoRecovery≠default": true, "Placement": true, "Placement.Tenancy": false,
	} {
		if got := slices.Contains(refused, p); got != want {
			t.Errorf("%s is among the refused: %v, want %v", p, got, want)
		}
	}
	for _, c := range []struct {
		req     query.RunInstancesRequest
		refused string
	}{
		{query.RunInstancesRequest{}, ""},
		{query.RunInstancesRequest{SubnetId: new("x"), DryRun: new(true)}, ""},
		{query.RunInstancesRequest{KeyName: new("x")}, "KeyName"},
		{query.RunInstancesRequest{KeyName: new("")}, "KeyName"},
		{query.RunInstancesRequest{EbsOptimized: new(false)}, ""},
		{query.RunInstancesRequest{EbsOptimized: new(true)}, "EbsOptimized"},
		{query.RunInstancesRequest{MaintenanceOptions: &query.MaintenanceOptions{AutoRecovery: new("default")}}, ""},
		{query.RunInstancesRequest{MaintenanceOptions: &query.MaintenanceOptions{AutoRecovery: new("disabled")}}, "MaintenanceOptions.AutoRecovery"},
		{nic(query.RunInstancesNetworkInterface{PrivateIpAddresses: []query.PrivateIpAddressSpecification{{Primary: new(true)}}}), ""},
		{nic(query.RunInstancesNetworkInterface{EnaQueueCount: new(int64(2))}), "NetworkInterface.EnaQueueCount"},
	} {
		err := g.check(reflect.ValueOf(c.req), "")
		if c.refused == "" {
			if err != nil {
				t.Error(err)
			}
		} else if err == nil || !strings.Contains(err.Error(), " "+c.refused+" ") || !strings.HasPrefix(err.Error(), "UnsupportedOperation") {
			t.Errorf("%v, want a refusal of %s", err, c.refused)
		}
	}
}

// FuzzHandlers sends arbitrary bodies through decoder, guard and handlers: none
// breaks a handler. Words like XeniX stand for the identifiers of objects that
// are there, which are others in each process.
func FuzzHandlers(f *testing.F) {
	w := newWorld(f)
	vpcID, subnet := w.vpc("10.0.0.0/16", "10.0.0.0/20")
	i := w.instance(subnet, "m5.large")
	e := w.eni(subnet)
	d := w.must("DescribeInstances")
	at := d.get("reservationSet.instancesSet.networkInterfaceSet.attachment.attachmentId")
	sg := d.get("reservationSet.instancesSet.groupSet.groupId")
	ids := strings.NewReplacer("XvpcX", vpcID, "XsubnetX", subnet, "XiX", i, "XeniX", e, "XattachX", at, "XsgX", sg)
	for action := range w.api.Handlers() {
		f.Add(form(action, "VpcId=XvpcX", "SubnetId=XsubnetX").Encode())
		f.Add(form(action, "InstanceId.1=XiX", "MaxResults=5", "Filter.1.Name=vpc-id", "Filter.1.Value.1=*").Encode())
		f.Add(form(action, "InstanceId=XiX", "NetworkInterfaceId=XeniX", "DeviceIndex=1", "AttachmentId=XattachX", "Attribute=groupSet").Encode())
	}
	f.Add(form("AssignPrivateIpAddresses", "NetworkInterfaceId=XeniX", "PrivateIpAddress.1=10.0.0.9", "AllowReassignment=true").Encode())
	f.Add(form("AssignPrivateIpAddresses", "NetworkInterfaceId=XeniX", "Ipv4Prefix.1=10.0.0.16/28").Encode())
	f.Add(form("UnassignPrivateIpAddresses", "NetworkInterfaceId=XeniX", "Ipv4Prefix.1=10.0.0.16/28").Encode())
	f.Add(form("CreateNetworkInterface", "SubnetId=XsubnetX", "PrivateIpAddresses.1.PrivateIpAddress=10.0.0.77", "PrivateIpAddresses.1.Primary=true", "SecurityGroupId.1=XsgX", "ClientToken=x").Encode())
	f.Add(form("RunInstances", image, "InstanceType=m5.large", "MinCount=1", "MaxCount=1", "NetworkInterface.1.DeviceIndex=0", "NetworkInterface.1.SubnetId=XsubnetX", "NetworkInterface.1.Ipv4PrefixCount=1").Encode())
	f.Add(form("AuthorizeSecurityGroupIngress", "GroupId=XsgX", "IpPermissions.1.IpProtocol=tcp", "IpPermissions.1.FromPort=1", "IpPermissions.1.ToPort=2", "IpPermissions.1.IpRanges.1.CidrIp=10.0.0.0/8").Encode())
	f.Add(form("CreateTags", "ResourceId.1=XeniX", "Tag.1.Key=a", "Tag.1.Value=b").Encode())
	f.Add(form("CreateSubnet", "VpcId=XvpcX", "CidrBlock=10.0.16.0/24").Encode())
	f.Add(form("DescribeTags", "NextToken=AAAA", "MaxResults=5").Encode())
	f.Fuzz(func(t *testing.T, body string) {
		if err := w.api.Settle(); err != nil {
			t.Fatal(err)
		}
		r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(ids.Replace(body)))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		r.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=AKID/20261122/us-east-1/ec2/aws4_request, SignedHeaders=host, Signature=00")
		rec := httptest.NewRecorder()
		w.server.ServeHTTP(rec, r)
		if rec.Code >= 500 {
			t.Errorf("%s: %d %s", body, rec.Code, rec.Body)
		}
	})
}
