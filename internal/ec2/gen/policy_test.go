package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestPolicyIsWhatTheClientCalls(t *testing.T) {
	var files []string
	for _, s := range sources {
		files = append(files, filepath.Join("..", s))
	}
	got, err := document(files...)
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile("../../../docs/reference/iam-policy.json")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("docs/reference/iam-policy.json is not what internal/ec2 calls; run go generate ./internal/ec2 (-have +needed):\n%s", d)
	}
}

func TestDocument(t *testing.T) {
	write := func(source string) string {
		path := filepath.Join(t.TempDir(), "client.go")
		if err := os.WriteFile(path, []byte("package ec2\n"+source), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	got, err := document(write(`type api interface { DeleteVpc(); DescribeVpcs() }
		func f(c client) { c.api.DescribeVpcs(); call(c.api.DeleteVpc) }`))
	if err != nil || !strings.Contains(string(got), `"ec2:DeleteVpc"`) || strings.Contains(string(got), "CreateTags") {
		t.Errorf("%v\n%s", err, got)
	}
	if _, err := document(write(`type api interface { DeleteVpc(); DescribeVpcs() }
		func f(c client) { c.api.DescribeVpcs() }`)); err == nil || !strings.Contains(err.Error(), "nothing calls it") {
		t.Errorf("a call that is not made: %v", err)
	}
	if _, err := document(write(`type other interface { DeleteVpc() }`)); err == nil {
		t.Error("no interface api, and no error")
	}
}
