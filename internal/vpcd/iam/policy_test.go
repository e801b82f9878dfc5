package iam

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/underlay-cni/underlay/internal/vpcd/query"
)

// What the AWS VPC CNI's users attach to their nodes (AmazonEKS_CNI_Policy, in
// its shape), with a Deny.
const cniPolicy = `{
  "Version": "2012-10-17",
  "Id": "pods",
  "Statement": [
    {"Sid": "Pods", "Effect": "Allow", "Action": ["ec2:AssignPrivateIpAddresses", "ec2:Describe*", "EC2:createnetworkinterface"], "Resource": "*"},
    {"Sid": "Tags", "Effect": "Allow", "Action": "ec2:CreateTags", "Resource": ["arn:aws:ec2:*:*:network-interface/*"]},
    {"Effect": "Deny", "Action": "ec2:*", "Resource": "arn:aws:ec2:*:*:network-interface/eni-1*"}
  ]}`

func TestJudge(t *testing.T) {
	p, err := Parse([]byte(cniPolicy))
	if err != nil {
		t.Fatal(err)
	}
	const arn = "arn:aws:ec2:us-east-1:123456789012:"
	for _, c := range []struct {
		action, resource string
		want             Verdict
	}{
		{"ec2:AssignPrivateIpAddresses", arn + "network-interface/eni-2", Allowed},
		{"ec2:AssignPrivateIpAddresses", arn + "network-interface/eni-12", Denied},
		{"ec2:DescribeVpcs", "*", Allowed},
		{"ec2:CreateNetworkInterface", arn + "subnet/subnet-1", Allowed},
		{"ec2:CreateTags", arn + "network-interface/*", Allowed},
		{"ec2:CreateTags", arn + "instance/i-1", Unmentioned},
		{"ec2:UnassignPrivateIpAddresses", arn + "network-interface/eni-2", Unmentioned},
		{"ec2:Describe", "*", Allowed}, // * is nothing, too
		{"sts:DescribeVpcs", "*", Unmentioned},
	} {
		if got := p.Judge(c.action, c.resource); got != c.want {
			t.Errorf("%s on %s: %d, want %d", c.action, c.resource, got, c.want)
		}
	}
	single, err := Parse([]byte(`{"Version":"2012-10-17","Statement":{"Effect":"Allow","Action":"*","Resource":"*"}}`))
	if err != nil || single.Judge("ec2:CreateVpc", "*") != Allowed {
		t.Errorf("a single statement without a list: %v", err)
	}
}

func TestParseRefuses(t *testing.T) {
	with := func(statement string) string {
		return `{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}, ` + statement + `]}`
	}
	for doc, says := range map[string]string{
		``:                          "no JSON object",
		`[]`:                        "no JSON object",
		`{"Version": "2012-10-17"}`: "no Statement",
		`{"Version": "2012-10-17", "Statement": []}`:                       "no Statement",
		`{"Version": "2008-10-17", "Statement": []}`:                       `Version must be "2012-10-17"`,
		`{"Statement": []}`:                                                "Version must be",
		`{"Version": "2012-10-17", "Statement": [], "Principal": "*"}`:     "has Principal, which vpcd does not honour",
		with(`{"Effect": "Allow", "Action": "*", "Resource": "*"}`) + `{}`: "something follows",
		with(`{"Effect": "Allow", "Action": "*", "Resource": "*", "Condition": {"StringEquals": {"ec2:CreateAction": "RunInstances"}}}`): "statement 2 has Condition, which vpcd does not honour",
		with(`{"Effect": "Allow", "NotAction": "*", "Resource": "*"}`):                                                                   "statement 2 has NotAction",
		with(`{"Effect": "Allow", "Action": "*", "NotResource": "*"}`):                                                                   "NotResource",
		with(`{"Effect": "Allow", "Action": "*", "Action": "ec2:*", "Resource": "*"}`):                                                   "Action twice",
		with(`{"Effect": "allow", "Action": "*", "Resource": "*"}`):                                                                      "Effect must be",
		with(`{"Effect": "Deny", "Resource": "*"}`):                                                                                      "Action is missing",
		with(`{"Effect": "Deny", "Action": [], "Resource": "*"}`):                                                                        "Action must be a string",
		with(`{"Effect": "Deny", "Action": "CreateTags", "Resource": "*"}`):                                                              `Action "CreateTags"`,
		with(`{"Effect": "Deny", "Action": "e*:CreateTags", "Resource": "*"}`):                                                           `Action "e*:CreateTags"`,
		with(`{"Effect": "Deny", "Action": "ec2:*"}`):                                                                                    "Resource is missing",
		with(`{"Effect": "Deny", "Action": "ec2:*", "Resource": "eni-1"}`):                                                               "must be an ARN",
		with(`{"Effect": "Deny", "Action": "ec2:*", "Resource": "arn:aws:ec2:*:*:instance/${aws:username}"}`):                            "policy variable",
		with(`7`): "statement 2 is no JSON object",
	} {
		if _, err := Parse([]byte(doc)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %q", doc, err, says)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(cniPolicy, "ec2:CreateTags", "*")
	f.Fuzz(func(_ *testing.T, doc, action, resource string) {
		if p, err := Parse([]byte(doc)); err == nil {
			p.Judge(action, resource)
		}
	})
}

func TestGuard(t *testing.T) {
	dir := t.TempDir()
	write := func(name, doc string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(doc), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	nodes := write("nodes.json", cniPolicy)
	rest := write("re=st.json", `{"Version":"2012-10-17","Statement":{"Effect":"Deny","Action":"ec2:DescribeVpcs","Resource":"*"}}`)
	needs := func(c query.Call) []Need { return []Need{{"ec2:" + c.Action.Name, "*"}} }
	g, err := Load([]string{"AKIANODE000000000000=" + nodes, rest}, needs)
	if err != nil {
		t.Fatal(err)
	}
	const you = "You are not authorized to perform this operation. User: arn:aws:iam::123456789012:user/"
	for _, c := range []struct{ key, action, want string }{
		{"AKIANODE000000000000", "DescribeVpcs", ""},
		{"AKIANODE000000000000", "DeleteVpc", you + "AKIANODE000000000000 is not authorized to perform: ec2:DeleteVpc because no identity-based policy allows the ec2:DeleteVpc action"},
		{"SOMEBODY", "DescribeVpcs", you + "SOMEBODY is not authorized to perform: ec2:DescribeVpcs with an explicit deny in an identity-based policy"},
	} {
		call := query.Call{Action: query.Actions[c.action], Identity: query.Identity{AccessKey: c.key, Account: "123456789012"}}
		err := g.Gate(func(context.Context, query.Call) error { return nil })(t.Context(), call)
		if c.want == "" && err != nil || c.want != "" && (err == nil || err.Error() != "UnauthorizedOperation: "+c.want) {
			t.Errorf("%s by %s: %v", c.action, c.key, err)
		}
	}
	// What stands before answers first.
	throttled := query.Errorf("RequestLimitExceeded", "")
	if err := g.Gate(func(context.Context, query.Call) error { return throttled })(t.Context(), query.Call{Action: query.Actions["DeleteVpc"]}); !errors.Is(err, throttled) {
		t.Errorf("throttled: %v", err)
	}
	for _, names := range [][]string{{filepath.Join(dir, "none")}, {rest, rest}, {write("bad.json", "{}")}} {
		if _, err := Load(names, needs); err == nil {
			t.Errorf("loaded %v", names)
		}
	}
}
