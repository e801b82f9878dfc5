package chart

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
)

const (
	root  = "../.."
	chart = root + "/deploy/helm/underlay"
)

// helmProgram is Helm, built as this checkout's hack/helm says.
var helmProgram = sync.OnceValues(func() (string, error) {
	var stderr bytes.Buffer
	cmd := exec.Command(root + "/hack/helm.sh")
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("build Helm: %w\n%s", err, stderr.Bytes())
	}
	return strings.TrimSpace(string(out)), nil
})

// helm runs Helm and returns what it printed, and its complaint if it failed.
func helm(t *testing.T, args ...string) (string, error) {
	t.Helper()
	program, err := helmProgram()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd := exec.Command(program, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", errors.New(stderr.String())
	}
	return string(out), nil
}

// rendered are the objects of a release.
type rendered struct {
	DaemonSet    appsv1.DaemonSet
	Account      corev1.ServiceAccount
	ClusterRole  rbacv1.ClusterRole
	Role         rbacv1.Role
	Bindings     []rbacv1.RoleRef
	Subjects     []rbacv1.Subject
	Policies     []*admissionv1.ValidatingAdmissionPolicy
	PoliciesUsed []*admissionv1.ValidatingAdmissionPolicyBinding
	Secret       *corev1.Secret
	Service      *corev1.Service
	Others       map[string]map[string]any // by kind
	kinds        []string
	withoutUsers string // everything but the Secret, as text
}

// render renders the chart as release "underlay" of kube-system.
func render(t *testing.T, args ...string) *rendered {
	t.Helper()
	out, err := helm(t, append([]string{"template", "underlay", chart, "--namespace", "kube-system"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	r := &rendered{Others: map[string]map[string]any{}}
	for d := yaml.NewDocumentDecoder(io.NopCloser(strings.NewReader(out))); ; {
		doc := make([]byte, 1<<20)
		n, err := d.Read(doc)
		if errors.Is(err, io.EOF) {
			return r
		}
		if err != nil {
			t.Fatal(err)
		}
		r.decode(t, doc[:n])
	}
}

func (r *rendered) decode(t *testing.T, doc []byte) {
	t.Helper()
	b, err := yaml.ToJSON(doc)
	if err != nil {
		t.Fatalf("%v:\n%s", err, doc)
	}
	var head struct{ Kind string }
	if err := json.Unmarshal(b, &head); err != nil {
		t.Fatalf("%v:\n%s", err, doc)
	}
	if head.Kind == "" {
		return // a file that renders nothing
	}
	r.kinds = append(r.kinds, head.Kind)
	if head.Kind != "Secret" {
		r.withoutUsers += string(doc)
	}
	var into any
	var binding rbacv1.ClusterRoleBinding
	switch head.Kind {
	case "DaemonSet":
		into = &r.DaemonSet
	case "ServiceAccount":
		into = &r.Account
	case "ClusterRole":
		into = &r.ClusterRole
	case "Role":
		into = &r.Role
	case "ClusterRoleBinding", "RoleBinding":
		into = &binding
	case "ValidatingAdmissionPolicy":
		r.Policies = append(r.Policies, &admissionv1.ValidatingAdmissionPolicy{})
		into = r.Policies[len(r.Policies)-1]
	case "ValidatingAdmissionPolicyBinding":
		r.PoliciesUsed = append(r.PoliciesUsed, &admissionv1.ValidatingAdmissionPolicyBinding{})
		into = r.PoliciesUsed[len(r.PoliciesUsed)-1]
	case "Secret":
		r.Secret = &corev1.Secret{}
		into = r.Secret
	case "Service":
		r.Service = &corev1.Service{}
		into = r.Service
	default:
		var other map[string]any
		into = &other
		defer func() { r.Others[head.Kind] = other }()
	}
	// A field that the API does not know would be dropped by it in silence.
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		t.Fatalf("%s: %v", head.Kind, err)
	}
	if binding.RoleRef.Name != "" {
		r.Bindings = append(r.Bindings, binding.RoleRef)
		r.Subjects = append(r.Subjects, binding.Subjects...)
	}
}

// agent is the container that serves.
func (r *rendered) agent(t *testing.T) *corev1.Container {
	t.Helper()
	cs := r.DaemonSet.Spec.Template.Spec.Containers
	if len(cs) != 1 || cs[0].Name != "agent" {
		t.Fatalf("the DaemonSet has containers %v, want agent alone", cs)
	}
	return &cs[0]
}

// values are the files of testdata: each a way to install.
func valueFiles(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("testdata/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no values in testdata: %v", err)
	}
	return files
}
