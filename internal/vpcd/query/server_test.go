package query

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

var testNow = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func testServer(t *testing.T, gate Gate) *httptest.Server {
	t.Helper()
	srv := httptest.NewServer(NewServer(Options{
		Gate:   gate,
		Now:    func() time.Time { return testNow },
		Logger: slog.New(slog.DiscardHandler),
		Handlers: map[string]Handler{
			"DescribeVpcs": Handle(func(ctx context.Context, req *DescribeVpcsRequest) (*DescribeVpcsResponse, error) {
				id := Caller(ctx)
				return &DescribeVpcsResponse{VpcSet: []Vpc{{OwnerId: &id.Account, VpcId: new("vpc-" + id.AccessKey)}}}, nil
			}),
			"DeleteVpc": Handle(func(_ context.Context, req *DeleteVpcRequest) (*DeleteVpcResponse, error) {
				switch *req.VpcId {
				case "gone":
					return nil, Errorf("InvalidVpcID.NotFound", "The vpc ID '%s' does not exist", *req.VpcId)
				case "broken":
					return nil, errors.New("the disk is on fire")
				case "panic":
					panic("boom")
				}
				return nil, nil
			}),
		},
	}))
	t.Cleanup(srv.Close)
	return srv
}

const testAuth = "AWS4-HMAC-SHA256 Credential=AKID/20260102/us-east-1/ec2/aws4_request, SignedHeaders=host, Signature=00"

func TestServer(t *testing.T) {
	srv := testServer(t, nil)
	tests := []struct {
		name, method, auth, date, form string
		status                         int
		want                           string
	}{
		{name: "describe", form: "Action=DescribeVpcs&Version=2016-11-15", status: 200, want: "<ownerId>123456789012</ownerId><vpcId>vpc-AKID</vpcId>"},
		{name: "get", method: "GET", form: "Action=DescribeVpcs&Version=2016-11-15", status: 200, want: "<vpcSet>"},
		{name: "presigned", method: "GET", auth: "none", status: 200, want: "<vpcSet>",
			form: "Action=DescribeVpcs&Version=2016-11-15&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKID%2F20260102%2Fus-east-1%2Fec2%2Faws4_request&X-Amz-Date=20260102T020405Z&X-Amz-Expires=7200"},
		{name: "sigv4a", auth: "AWS4-ECDSA-P256-SHA256 Credential=A/20260102/ec2/aws4_request, Signature=0", form: "Action=DescribeVpcs&Version=2016-11-15", status: 200, want: "vpc-A<"},
		{name: "sigv2", auth: "none", form: "Action=DescribeVpcs&Version=2016-11-15&AWSAccessKeyId=B&Signature=x&SignatureVersion=2&SignatureMethod=HmacSHA256&Timestamp=t", status: 200, want: "vpc-B<"},
		{name: "delete", form: "Action=DeleteVpc&Version=2016-11-15&VpcId=vpc-1", status: 200, want: "<return>true</return>"},
		{name: "handler's error", form: "Action=DeleteVpc&Version=2016-11-15&VpcId=gone", status: 400, want: "<Code>InvalidVpcID.NotFound</Code><Message>The vpc ID &#39;gone&#39; does not exist</Message></Error></Errors><RequestID>"},
		{name: "broken handler", form: "Action=DeleteVpc&Version=2016-11-15&VpcId=broken", status: 500, want: "<Code>InternalError</Code>"},
		{name: "panic", form: "Action=DeleteVpc&Version=2016-11-15&VpcId=panic", status: 500, want: "<Code>InternalError</Code>"},
		{name: "dry run", form: "Action=DeleteVpc&Version=2016-11-15&VpcId=vpc-1&DryRun=true", status: 412, want: "<Code>DryRunOperation</Code><Message>Request would have succeeded, but DryRun flag is set.</Message>"},
		{name: "dry run, bad request", form: "Action=DeleteVpc&Version=2016-11-15&DryRun=true", status: 400, want: "MissingParameter"},
		{name: "unknown action", form: "Action=MakeCoffee&Version=2016-11-15", status: 400, want: "<Code>InvalidAction</Code><Message>The action MakeCoffee is not valid for this web service.</Message>"},
		{name: "no handler", form: "Action=CreateNatGateway&Version=2016-11-15&Nonsense=1", status: 400, want: "InvalidAction"},
		{name: "no action", form: "Version=2016-11-15", status: 400, want: "MissingAction"},
		{name: "version", form: "Action=DescribeVpcs&Version=2010-01-01", status: 400, want: "NoSuchVersion"},
		{name: "no version", form: "Action=DescribeVpcs", status: 400, want: "MissingParameter"},
		{name: "no credentials", auth: "none", form: "Action=DescribeVpcs&Version=2016-11-15", status: 401, want: "AuthFailure"},
		{name: "garbage credentials", auth: "Basic Zm9v", form: "Action=DescribeVpcs&Version=2016-11-15", status: 401, want: "AuthFailure"},
		{name: "garbage scope", auth: "AWS4-HMAC-SHA256 Credential=foo", form: "Action=DescribeVpcs&Version=2016-11-15", status: 401, want: "AuthFailure"},
		{name: "other service", auth: "AWS4-HMAC-SHA256 Credential=A/20260102/us-east-1/s3/aws4_request", form: "Action=DescribeVpcs&Version=2016-11-15", status: 403, want: "SignatureDoesNotMatch"},
		{name: "other region", auth: "AWS4-HMAC-SHA256 Credential=A/20260102/eu-west-1/ec2/aws4_request", form: "Action=DescribeVpcs&Version=2016-11-15", status: 401, want: "not &#39;eu-west-1&#39;: this endpoint is us-east-1"},
		{name: "expired", date: "20260102T024000Z", form: "Action=DescribeVpcs&Version=2016-11-15", status: 400, want: "RequestExpired"},
		{name: "from the future", date: "20260102T034000Z", form: "Action=DescribeVpcs&Version=2016-11-15", status: 400, want: "RequestExpired"},
		{name: "bad escape", form: "Action=DescribeVpcs&Version=%zz", status: 400, want: "MalformedQueryString"},
		{name: "too large", form: "Action=DescribeVpcs&Version=2016-11-15&VpcId.1=" + strings.Repeat("x", maxBody), status: 413, want: "RequestEntityTooLarge"},
		{name: "method", method: "DELETE", form: "Action=DescribeVpcs", status: 405, want: "InvalidRequest"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			method, url, body := http.MethodPost, srv.URL+"/", tt.form
			if tt.method != "" {
				method, url, body = tt.method, srv.URL+"/?"+tt.form, ""
			}
			req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			if method == http.MethodPost {
				req.Header.Set("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")
			}
			switch tt.auth {
			case "none":
			case "":
				req.Header.Set("Authorization", testAuth)
			default:
				req.Header.Set("Authorization", tt.auth)
			}
			if tt.date != "" {
				req.Header.Set("X-Amz-Date", tt.date)
			}
			resp, err := srv.Client().Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			b, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode != tt.status || !strings.Contains(string(b), tt.want) {
				t.Errorf("%d %s\nwant %d %s", resp.StatusCode, b, tt.status, tt.want)
			}
			parseXML(t, b)
		})
	}
}

func TestGateIsAskedBeforeDryRun(t *testing.T) {
	var saw []string
	srv := testServer(t, func(_ context.Context, c Call) error {
		saw = append(saw, c.Action.Name)
		return Errorf("RequestLimitExceeded", "Request limit exceeded.")
	})
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, srv.URL, strings.NewReader("Action=DeleteVpc&Version=2016-11-15&VpcId=v&DryRun=true"))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", testAuth)
	resp, err := srv.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 503 || len(saw) != 1 {
		t.Errorf("status %d, gate saw %v", resp.StatusCode, saw)
	}
}

func TestHandlersMustFitTheirActions(t *testing.T) {
	for name, hs := range map[string]map[string]Handler{
		"unknown action": {"MakeCoffee": Handle(func(context.Context, *DeleteVpcRequest) (*DeleteVpcResponse, error) { return nil, nil })},
		"other types":    {"DescribeVpcs": Handle(func(context.Context, *DeleteVpcRequest) (*DeleteVpcResponse, error) { return nil, nil })},
		"zero handler":   {"DescribeVpcs": {}},
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("NewServer took it")
				}
			}()
			NewServer(Options{Handlers: hs})
		})
	}
}
