package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/smithy-go"

	"github.com/underlay-cni/underlay/internal/testenv"
	"github.com/underlay-cni/underlay/internal/vpcd/api"
	"github.com/underlay-cni/underlay/internal/vpcd/chaos"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
	"github.com/underlay-cni/underlay/test/lab"
)

// actionKey finds the action of a request on its way through the proxy.
type actionKey struct{}

// vpcdAlone is a `vpcd serve --no-fabric` behind a proxy that notes which
// actions it has answered with success.
type vpcdAlone struct {
	URL string

	mu   sync.Mutex
	done map[string]bool
}

func startVPCD(t *testing.T) *vpcdAlone {
	t.Helper()
	listen := lab.FreeAddress(t)
	var log bytes.Buffer
	cmd := exec.Command(filepath.Join(lab.Bin, "vpcd"), "serve", "--no-fabric", "--dir", t.TempDir(), "--listen", listen)
	cmd.Stderr = &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("vpcd: %v", err)
		}
		if t.Failed() {
			t.Logf("vpcd's log:\n%s", log.String())
		}
	})
	lab.Eventually(t, 20*time.Second, "vpcd serves", func() error {
		r, err := http.Get("http://" + listen + "/_vpcd/health")
		if err != nil {
			return err
		}
		defer r.Body.Close()
		if r.StatusCode != http.StatusOK {
			return fmt.Errorf("health answers %s", r.Status)
		}
		return nil
	})
	v := &vpcdAlone{done: map[string]bool{}}
	target, err := url.Parse("http://" + listen)
	if err != nil {
		t.Fatal(err)
	}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			body, err := io.ReadAll(r.In.Body)
			if err == nil {
				r.Out.Body = io.NopCloser(bytes.NewReader(body))
				form, _ := url.ParseQuery(string(body)) // vpcd says what is wrong with it
				r.Out = r.Out.WithContext(context.WithValue(r.Out.Context(), actionKey{}, form.Get("Action")))
			}
			r.SetURL(target)
		},
		ModifyResponse: func(r *http.Response) error {
			if action, _ := r.Request.Context().Value(actionKey{}).(string); r.StatusCode == http.StatusOK {
				v.mu.Lock()
				defer v.mu.Unlock()
				v.done[action] = true
			}
			return nil
		},
	}
	s := httptest.NewServer(proxy)
	t.Cleanup(s.Close)
	v.URL = s.URL
	return v
}

// newer are the actions that packaged versions of the AWS CLI and boto3 do not
// know yet (2.9 and 1.26 do not). The Go SDK drives them.
var newer = []string{
	"GetSecurityGroupsForVpc",
	"AssociateSecurityGroupVpc", "DisassociateSecurityGroupVpc", "DescribeSecurityGroupVpcAssociations", "DescribeVpcBlockPublicAccessOptions",
	"AssociateNatGatewayAddress", "DisassociateNatGatewayAddress", "AssignPrivateNatGatewayAddress", "UnassignPrivateNatGatewayAddress",
}

// complete fails the test for each action with a handler that no client drove
// to success, but for those that the client does not know.
func (v *vpcdAlone) complete(t *testing.T, unknown ...string) {
	t.Helper()
	s, err := store.Open(filepath.Join(t.TempDir(), "state.db"), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, action := range slices.Sorted(maps.Keys(api.New(api.Options{Store: s, Chaos: chaos.New(nil)}).Handlers())) {
		if !v.done[action] && !slices.Contains(unknown, action) {
			t.Errorf("%s was not driven", action)
		}
	}
}

// TestBoto3DrivesEveryHandler runs testdata/clients.py, networks.py and ipv6.py.
func TestBoto3DrivesEveryHandler(t *testing.T) {
	testenv.Require(t, "boto3")
	t.Parallel()
	v := startVPCD(t)
	for _, script := range []string{"clients.py", "networks.py", "ipv6.py"} {
		cmd := exec.Command(testenv.Tool("python3"), "-B", "testdata/"+script, v.URL)
		cmd.Env = append(os.Environ(), "AWS_EC2_METADATA_DISABLED=true")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", script, err, out)
		}
	}
	v.complete(t, newer...)
}

// cli is the AWS CLI against one vpcd.
type cli struct {
	t   *testing.T
	url string
}

// run runs `aws ec2` with the words of line, and returns its exit code.
func (c cli) run(line string) (stdout, stderr string, code int) {
	c.t.Helper()
	return c.runAs("AKIDTEST", line)
}

// runAs is run with an access key.
func (c cli) runAs(key, line string) (stdout, stderr string, code int) {
	c.t.Helper()
	cmd := exec.Command(testenv.Tool("aws"), append([]string{"--endpoint-url", c.url, "ec2"}, strings.Fields(line)...)...)
	cmd.Env = append(os.Environ(), "AWS_ACCESS_KEY_ID="+key, "AWS_SECRET_ACCESS_KEY=secret", "AWS_DEFAULT_REGION=us-east-1",
		"AWS_EC2_METADATA_DISABLED=true", "AWS_PAGER=", "AWS_MAX_ATTEMPTS=1", "AWS_CONFIG_FILE=/dev/null", "AWS_SHARED_CREDENTIALS_FILE=/dev/null")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		c.t.Fatal(err)
	}
	return strings.TrimSpace(out.String()), errs.String(), cmd.ProcessState.ExitCode()
}

// must runs a command that succeeds and returns what it prints of --query, as
// words.
func (c cli) must(line, query string) string {
	c.t.Helper()
	if query != "" {
		line += " --output text --query " + query
	}
	out, errs, code := c.run(line)
	if code != 0 {
		c.t.Fatalf("aws ec2 %s: exit %d\n%s%s", line, code, out, errs)
	}
	return strings.Join(strings.Fields(out), " ")
}

func (c cli) want(want, line, query string) {
	c.t.Helper()
	if got := c.must(line, query); got != want {
		c.t.Errorf("aws ec2 %s: %s is %q, want %q", line, query, got, want)
	}
}

func (c cli) refused(code, line string) {
	c.t.Helper()
	if _, errs, exit := c.run(line); exit == 0 || !strings.Contains(errs, "("+code+")") {
		c.t.Errorf("aws ec2 %s: exit %d %s, want %s", line, exit, errs, code)
	}
}

// TestAWSCLIDrivesEveryHandler types what a person would: two at once, as each
// command takes a second of Python.
func TestAWSCLIDrivesEveryHandler(t *testing.T) {
	testenv.Require(t, "aws")
	t.Parallel()
	v := startVPCD(t)
	settings, err := http.NewRequestWithContext(t.Context(), http.MethodPut, v.URL+"/_vpcd/chaos", strings.NewReader(`{"quotas":{"vpcs":20}}`))
	if err != nil {
		t.Fatal(err)
	}
	if r, err := http.DefaultClient.Do(settings); err != nil || r.StatusCode != http.StatusOK {
		t.Fatalf("more VPCs at a time: %v %v", r, err)
	} else if err := r.Body.Close(); err != nil {
		t.Fatal(err)
	}
	t.Run("by two", func(t *testing.T) {
		t.Run("networks", func(t *testing.T) { t.Parallel(); cliNetworks(cli{t, v.URL}) })
		t.Run("instances", func(t *testing.T) { t.Parallel(); cliInstances(cli{t, v.URL}) })
		t.Run("groups", func(t *testing.T) { t.Parallel(); cliGroups(cli{t, v.URL}) })
		t.Run("gateways", func(t *testing.T) { t.Parallel(); cliGateways(cli{t, v.URL}) })
		t.Run("peerings", func(t *testing.T) { t.Parallel(); cliPeerings(cli{t, v.URL}) })
		t.Run("routing", func(t *testing.T) { t.Parallel(); cliRouting(cli{t, v.URL}) })
		t.Run("ipv6", func(t *testing.T) { t.Parallel(); cliIPv6(cli{t, v.URL}) })
	})
	v.complete(t, newer...)
}

func cliNetworks(c cli) {
	c.want("us-east-1", "describe-regions", "Regions[].RegionName")
	c.want("us-east-1a us-east-1b us-east-1c", "describe-availability-zones", "AvailabilityZones[].ZoneName")
	c.must("describe-account-attributes", "")
	c.want("3", "describe-instance-types --instance-types m5.large", "InstanceTypes[].NetworkInfo.MaximumNetworkInterfaces")
	c.want("us-east-1", "describe-instance-type-offerings --filters Name=instance-type,Values=m5.large", "InstanceTypeOfferings[].Location")

	vpc := c.must("create-vpc --cidr-block 10.0.0.0/16 --tag-specifications ResourceType=vpc,Tags=[{Key=Name,Value=cli}]", "Vpc.VpcId")
	c.must("wait vpc-available --vpc-ids "+vpc, "")
	c.want(vpc, "describe-vpcs --filters Name=tag:Name,Values=cl*", "Vpcs[].VpcId")
	c.must("modify-vpc-attribute --enable-dns-hostnames --vpc-id "+vpc, "")
	c.want("True", "describe-vpc-attribute --attribute enableDnsHostnames --vpc-id "+vpc, "EnableDnsHostnames.Value")
	block := c.must("associate-vpc-cidr-block --cidr-block 10.1.0.0/16 --vpc-id "+vpc, "CidrBlockAssociation.AssociationId")
	c.must("disassociate-vpc-cidr-block --association-id "+block, "")
	subnet := c.must("create-subnet --cidr-block 10.0.0.0/24 --availability-zone us-east-1a --vpc-id "+vpc, "Subnet.SubnetId")
	c.must("wait subnet-available --subnet-ids "+subnet, "")
	c.must("modify-subnet-attribute --no-map-public-ip-on-launch --subnet-id "+subnet, "")
	c.want("251", "describe-subnets --subnet-ids "+subnet, "Subnets[].AvailableIpAddressCount")
	kept := c.must("create-subnet-cidr-reservation --reservation-type prefix --cidr 10.0.0.64/26 --subnet-id "+subnet, "SubnetCidrReservation.SubnetCidrReservationId")
	c.want("10.0.0.64/26 prefix", "get-subnet-cidr-reservations --subnet-id "+subnet, "SubnetIpv4CidrReservations[].[Cidr,ReservationType][]")
	c.want("187", "describe-subnets --subnet-ids "+subnet, "Subnets[].AvailableIpAddressCount")
	c.want(kept, "delete-subnet-cidr-reservation --subnet-cidr-reservation-id "+kept, "DeletedSubnetCidrReservation.SubnetCidrReservationId")

	sg := c.must("create-security-group --group-name web --description web --vpc-id "+vpc, "GroupId")
	c.must("wait security-group-exists --group-ids "+sg, "")
	rule := c.must("authorize-security-group-ingress --protocol tcp --port 80 --cidr 10.0.0.0/16 --group-id "+sg, "SecurityGroupRules[].SecurityGroupRuleId")
	c.must("authorize-security-group-ingress --protocol tcp --port 443 --source-group "+sg+" --group-id "+sg, "")
	c.must("authorize-security-group-egress --protocol udp --port 53 --cidr 0.0.0.0/0 --group-id "+sg, "")
	c.want("80", "describe-security-group-rules --security-group-rule-ids "+rule, "SecurityGroupRules[].ToPort")
	c.must("revoke-security-group-ingress --group-id "+sg+" --security-group-rule-ids "+rule, "")
	c.must("revoke-security-group-egress --protocol -1 --cidr 0.0.0.0/0 --group-id "+sg, "")
	c.want("443 udp", "describe-security-groups --group-ids "+sg, "SecurityGroups[].[IpPermissions[0].ToPort,IpPermissionsEgress[0].IpProtocol][]")

	c.must("create-tags --tags Key=k,Value=v --resources "+subnet, "")
	c.want("subnet", "describe-tags --filters Name=key,Values=k", "Tags[].ResourceType")
	c.must("delete-tags --tags Key=k --resources "+subnet, "")

	c.refused("DryRunOperation", "delete-vpc --dry-run --vpc-id "+vpc)
	c.refused("DependencyViolation", "delete-vpc --vpc-id "+vpc)
	c.must("delete-security-group --group-id "+sg, "")
	c.must("delete-subnet --subnet-id "+subnet, "")
	c.must("delete-vpc --vpc-id "+vpc, "")
}

func cliInstances(c cli) {
	vpc := c.must("create-vpc --cidr-block 10.0.0.0/16", "Vpc.VpcId")
	subnet := c.must("create-subnet --cidr-block 10.0.0.0/24 --availability-zone us-east-1a --vpc-id "+vpc, "Subnet.SubnetId")
	instance := c.must("run-instances --image-id ami-0123456789abcdef0 --instance-type m5.large --key-name k --metadata-options HttpTokens=required,HttpPutResponseHopLimit=2"+
		" --network-interfaces DeviceIndex=0,SubnetId="+subnet+",SecondaryPrivateIpAddressCount=2", "Instances[].InstanceId")
	c.must("wait instance-running --instance-ids "+instance, "")
	c.must("wait instance-status-ok --instance-ids "+instance, "")
	c.want("ok", "describe-instance-status --instance-ids "+instance, "InstanceStatuses[].InstanceStatus.Status")
	c.want("10.0.0.4 10.0.0.5 10.0.0.6", "describe-instances --filters Name=instance-state-name,Values=running", "Reservations[].Instances[].NetworkInterfaces[].PrivateIpAddresses[].PrivateIpAddress")
	c.want("m5.large", "describe-instance-attribute --attribute instanceType --instance-id "+instance, "InstanceType.Value")
	c.must("modify-instance-attribute --no-source-dest-check --instance-id "+instance, "")
	c.want("3", "modify-instance-metadata-options --http-put-response-hop-limit 3 --instance-id "+instance, "InstanceMetadataOptions.HttpPutResponseHopLimit")

	eni := c.must("create-network-interface --description pods --ipv4-prefix-count 1 --subnet-id "+subnet, "NetworkInterface.NetworkInterfaceId")
	c.must("wait network-interface-available --network-interface-ids "+eni, "")
	at := c.must("attach-network-interface --device-index 1 --instance-id "+instance+" --network-interface-id "+eni, "AttachmentId")
	lab.Eventually(c.t, 20*time.Second, "the interface is attached", func() error {
		if s := c.must("describe-network-interfaces --network-interface-ids "+eni, "NetworkInterfaces[].Attachment.Status"); s != "attached" {
			return errors.New(s)
		}
		return nil
	})
	c.must("modify-network-interface-attribute --attachment AttachmentId="+at+",DeleteOnTermination=true --network-interface-id "+eni, "")
	c.must("modify-network-interface-attribute --no-source-dest-check --network-interface-id "+eni, "")
	c.want("False", "describe-network-interface-attribute --attribute sourceDestCheck --network-interface-id "+eni, "SourceDestCheck.Value")
	c.want("10.0.0.8 10.0.0.9", "assign-private-ip-addresses --secondary-private-ip-address-count 2 --network-interface-id "+eni, "AssignedPrivateIpAddresses[].PrivateIpAddress")
	c.want("10.0.0.32/28", "assign-private-ip-addresses --ipv4-prefix-count 1 --network-interface-id "+eni, "AssignedIpv4Prefixes[].Ipv4Prefix")
	c.must("unassign-private-ip-addresses --private-ip-addresses 10.0.0.8 --network-interface-id "+eni, "")
	c.must("unassign-private-ip-addresses --ipv4-prefixes 10.0.0.16/28 --network-interface-id "+eni, "")
	c.want("10.0.0.7 10.0.0.9 10.0.0.32/28", "describe-network-interfaces --page-size 5 --filters Name=description,Values=pods",
		"NetworkInterfaces[].[PrivateIpAddresses[].PrivateIpAddress,Ipv4Prefixes[].Ipv4Prefix][][]")
	c.refused("InvalidNetworkInterfaceID.NotFound", "describe-network-interfaces --network-interface-ids eni-00000000000000000")

	c.must("detach-network-interface --attachment-id "+at, "")
	c.must("wait network-interface-available --network-interface-ids "+eni, "")
	c.must("delete-network-interface --network-interface-id "+eni, "")
	c.want("stopping", "stop-instances --force --instance-ids "+instance, "StoppingInstances[].CurrentState.Name")
	c.must("wait instance-stopped --instance-ids "+instance, "")
	c.refused("IncorrectInstanceState", "reboot-instances --instance-ids "+instance)
	c.want("pending", "start-instances --instance-ids "+instance, "StartingInstances[].CurrentState.Name")
	c.must("wait instance-running --instance-ids "+instance, "")
	c.must("reboot-instances --instance-ids "+instance, "")
	c.want("shutting-down", "terminate-instances --instance-ids "+instance, "TerminatingInstances[].CurrentState.Name")
	c.must("wait instance-terminated --instance-ids "+instance, "")
	c.must("delete-subnet --subnet-id "+subnet, "")
	c.must("delete-vpc --vpc-id "+vpc, "")
}

// sdk returns a client of aws-sdk-go-v2 as a program would make it.
func sdk(url string) *ec2.Client {
	return ec2.New(ec2.Options{
		BaseEndpoint: aws.String(url), Region: "us-east-1",
		Credentials: credentials.NewStaticCredentialsProvider("AKIDTEST", "secret", ""),
	})
}

// ok returns the answer of a call that succeeds.
func ok[T any](t *testing.T) func(T, error) T {
	t.Helper()
	return func(out T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
}

func equal[T comparable](t *testing.T, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("got %v, want %v", got, want)
	}
}

func refused(t *testing.T, code string, err error) {
	t.Helper()
	var e smithy.APIError
	if !errors.As(err, &e) || e.ErrorCode() != code {
		t.Errorf("got %v, want %s", err, code)
	}
}

const sdkWait = 20 * time.Second

// TestGoSDKDrivesEveryHandler is the way of the agent.
func TestGoSDKDrivesEveryHandler(t *testing.T) {
	t.Parallel()
	v := startVPCD(t)
	c := sdk(v.URL)
	ctx := t.Context()
	s := aws.String

	equal(t, len(ok[*ec2.DescribeRegionsOutput](t)(c.DescribeRegions(ctx, &ec2.DescribeRegionsInput{})).Regions), 1)
	equal(t, len(ok[*ec2.DescribeAvailabilityZonesOutput](t)(c.DescribeAvailabilityZones(ctx, &ec2.DescribeAvailabilityZonesInput{})).AvailabilityZones), 3)
	ok[*ec2.DescribeAccountAttributesOutput](t)(c.DescribeAccountAttributes(ctx, &ec2.DescribeAccountAttributesInput{}))

	vpc := ok[*ec2.CreateVpcOutput](t)(c.CreateVpc(ctx, &ec2.CreateVpcInput{CidrBlock: s("10.0.0.0/16")})).Vpc.VpcId
	if err := ec2.NewVpcAvailableWaiter(c).Wait(ctx, &ec2.DescribeVpcsInput{VpcIds: []string{*vpc}}, sdkWait); err != nil {
		t.Fatal(err)
	}
	ok[*ec2.ModifyVpcAttributeOutput](t)(c.ModifyVpcAttribute(ctx, &ec2.ModifyVpcAttributeInput{VpcId: vpc, EnableDnsHostnames: &types.AttributeBooleanValue{Value: aws.Bool(true)}}))
	attr := ok[*ec2.DescribeVpcAttributeOutput](t)(c.DescribeVpcAttribute(ctx, &ec2.DescribeVpcAttributeInput{VpcId: vpc, Attribute: types.VpcAttributeNameEnableDnsHostnames}))
	equal(t, *attr.EnableDnsHostnames.Value, true)
	block := ok[*ec2.AssociateVpcCidrBlockOutput](t)(c.AssociateVpcCidrBlock(ctx, &ec2.AssociateVpcCidrBlockInput{VpcId: vpc, CidrBlock: s("10.1.0.0/16")}))
	ok[*ec2.DisassociateVpcCidrBlockOutput](t)(c.DisassociateVpcCidrBlock(ctx, &ec2.DisassociateVpcCidrBlockInput{AssociationId: block.CidrBlockAssociation.AssociationId}))

	var subnets []string
	for i := range 7 {
		n := ok[*ec2.CreateSubnetOutput](t)(c.CreateSubnet(ctx, &ec2.CreateSubnetInput{VpcId: vpc, CidrBlock: s(fmt.Sprintf("10.0.%d.0/24", i)), AvailabilityZone: s("us-east-1a")}))
		subnets = append(subnets, *n.Subnet.SubnetId)
	}
	if err := ec2.NewSubnetAvailableWaiter(c).Wait(ctx, &ec2.DescribeSubnetsInput{SubnetIds: subnets}, sdkWait); err != nil {
		t.Fatal(err)
	}
	pages, seen := 0, 0
	for p := ec2.NewDescribeSubnetsPaginator(c, &ec2.DescribeSubnetsInput{MaxResults: aws.Int32(5)}); p.HasMorePages(); pages++ {
		seen += len(ok[*ec2.DescribeSubnetsOutput](t)(p.NextPage(ctx)).Subnets)
	}
	equal(t, fmt.Sprint(pages, seen), "2 7")
	ok[*ec2.ModifySubnetAttributeOutput](t)(c.ModifySubnetAttribute(ctx, &ec2.ModifySubnetAttributeInput{SubnetId: &subnets[0], PrivateDnsHostnameTypeOnLaunch: types.HostnameTypeIpName}))

	kept := ok[*ec2.CreateSubnetCidrReservationOutput](t)(c.CreateSubnetCidrReservation(ctx, &ec2.CreateSubnetCidrReservationInput{
		SubnetId: &subnets[0], Cidr: s("10.0.0.192/26"), ReservationType: types.SubnetCidrReservationTypePrefix})).SubnetCidrReservation
	reserved := ok[*ec2.GetSubnetCidrReservationsOutput](t)(c.GetSubnetCidrReservations(ctx, &ec2.GetSubnetCidrReservationsInput{SubnetId: &subnets[0], MaxResults: aws.Int32(5)}))
	equal(t, *reserved.SubnetIpv4CidrReservations[0].Cidr, "10.0.0.192/26")
	ok[*ec2.DeleteSubnetCidrReservationOutput](t)(c.DeleteSubnetCidrReservation(ctx, &ec2.DeleteSubnetCidrReservationInput{SubnetCidrReservationId: kept.SubnetCidrReservationId}))

	sg := ok[*ec2.CreateSecurityGroupOutput](t)(c.CreateSecurityGroup(ctx, &ec2.CreateSecurityGroupInput{GroupName: s("app"), Description: s("app"), VpcId: vpc})).GroupId
	tcp := []types.IpPermission{{IpProtocol: s("tcp"), FromPort: aws.Int32(80), ToPort: aws.Int32(80), IpRanges: []types.IpRange{{CidrIp: s("10.0.0.0/16")}}}}
	all := []types.IpPermission{{IpProtocol: s("-1"), UserIdGroupPairs: []types.UserIdGroupPair{{GroupId: sg}}}}
	ok[*ec2.AuthorizeSecurityGroupIngressOutput](t)(c.AuthorizeSecurityGroupIngress(ctx, &ec2.AuthorizeSecurityGroupIngressInput{GroupId: sg, IpPermissions: tcp}))
	egress := ok[*ec2.AuthorizeSecurityGroupEgressOutput](t)(c.AuthorizeSecurityGroupEgress(ctx, &ec2.AuthorizeSecurityGroupEgressInput{GroupId: sg, IpPermissions: all}))
	rules := ok[*ec2.DescribeSecurityGroupRulesOutput](t)(c.DescribeSecurityGroupRules(ctx, &ec2.DescribeSecurityGroupRulesInput{SecurityGroupRuleIds: []string{*egress.SecurityGroupRules[0].SecurityGroupRuleId}}))
	equal(t, *rules.SecurityGroupRules[0].ReferencedGroupInfo.GroupId, *sg)
	ok[*ec2.RevokeSecurityGroupIngressOutput](t)(c.RevokeSecurityGroupIngress(ctx, &ec2.RevokeSecurityGroupIngressInput{GroupId: sg, IpPermissions: tcp}))
	ok[*ec2.RevokeSecurityGroupEgressOutput](t)(c.RevokeSecurityGroupEgress(ctx, &ec2.RevokeSecurityGroupEgressInput{GroupId: sg, IpPermissions: all}))
	_, err := c.RevokeSecurityGroupEgress(ctx, &ec2.RevokeSecurityGroupEgressInput{GroupId: sg, IpPermissions: all})
	refused(t, "InvalidPermission.NotFound", err)
	groups := ok[*ec2.DescribeSecurityGroupsOutput](t)(c.DescribeSecurityGroups(ctx, &ec2.DescribeSecurityGroupsInput{Filters: []types.Filter{{Name: s("group-name"), Values: []string{"app"}}}}))
	equal(t, len(groups.SecurityGroups), 1)

	info := ok[*ec2.DescribeInstanceTypesOutput](t)(c.DescribeInstanceTypes(ctx, &ec2.DescribeInstanceTypesInput{InstanceTypes: []types.InstanceType{types.InstanceTypeM5Large}})).InstanceTypes[0]
	equal(t, *info.NetworkInfo.Ipv4AddressesPerInterface, 10)
	equal(t, info.Hypervisor, types.InstanceTypeHypervisorNitro)
	kinds := 0
	for p := ec2.NewDescribeInstanceTypesPaginator(c, &ec2.DescribeInstanceTypesInput{MaxResults: aws.Int32(100)}); p.HasMorePages(); {
		kinds += len(ok[*ec2.DescribeInstanceTypesOutput](t)(p.NextPage(ctx)).InstanceTypes)
	}
	if kinds < 1000 {
		t.Errorf("%d instance types", kinds)
	}
	offers := ok[*ec2.DescribeInstanceTypeOfferingsOutput](t)(c.DescribeInstanceTypeOfferings(ctx, &ec2.DescribeInstanceTypeOfferingsInput{Filters: []types.Filter{{Name: s("instance-type"), Values: []string{"m5.large"}}}}))
	equal(t, len(offers.InstanceTypeOfferings), 1)

	run := ok[*ec2.RunInstancesOutput](t)(c.RunInstances(ctx, &ec2.RunInstancesInput{
		ImageId: s("ami-0123456789abcdef0"), InstanceType: types.InstanceTypeM5Large, MinCount: aws.Int32(1), MaxCount: aws.Int32(1),
		NetworkInterfaces: []types.InstanceNetworkInterfaceSpecification{
			{DeviceIndex: aws.Int32(0), SubnetId: &subnets[0], Groups: []string{*sg}},
			{DeviceIndex: aws.Int32(1), SubnetId: &subnets[0], Ipv4PrefixCount: aws.Int32(1)},
		},
		TagSpecifications: []types.TagSpecification{{ResourceType: types.ResourceTypeInstance, Tags: []types.Tag{{Key: s("Name"), Value: s("node")}}}},
	}))
	instance := *run.Instances[0].InstanceId
	byID := &ec2.DescribeInstancesInput{InstanceIds: []string{instance}}
	i, err := ec2.NewInstanceRunningWaiter(c, func(o *ec2.InstanceRunningWaiterOptions) { o.MinDelay, o.MaxDelay = time.Second/10, time.Second }).WaitForOutput(ctx, byID, sdkWait)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, len(i.Reservations[0].Instances[0].NetworkInterfaces), 2)
	equal(t, *i.Reservations[0].Instances[0].NetworkInterfaces[1].Ipv4Prefixes[0].Ipv4Prefix, "10.0.0.16/28")
	equal(t, len(ok[*ec2.DescribeInstanceStatusOutput](t)(c.DescribeInstanceStatus(ctx, &ec2.DescribeInstanceStatusInput{InstanceIds: []string{instance}})).InstanceStatuses), 1)
	ia := ok[*ec2.DescribeInstanceAttributeOutput](t)(c.DescribeInstanceAttribute(ctx, &ec2.DescribeInstanceAttributeInput{InstanceId: &instance, Attribute: types.InstanceAttributeNameInstanceType}))
	equal(t, *ia.InstanceType.Value, "m5.large")
	ok[*ec2.ModifyInstanceAttributeOutput](t)(c.ModifyInstanceAttribute(ctx, &ec2.ModifyInstanceAttributeInput{InstanceId: &instance, Groups: []string{*sg}}))
	ok[*ec2.ModifyInstanceMetadataOptionsOutput](t)(c.ModifyInstanceMetadataOptions(ctx, &ec2.ModifyInstanceMetadataOptionsInput{InstanceId: &instance, HttpTokens: types.HttpTokensStateRequired}))

	made := ok[*ec2.CreateNetworkInterfaceOutput](t)(c.CreateNetworkInterface(ctx, &ec2.CreateNetworkInterfaceInput{
		SubnetId: &subnets[0], Groups: []string{*sg}, Description: s("pods"),
		TagSpecifications: []types.TagSpecification{{ResourceType: types.ResourceTypeNetworkInterface, Tags: []types.Tag{{Key: s("cluster"), Value: s("go")}}}},
	}))
	eni := made.NetworkInterface.NetworkInterfaceId
	available := func() {
		t.Helper()
		w := ec2.NewNetworkInterfaceAvailableWaiter(c, func(o *ec2.NetworkInterfaceAvailableWaiterOptions) {
			o.MinDelay, o.MaxDelay = time.Second/10, time.Second
		})
		if err := w.Wait(ctx, &ec2.DescribeNetworkInterfacesInput{NetworkInterfaceIds: []string{*eni}}, sdkWait); err != nil {
			t.Fatal(err)
		}
	}
	available()
	at := ok[*ec2.AttachNetworkInterfaceOutput](t)(c.AttachNetworkInterface(ctx, &ec2.AttachNetworkInterfaceInput{NetworkInterfaceId: eni, InstanceId: &instance, DeviceIndex: aws.Int32(2)})).AttachmentId
	ok[*ec2.ModifyNetworkInterfaceAttributeOutput](t)(c.ModifyNetworkInterfaceAttribute(ctx, &ec2.ModifyNetworkInterfaceAttributeInput{
		NetworkInterfaceId: eni, Attachment: &types.NetworkInterfaceAttachmentChanges{AttachmentId: at, DeleteOnTermination: aws.Bool(true)},
	}))
	ea := ok[*ec2.DescribeNetworkInterfaceAttributeOutput](t)(c.DescribeNetworkInterfaceAttribute(ctx, &ec2.DescribeNetworkInterfaceAttributeInput{NetworkInterfaceId: eni, Attribute: types.NetworkInterfaceAttributeAttachment}))
	equal(t, *ea.Attachment.DeleteOnTermination, true)
	assigned := ok[*ec2.AssignPrivateIpAddressesOutput](t)(c.AssignPrivateIpAddresses(ctx, &ec2.AssignPrivateIpAddressesInput{NetworkInterfaceId: eni, SecondaryPrivateIpAddressCount: aws.Int32(9)}))
	equal(t, len(assigned.AssignedPrivateIpAddresses), 9)
	_, err = c.AssignPrivateIpAddresses(ctx, &ec2.AssignPrivateIpAddressesInput{NetworkInterfaceId: eni, Ipv4PrefixCount: aws.Int32(1)})
	refused(t, "PrivateIpAddressLimitExceeded", err)
	ok[*ec2.UnassignPrivateIpAddressesOutput](t)(c.UnassignPrivateIpAddresses(ctx, &ec2.UnassignPrivateIpAddressesInput{NetworkInterfaceId: eni, PrivateIpAddresses: []string{*assigned.AssignedPrivateIpAddresses[0].PrivateIpAddress}}))
	for p := ec2.NewDescribeNetworkInterfacesPaginator(c, &ec2.DescribeNetworkInterfacesInput{Filters: []types.Filter{{Name: s("attachment.instance-id"), Values: []string{instance}}}}); p.HasMorePages(); {
		equal(t, len(ok[*ec2.DescribeNetworkInterfacesOutput](t)(p.NextPage(ctx)).NetworkInterfaces), 3)
	}

	ok[*ec2.CreateTagsOutput](t)(c.CreateTags(ctx, &ec2.CreateTagsInput{Resources: []string{*eni}, Tags: []types.Tag{{Key: s("k"), Value: s("v")}}}))
	tags := ok[*ec2.DescribeTagsOutput](t)(c.DescribeTags(ctx, &ec2.DescribeTagsInput{Filters: []types.Filter{{Name: s("key"), Values: []string{"k"}}}}))
	equal(t, tags.Tags[0].ResourceType, types.ResourceTypeNetworkInterface)
	ok[*ec2.DeleteTagsOutput](t)(c.DeleteTags(ctx, &ec2.DeleteTagsInput{Resources: []string{*eni}, Tags: []types.Tag{{Key: s("k")}}}))

	_, err = c.DescribeNetworkInterfaces(ctx, &ec2.DescribeNetworkInterfacesInput{NetworkInterfaceIds: []string{"eni-00000000000000000"}})
	refused(t, "InvalidNetworkInterfaceID.NotFound", err)
	_, err = c.DeleteVpc(ctx, &ec2.DeleteVpcInput{VpcId: vpc, DryRun: aws.Bool(true)})
	refused(t, "DryRunOperation", err)

	ok[*ec2.DetachNetworkInterfaceOutput](t)(c.DetachNetworkInterface(ctx, &ec2.DetachNetworkInterfaceInput{AttachmentId: at}))
	available()
	ok[*ec2.DeleteNetworkInterfaceOutput](t)(c.DeleteNetworkInterface(ctx, &ec2.DeleteNetworkInterfaceInput{NetworkInterfaceId: eni}))
	stop := ok[*ec2.StopInstancesOutput](t)(c.StopInstances(ctx, &ec2.StopInstancesInput{InstanceIds: []string{instance}}))
	equal(t, stop.StoppingInstances[0].CurrentState.Name, types.InstanceStateNameStopping)
	if err := ec2.NewInstanceStoppedWaiter(c, func(o *ec2.InstanceStoppedWaiterOptions) { o.MinDelay, o.MaxDelay = time.Second/10, time.Second }).Wait(ctx, byID, sdkWait); err != nil {
		t.Fatal(err)
	}
	ok[*ec2.StartInstancesOutput](t)(c.StartInstances(ctx, &ec2.StartInstancesInput{InstanceIds: []string{instance}}))
	if err := ec2.NewInstanceRunningWaiter(c, func(o *ec2.InstanceRunningWaiterOptions) { o.MinDelay, o.MaxDelay = time.Second/10, time.Second }).Wait(ctx, byID, sdkWait); err != nil {
		t.Fatal(err)
	}
	ok[*ec2.RebootInstancesOutput](t)(c.RebootInstances(ctx, &ec2.RebootInstancesInput{InstanceIds: []string{instance}}))
	ok[*ec2.TerminateInstancesOutput](t)(c.TerminateInstances(ctx, &ec2.TerminateInstancesInput{InstanceIds: []string{instance}}))
	if err := ec2.NewInstanceTerminatedWaiter(c, func(o *ec2.InstanceTerminatedWaiterOptions) { o.MinDelay, o.MaxDelay = time.Second/10, time.Second }).Wait(ctx, byID, sdkWait); err != nil {
		t.Fatal(err)
	}
	ok[*ec2.DeleteSecurityGroupOutput](t)(c.DeleteSecurityGroup(ctx, &ec2.DeleteSecurityGroupInput{GroupId: sg}))
	for _, n := range subnets {
		ok[*ec2.DeleteSubnetOutput](t)(c.DeleteSubnet(ctx, &ec2.DeleteSubnetInput{SubnetId: &n}))
	}
	ok[*ec2.DeleteVpcOutput](t)(c.DeleteVpc(ctx, &ec2.DeleteVpcInput{VpcId: vpc}))
	sdkRouting(t, c)
	sdkGroups(t, c)
	sdkGateways(t, c)
	sdkIPv6(t, c)
	v.complete(t)
}

// TestVPCDKilledLosesNoAcknowledgedCall kills vpcd in a storm of calls and asks
// the next one for all that was acknowledged.
func TestVPCDKilledLosesNoAcknowledgedCall(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	listen := lab.FreeAddress(t)
	start := func() *exec.Cmd {
		cmd := exec.Command(filepath.Join(lab.Bin, "vpcd"), "serve", "--no-fabric", "--dir", dir, "--listen", listen)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		lab.Eventually(t, 20*time.Second, "vpcd serves", func() error {
			r, err := http.Get("http://" + listen + "/_vpcd/health")
			if err == nil {
				err = json.NewDecoder(r.Body).Decode(new(map[string]any))
				_ = r.Body.Close()
			}
			return err
		})
		return cmd
	}
	c := sdk("http://" + listen)
	ctx := t.Context()
	vpcd := start()
	vpc := ok[*ec2.CreateVpcOutput](t)(c.CreateVpc(ctx, &ec2.CreateVpcInput{CidrBlock: aws.String("10.0.0.0/16")})).Vpc.VpcId
	subnet := ok[*ec2.CreateSubnetOutput](t)(c.CreateSubnet(ctx, &ec2.CreateSubnetInput{VpcId: vpc, CidrBlock: aws.String("10.0.0.0/16")})).Subnet.SubnetId
	for round := range 3 {
		type made struct{ id, addr string }
		acked := make(chan made, 1<<16)
		var writers sync.WaitGroup
		for range 4 {
			writers.Go(func() {
				once := func(o *ec2.Options) { o.Retryer = aws.NopRetryer{} }
				for {
					e, err := c.CreateNetworkInterface(ctx, &ec2.CreateNetworkInterfaceInput{SubnetId: subnet}, once)
					if err != nil {
						return
					}
					a, err := c.AssignPrivateIpAddresses(ctx, &ec2.AssignPrivateIpAddressesInput{NetworkInterfaceId: e.NetworkInterface.NetworkInterfaceId, SecondaryPrivateIpAddressCount: aws.Int32(1)}, once)
					if err != nil {
						return
					}
					acked <- made{*e.NetworkInterface.NetworkInterfaceId, *a.AssignedPrivateIpAddresses[0].PrivateIpAddress}
				}
			})
		}
		lab.Eventually(t, 20*time.Second, "calls are acknowledged", func() error {
			if n := len(acked); n < 50*(round+1) {
				return fmt.Errorf("%d so far", n)
			}
			return nil
		})
		if err := vpcd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		writers.Wait()
		_ = vpcd.Wait() // "signal: killed"
		close(acked)
		vpcd = start()
		there := map[string]types.NetworkInterface{}
		for p := ec2.NewDescribeNetworkInterfacesPaginator(c, &ec2.DescribeNetworkInterfacesInput{MaxResults: aws.Int32(1000)}); p.HasMorePages(); {
			for _, e := range ok[*ec2.DescribeNetworkInterfacesOutput](t)(p.NextPage(ctx)).NetworkInterfaces {
				there[*e.NetworkInterfaceId] = e
			}
		}
		n := 0
		for m := range acked {
			n++
			if !slices.ContainsFunc(there[m.id].PrivateIpAddresses, func(a types.NetworkInterfacePrivateIpAddress) bool { return *a.PrivateIpAddress == m.addr }) {
				t.Errorf("round %d: %s with %s was acknowledged and is lost", round, m.id, m.addr)
			}
		}
		t.Logf("round %d: %d acknowledged pairs of calls found again", round, n)
	}
}
