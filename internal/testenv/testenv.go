// Package testenv says what a test needs of the machine. It is imported by
// tests alone.
package testenv

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// PluginDir is where Debian puts the CNI project's own plugins.
const PluginDir = "/usr/lib/cni"

// Require skips the test unless the machine has each of needs: "root" (uid 0
// with CAP_NET_ADMIN), "bpf" (BPF programs may be loaded), "aws" (the AWS CLI),
// "boto3" (Python 3 with the AWS SDK), "portmap" (the CNI project's plugin, in
// PluginDir, and iptables, with which it works), "containerd" (with ctr and runc),
// "podman", "kubernetes" (kubectl, and KUBECONFIG of a cluster with Underlay, as
// `underlay env` prints it), "cluster" (labs with a Kubernetes may be made:
// TEST_KUBERNETES is set) or "clang" (clang-14 and libbpf's headers, with which the
// BPF programs are compiled). A need that the environment variable TEST_REQUIRE names
// (comma-separated) is no reason to skip: the test fails instead, so that nothing
// goes unseen where everything is meant to run.
func Require(t testing.TB, needs ...string) {
	t.Helper()
	for _, need := range needs {
		if reason := lacking(need); reason != "" {
			Lacks(t, need, reason)
		}
	}
}

// Lacks skips a test that found out itself what it lacks of a need, or fails it, as
// Require does.
func Lacks(t testing.TB, need, reason string) {
	t.Helper()
	if slices.Contains(strings.Split(os.Getenv("TEST_REQUIRE"), ","), need) {
		t.Fatalf("TEST_REQUIRE names %q, but %s", need, reason)
	}
	t.Skipf("needs %s: %s", need, reason)
}

// Tool returns the path of a program: the distribution's rather than what a
// version manager puts before it in PATH, or "" when there is none.
func Tool(name string) string {
	for _, candidate := range []string{"/usr/bin/" + name, name} {
		if path, err := exec.LookPath(candidate); err == nil {
			return path
		}
	}
	return ""
}

// lacking returns why the machine does not have what need names, or "".
func lacking(need string) string {
	switch need {
	case "root":
		if os.Geteuid() != 0 {
			return "the effective user is not root"
		}
	case "bpf":
		// BPF_MAP_CREATE (0) with a null attribute answers EINVAL or EFAULT
		// to whoever may use bpf(2), EPERM to the rest.
		_, _, errno := unix.Syscall(unix.SYS_BPF, 0, 0, 0)
		if errno == unix.EPERM || errno == unix.ENOSYS {
			return "bpf(2) answers " + errno.Error()
		}
	case "aws":
		if Tool("aws") == "" {
			return "the AWS CLI is not there; apt-get install awscli"
		}
	case "boto3":
		if out, err := exec.Command(Tool("python3"), "-c", "import boto3").CombinedOutput(); err != nil {
			return "python3 cannot import boto3; apt-get install python3-boto3: " + string(out)
		}
	case "portmap":
		if _, err := exec.LookPath(PluginDir + "/portmap"); err != nil || Tool("iptables") == "" {
			return "portmap or iptables is not there; apt-get install containernetworking-plugins iptables"
		}
	case "containerd":
		for _, program := range []string{"containerd", "ctr", "runc"} {
			if _, err := exec.LookPath(program); err != nil {
				return program + " is not there; apt-get install containerd runc"
			}
		}
	case "clang":
		_, err := os.Stat("/usr/include/bpf/bpf_helpers.h")
		if Tool("clang-14") == "" || err != nil {
			return "clang-14 or libbpf's headers are not there; apt-get install clang-14 libbpf-dev"
		}
	case "podman":
		if Tool("podman") == "" {
			return "podman is not there; apt-get install podman"
		}
	case "cluster":
		if os.Getenv("TEST_KUBERNETES") == "" {
			return "it takes a good part of an hour, and a build of Kubernetes the first time; make e2e-k8s"
		}
	case "kubernetes":
		if os.Getenv("KUBECONFIG") == "" {
			return `KUBECONFIG is not set; underlay up --kubernetes, then eval "$(underlay env)"`
		}
		if _, err := exec.LookPath("kubectl"); err != nil {
			return "kubectl is not in the PATH"
		}
	default:
		return "no test environment provides " + need
	}
	return ""
}
