package chart

import (
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/util/yaml"
)

// What cannot be is refused before anything is sent, and the message names the
// value.
func TestRefused(t *testing.T) {
	for _, tc := range []struct{ args, want string }{
		{"--set imds=perhaps", "at '/imds': value must be one of 'allow', 'deny'"},
		{"--set hook=xdp", "at '/hook': value must be one of 'auto', 'clsact', 'tcx'"},
		{"--set snat=always", "at '/snat': value must be one of 'eni', 'primary', 'none'"},
		{"--set snatExclude={10.0.0.0}", "at '/snatExclude/0': '10.0.0.0' does not match pattern"},
		{"--set flows.dir=var/log", "at '/flows/dir': 'var/log' does not match pattern"},
		{"--set flows.format=srcaddr", "at '/flows/format': 'srcaddr' does not match pattern"},
		{"--set flows.interval=1", "at '/flows/interval'"},
		{"--set extraArgs={imds}", "at '/extraArgs/0': 'imds' does not match pattern"},
		{"--set logLevel=verbose", "at '/logLevel': value must be one of"},
		{"--set prefix=true", "additional properties 'prefix' not allowed"},
		{"--set prefixes=yes", "at '/prefixes': got string, want boolean"},
		{"--set cluster.name=", "at '/cluster/name': minLength"},
		{"--set cluster.nam=x", "at '/cluster': additional properties 'nam' not allowed"},
		{"--set image.tag=a/b", "at '/image/tag': 'a/b' does not match pattern"},
		{"--set image.pullPolicy=Sometimes", "at '/image/pullPolicy': value must be one of"},
		{"--set image.digest=sha256:12", "at '/image/digest'"},
		{"--set pool.warmIPTarget=-1", "at '/pool/warmIPTarget': minimum: got -1, want 0"},
		{"--set-string pool.warmIPTarget=3", "at '/pool/warmIPTarget': got string"},
		{"--set pool.maxENI=0", "at '/pool/maxENI': minimum"},
		{"--set pool.warmPrefixTarget=1", "pool.warmPrefixTarget counts in prefixes: set prefixes to true"},
		{"--set sweep=often", "at '/sweep': 'often' does not match pattern"},
		{"--set metrics.listen=9464", "at '/metrics/listen'"},
		{"--set metrics.listen=10.0.0.1:9464", "at '/metrics/listen'"},
		{"--set metrics.podMonitor.enabled=true", "metrics.listen is 127.0.0.1:9464: set metrics.listen to 0.0.0.0:9464"},
		{"--set metrics.serviceMonitor.enabled=true", "set metrics.listen to 0.0.0.0:9464"},
		{"--set ec2.endpoint=169.254.171.24:7424", "at '/ec2/endpoint'"},
		{"--set ec2.region=Frankfurt", "at '/ec2/region'"},
		{"--set ec2.accessKeyId=x", "ec2.accessKeyId and ec2.secretAccessKey go together"},
		{"--set ec2.secretAccessKey=x", "ec2.accessKeyId and ec2.secretAccessKey go together"},
		{"--set updateStrategy.rollingUpdate.maxSurge=1", "at '/updateStrategy/rollingUpdate': additional properties 'maxSurge' not allowed"},
		{"--set updateStrategy.rollingUpdate.maxUnavailable=0%", "at '/updateStrategy/rollingUpdate/maxUnavailable'"},
		{"--set cni.confDir=etc/cni", "at '/cni/confDir'"},
		{"--set extraEnv[0].nam=x", "at '/extraEnv/0'"},
		{"--kube-version 1.29.3", "admissionPolicy.enabled needs Kubernetes 1.30, and this is v1.29.3: set admissionPolicy.enabled to false"},
		{"--kube-version 1.26.0 --set admissionPolicy.enabled=false", "chart requires kubeVersion"},
	} {
		t.Run(tc.args, func(t *testing.T) {
			out, err := helm(t, append([]string{"template", "underlay", chart}, strings.Fields(tc.args)...)...)
			if err == nil {
				t.Fatalf("rendered: %.200s", out)
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("want %q in: %v", tc.want, err)
			}
		})
	}
}

func TestOldClustersWithoutThePolicy(t *testing.T) {
	r := render(t, "--kube-version", "v1.29.6-eks-1552ad0", "--set", "admissionPolicy.enabled=false")
	if len(r.Policies)+len(r.PoliciesUsed) > 0 {
		t.Error("a policy is made nevertheless")
	}
	if r := render(t, "--kube-version", "v1.30.4-eks-a737599"); len(r.Policies) == 0 {
		t.Error("EKS 1.30 gets no policy")
	}
}

func appVersion(t *testing.T) string {
	t.Helper()
	var c struct{ AppVersion string }
	read(t, chart+"/Chart.yaml", &c)
	if c.AppVersion == "" {
		t.Fatal("the chart has no appVersion")
	}
	return c.AppVersion
}

func read(t *testing.T, path string, into any) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if b, err = yaml.ToJSON(b); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	if err := json.Unmarshal(b, into); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
}

// values.yaml and its schema know the same values, group by group: one that the
// schema lacks is refused when somebody sets it, one that the file lacks is
// documented nowhere.
func TestSchemaKnowsTheValues(t *testing.T) {
	type schema struct {
		Properties           map[string]*schema
		AdditionalProperties any
	}
	var s schema
	var values map[string]any
	read(t, chart+"/values.schema.json", &s)
	read(t, chart+"/values.yaml", &values)
	delete(s.Properties, "global") // Helm adds it to the values of a subchart
	var compare func(path string, s *schema, values map[string]any)
	compare = func(path string, s *schema, values map[string]any) {
		var have, want []string
		for k := range values {
			have = append(have, k)
		}
		for k := range s.Properties {
			want = append(want, k)
		}
		slices.Sort(have)
		slices.Sort(want)
		if path == "/resources" {
			return // Kubernetes' own; limits are left out on purpose
		}
		if diff := cmp.Diff(want, have); diff != "" {
			t.Errorf("%s (- schema, + values.yaml):\n%s", path, diff)
		}
		if s.AdditionalProperties != false {
			t.Errorf("%s: the schema takes any key", path)
		}
		for k, v := range values {
			if group, ok := v.(map[string]any); ok && s.Properties[k] != nil && len(s.Properties[k].Properties) > 0 {
				compare(path+"/"+k, s.Properties[k], group)
			}
		}
	}
	compare("", &s, values)
}
