package cli

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/plan"
	"github.com/underlay-cni/underlay/internal/vpc"
)

// anAccount serves two subnets, two nodes and a machine, over two pages of
// interfaces, and fails the test at any call that is not one of the four reads.
// reservations are those of subnet-b; "denied": nobody may read them.
func anAccount(t *testing.T, reservations string) {
	t.Helper()
	eni := func(n int, subnet, instance, primary string, secondary ...string) string {
		addrs := "<item><privateIpAddress>" + primary + "</privateIpAddress><primary>true</primary></item>"
		for _, s := range secondary {
			addrs += "<item><privateIpAddress>" + s + "</privateIpAddress><primary>false</primary></item>"
		}
		return fmt.Sprintf("<item><networkInterfaceId>eni-%d</networkInterfaceId><subnetId>%s</subnetId><vpcId>vpc-1</vpcId><privateIpAddress>%s</privateIpAddress><privateIpAddressesSet>%s</privateIpAddressesSet>"+
			"<attachment><attachmentId>a</attachmentId><instanceId>%s</instanceId><deviceIndex>0</deviceIndex><status>attached</status></attachment></item>", n, subnet, primary, addrs, instance)
	}
	instance := func(id, name string) string {
		return "<item><instanceId>" + id + "</instanceId><instanceType>m5.large</instanceType><tagSet><item><key>Name</key><value>" + name + "</value></item></tagSet></item>"
	}
	subnet := func(id, cidr, zone string, free int) string {
		return fmt.Sprintf("<item><subnetId>%s</subnetId><vpcId>vpc-1</vpcId><cidrBlock>%s</cidrBlock><availabilityZone>%s</availabilityZone><availableIpAddressCount>%d</availableIpAddressCount></item>", id, cidr, zone, free)
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = r.ParseForm()
		action := r.Form.Get("Action")
		body := ""
		switch action + r.Form.Get("NextToken") {
		case "DescribeSubnets":
			body = "<subnetSet>" + subnet("subnet-a", "10.0.0.0/24", "us-east-1a", 244) + subnet("subnet-b", "10.0.1.0/24", "us-east-1b", 246) + "</subnetSet>"
		case "DescribeNetworkInterfaces":
			body = "<networkInterfaceSet>" + eni(1, "subnet-a", "i-1", "10.0.0.10", "10.0.0.11", "10.0.0.12", "10.0.0.13", "10.0.0.14", "10.0.0.15") + "</networkInterfaceSet><nextToken>2</nextToken>"
		case "DescribeNetworkInterfaces2":
			body = "<networkInterfaceSet>" + eni(2, "subnet-b", "i-2", "10.0.1.10", "10.0.1.11", "10.0.1.12", "10.0.1.13", "10.0.1.14") + eni(3, "subnet-a", "i-3", "10.0.0.200") + "</networkInterfaceSet>"
		case "DescribeInstances":
			body = "<reservationSet><item><instancesSet>" + instance("i-1", "node-1") + instance("i-2", "node-2") + instance("i-3", "db") + "</instancesSet></item></reservationSet>"
		case "GetSubnetCidrReservations":
			if reservations == "denied" {
				w.WriteHeader(http.StatusForbidden)
				fmt.Fprint(w, "<Response><Errors><Error><Code>UnauthorizedOperation</Code><Message>no</Message></Error></Errors></Response>")
				return
			}
			if r.Form.Get("SubnetId") == "subnet-b" {
				body = "<subnetIpv4CidrReservationSet>" + reservations + "</subnetIpv4CidrReservationSet>"
			}
		default:
			t.Errorf("plan called %s", action)
			w.WriteHeader(http.StatusBadRequest)
		}
		fmt.Fprintf(w, "<%sResponse>%s</%sResponse>", action, body, action)
	}))
	t.Cleanup(srv.Close)
	awsAt(t, srv.URL)
}

func awsAt(t *testing.T, endpoint string) {
	t.Helper()
	for k, v := range map[string]string{
		"AWS_ENDPOINT_URL_EC2": endpoint, "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "AKIAX", "AWS_SECRET_ACCESS_KEY": "x",
		"AWS_CONFIG_FILE": os.DevNull, "AWS_SHARED_CREDENTIALS_FILE": os.DevNull, "AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "1",
	} {
		t.Setenv(k, v)
	}
}

func TestPlanAccount(t *testing.T) {
	anAccount(t, "")
	dir := t.TempDir()
	now := aDay.Add(90 * time.Second) // testApp's
	earlier := func(name string, daysAgo float64, a, b int) string {
		raw, _ := json.Marshal(plan.Snapshot{Version: 1, At: now.Add(-days(daysAgo)), Free: map[vpc.SubnetID]int{"subnet-a": a, "subnet-b": b}})
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, raw, 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	// subnet-a goes from 250 to 244 in 3 days: 2 a day, so full in 122.
	monday, now3 := earlier("monday", 3, 250, 240), earlier("just-now", 0.001, 246, 246)
	const pods = "10.0.0.11\n10.0.0.12, 10.0.1.11\n\n10.0.1.10\n"
	for _, c := range []struct{ golden, args, in string }{
		{"plan-account.txt", "account --pods - --since " + monday, pods},
		{"plan-account-held.txt", "account --save " + filepath.Join(dir, "new"), ""},
		{"plan-account-short.txt", "account --since " + now3, ""},
		{"plan-fit-aws.txt", "fit --from-aws --nodes 4 --pods 40", ""},
	} {
		a, out, errOut := testApp(dir)
		a.In = strings.NewReader(c.in)
		if code := a.Run(t.Context(), append([]string{"plan"}, strings.Fields(c.args)...)); code != 0 {
			t.Errorf("plan %s: exit code %d: %s", c.args, code, errOut)
		}
		golden(t, c.golden, out.String())
	}
	if s, err := readSnapshot(filepath.Join(dir, "new")); err != nil || s.Free["subnet-b"] != 246 || !s.At.Equal(now) {
		t.Errorf("what --save kept: %v, %+v", err, s)
	}

	for args, want := range map[string]string{
		"account --save " + monday:                        "choose another name",
		"account --since " + filepath.Join(dir, "none"):   "make a snapshot with --save",
		"account --since " + filepath.Join(dir, "new"):    "not older than now",
		"account --pods " + filepath.Join(dir, "nothing"): "one address a line",
		"account --pods -":                                `line 2 of the standard input: "web-1" is no address`,
		"account --vpc-id web":                            "aws ec2 describe-vpcs",
		"fit --nodes 1 --from-aws --subnet here":          "aws ec2 describe-subnets",
		"fit --nodes 1 --vpc-id vpc-0 --subnet 10":        "add --from-aws",
	} {
		a, out, errOut := testApp(dir)
		a.In = strings.NewReader("10.0.0.11\nweb-1\n")
		if code := a.Run(t.Context(), append([]string{"plan"}, strings.Fields(args)...)); code != 1 || out.Len() > 0 || !strings.Contains(errOut.String(), want) {
			t.Errorf("plan %s: exit code %d, %q is not in %q", args, code, want, errOut)
		}
	}
}

func TestPlanAccountWithReservations(t *testing.T) {
	anAccount(t, "<item><cidr>10.0.1.128/26</cidr><reservationType>prefix</reservationType></item><item><cidr>10.0.1.64/28</cidr><reservationType>explicit</reservationType></item>")
	for golden1, args := range map[string]string{
		"plan-account-reserved.txt": "account --eni-quota 2",
		"plan-fit-reserved.txt":     "fit --from-aws --nodes 4 --pods 40 --prefixes --eni-quota 3",
	} {
		a, out, errOut := testApp(t.TempDir())
		a.Run(t.Context(), append([]string{"plan"}, strings.Fields(args)...))
		if errOut.Len() > 0 {
			t.Errorf("plan %s: %s", args, errOut)
		}
		golden(t, golden1, out.String())
	}
	anAccount(t, "denied")
	a, out, errOut := testApp(t.TempDir())
	if code := a.Run(t.Context(), []string{"plan", "account"}); code != 0 || out.Len() == 0 || !strings.Contains(errOut.String(), "ec2:GetSubnetCidrReservations is not allowed") {
		t.Errorf("denied: exit code %d, %s", code, errOut)
	}
}

func TestPlanAccountThatIsNotThere(t *testing.T) {
	awsAt(t, "http://127.0.0.1:1")
	a, _, errOut := testApp(t.TempDir())
	if code := a.Run(t.Context(), []string{"plan", "account"}); code != 1 || !strings.Contains(errOut.String(), "check AWS_PROFILE, AWS_REGION and AWS_ENDPOINT_URL_EC2") {
		t.Errorf("exit code %d: %s", code, errOut)
	}
	t.Setenv("AWS_REGION", "")
	errOut.Reset()
	if code := a.Run(t.Context(), []string{"plan", "account"}); code != 1 || !strings.Contains(errOut.String(), "set AWS_REGION") {
		t.Errorf("without a region: exit code %d: %s", code, errOut)
	}
}
