package lab

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/internal/testenv"
)

// Bin is the directory of the commands under test, built by Main.
var Bin string

// Main builds the commands under test, removes what killed runs left, and runs
// the tests; it returns their exit code.
func Main(m *testing.M) int {
	dir, err := os.MkdirTemp("", "underlay-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	Bin = dir
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", dir, "./cmd/...") // as make build does
	build.Dir = "../.."
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build the commands under test:", err)
		return 1
	}
	sweep()
	defer sweepOwn()
	return m.Run()
}

var labName = regexp.MustCompile(`^t([0-9]+)[a-z]+$`)

// sweep removes the labs that a killed run left.
func sweep() {
	entries, _ := os.ReadDir("/run/underlay")
	for _, e := range entries {
		if m := labName.FindStringSubmatch(e.Name()); m != nil {
			if pid, _ := strconv.Atoi(m[1]); syscall.Kill(pid, 0) != nil {
				_ = exec.Command(filepath.Join(Bin, "underlay"), "down", "--name", e.Name()).Run()
			}
		}
	}
}

// sweepOwn removes what a failed test of this run left.
func sweepOwn() {
	entries, _ := os.ReadDir("/run/underlay")
	for _, e := range entries {
		if m := labName.FindStringSubmatch(e.Name()); m != nil && m[1] == strconv.Itoa(os.Getpid()) {
			_ = exec.Command(filepath.Join(Bin, "underlay"), "down", "--name", e.Name()).Run()
		}
	}
}

// Lab is one running lab.
type Lab struct {
	t        testing.TB
	Name     string `json:"name"`
	Endpoint string `json:"endpoint"`
	VPCID    string `json:"vpcId"`
	Nodes    []Node `json:"nodes"`
	Outside  []struct {
		Name, InstanceID, Netns string
		IP                      netip.Addr
	} `json:"outside"`
	// Kubernetes is there when the lab was brought up with one.
	Kubernetes struct {
		Version, Kubeconfig, Bin, Source string
		ControlPlane                     struct{ Netns string }
	} `json:"kubernetes"`
}

type Node struct {
	Name, InstanceID, Netns, SubnetID, AgentSocket, CNIConfDir, CNIBinDir string
	IP                                                                    netip.Addr
}

// Exec runs a command that must succeed in the node's network namespace.
func (n Node) Exec(t testing.TB, command ...string) string {
	t.Helper()
	out, errOut, code := Execute(t, "nsenter", append([]string{"--net=" + n.Netns}, command...)...)
	if code != 0 {
		t.Fatalf("on %s: %s: exit %d\n%s%s", n.Name, strings.Join(command, " "), code, out, errOut)
	}
	return out
}

// pod is what `underlay run -o json` answers.
type Pod struct {
	Name, Node, Netns, ENI, MAC, Error string
	IP                                 netip.Addr
	AddMillis                          float64
}

var labs atomic.Int32

// Up brings a lab up, to be taken down when the test ends.
func Up(t testing.TB, args ...string) *Lab {
	t.Helper()
	testenv.Require(t, "root", "bpf")
	l := named(t)
	t.Cleanup(func() {
		if t.Failed() {
			l.showLogs()
		}
		l.Underlay("down")
	})
	l.up(args)
	return l
}

// Keep brings up a lab that other tests of the run go on with; Main takes it
// down at the end. Each test talks to it by With.
func Keep(t testing.TB, args ...string) *Lab {
	t.Helper()
	testenv.Require(t, "root", "bpf")
	l := named(t)
	l.up(args)
	return l
}

// Attach returns a lab that somebody brought up and keeps.
func Attach(t testing.TB, name string) *Lab {
	t.Helper()
	testenv.Require(t, "root", "bpf")
	b, err := os.ReadFile(filepath.Join("/run/underlay", name, "lab.json"))
	if err != nil {
		t.Fatal(err)
	}
	var f struct{ Lab *Lab }
	if err := json.Unmarshal(b, &f); err != nil || f.Lab == nil {
		t.Fatalf("lab.json of %s: %v", name, err)
	}
	f.Lab.t = t
	return f.Lab
}

// With returns the same lab, whose failures are t's.
func (l *Lab) With(t testing.TB) *Lab {
	other := *l
	other.t = t
	return &other
}

func named(t testing.TB) *Lab {
	n := labs.Add(1) - 1
	return &Lab{t: t, Name: fmt.Sprintf("t%d%c%c", os.Getpid(), 'a'+n/26, 'a'+n%26)}
}

func (l *Lab) up(args []string) {
	l.t.Helper()
	out := l.Underlay(append([]string{"up", "-o", "json", "--listen", "127.0.0.1:0"}, args...)...)
	if err := json.Unmarshal([]byte(out), l); err != nil {
		l.t.Fatalf("up -o json: %v\n%s", err, out)
	}
}

// Try runs an underlay command on the lab.
func (l *Lab) Try(args ...string) (stdout, stderr string, code int) {
	l.t.Helper()
	// --name goes after the verb and before a "--" of the command's own.
	args = append([]string{args[0], "--name", l.Name}, args[1:]...)
	return Execute(l.t, filepath.Join(Bin, "underlay"), args...)
}

// Underlay runs an underlay command that must succeed and returns its stdout.
func (l *Lab) Underlay(args ...string) string {
	l.t.Helper()
	stdout, stderr, code := l.Try(args...)
	if code != 0 {
		l.t.Fatalf("underlay %s: exit %d\n%s%s", strings.Join(args, " "), code, stdout, stderr)
	}
	return stdout
}

// Run starts one pod.
func (l *Lab) Run(name string, args ...string) Pod {
	l.t.Helper()
	var p Pod
	out := l.Underlay(append([]string{"run", name, "-o", "json"}, args...)...)
	if err := json.Unmarshal([]byte(out), &p); err != nil {
		l.t.Fatalf("run -o json: %v\n%s", err, out)
	}
	if !p.IP.IsValid() || p.Netns == "" {
		l.t.Fatalf("run %s: %s", name, out)
	}
	return p
}

func (l *Lab) OutsideIP(name string) netip.Addr {
	l.t.Helper()
	for _, o := range l.Outside {
		if o.Name == name {
			return o.IP
		}
	}
	l.t.Fatalf("no %s outside the cluster in %+v", name, l.Outside)
	return netip.Addr{}
}

func (l *Lab) Dir() string { return filepath.Join("/run/underlay", l.Name) }

// AWS runs the AWS CLI against the lab and decodes its JSON into v; nil: it says
// nothing that matters.
func (l *Lab) AWS(v any, args ...string) {
	l.t.Helper()
	testenv.Require(l.t, "aws")
	cmd := exec.Command(testenv.Tool("aws"), append([]string{"--endpoint-url", l.Endpoint, "--region", "us-east-1", "--output", "json"}, args...)...)
	cmd.Env = append(os.Environ(), "AWS_ACCESS_KEY_ID=test", "AWS_SECRET_ACCESS_KEY=test", "AWS_PAGER=")
	out, err := cmd.Output()
	if err != nil {
		var ee *exec.ExitError
		if errors.As(err, &ee) {
			l.t.Fatalf("aws %s: %v\n%s", strings.Join(args, " "), err, ee.Stderr)
		}
		l.t.Fatalf("aws %s: %v", strings.Join(args, " "), err)
	}
	if v == nil {
		return
	}
	if err := json.Unmarshal(out, v); err != nil {
		l.t.Fatalf("aws %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// Process returns the pid of the lab's process whose command line begins with
// the program and holds needle, or 0.
func (l *Lab) Process(program, needle string) int {
	l.t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		l.t.Fatal(err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		argv := strings.Split(string(cmdline), "\x00")
		if filepath.Base(argv[0]) == program && strings.Contains(string(cmdline), needle) && strings.Contains(string(cmdline), l.Name) {
			return pid
		}
	}
	return 0
}

// Kill ends a process of the lab by SIGKILL and waits until it is gone.
func (l *Lab) Kill(program, needle string) {
	l.t.Helper()
	pid := l.Process(program, needle)
	if pid == 0 {
		l.t.Fatalf("no %s process of lab %s", program, l.Name)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		l.t.Fatalf("kill %s (%d): %v", program, pid, err)
	}
	Eventually(l.t, 5*time.Second, program+" is gone", func() error {
		if p := l.Process(program, needle); p == pid {
			return fmt.Errorf("pid %d lives", pid)
		}
		return nil
	})
}

func (l *Lab) showLogs() {
	logs, _ := filepath.Glob(filepath.Join(l.Dir(), "*", "*.log"))
	more, _ := filepath.Glob(filepath.Join(l.Dir(), "*", "*", "*.log"))
	for _, f := range append(logs, more...) {
		b, _ := os.ReadFile(f)
		if len(b) > 3000 {
			b = b[len(b)-3000:]
		}
		l.t.Logf("%s:\n%s", f, b)
	}
}

// Execute runs a command to its end, at most two minutes.
func Execute(t testing.TB, name string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	cmd.WaitDelay = 2 * time.Second // children that keep the pipes open do not keep us
	// Cleanups run after the test's context ended.
	if t.Context().Err() != nil {
		cmd = exec.Command(name, args...)
		cmd.Stdout, cmd.Stderr = &out, &errOut
	}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil, errors.Is(err, exec.ErrWaitDelay):
	case errors.As(err, &exit):
		code = exit.ExitCode()
	default:
		t.Fatalf("%s %s: %v", name, strings.Join(args, " "), err)
	}
	return out.String(), errOut.String(), code
}

// Eventually polls until check returns nil.
func Eventually(t testing.TB, limit time.Duration, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v still not: %s: %v", limit, what, err)
		}
		<-time.After(20 * time.Millisecond)
	}
}

// Proof is one fact that a demo shows.
type Proof struct {
	Fact, Command, Output, Why string
	OK                         bool
}

// Demo runs a demo, which brings up a lab of its own and takes it down, and
// returns what it showed. It must succeed.
func Demo(t testing.TB, demo ...string) []Proof {
	t.Helper()
	testenv.Require(t, "root", "bpf")
	l := named(t)
	t.Cleanup(func() { l.Underlay("down") }) // of a demo that was cut off
	out := l.Underlay(append([]string{"demo", "-o", "json"}, demo...)...)
	var proofs []Proof
	if err := json.Unmarshal([]byte(out), &proofs); err != nil {
		t.Fatalf("demo -o json: %v\n%s", err, out)
	}
	left, err := filepath.Glob("/run/netns/ul-" + l.Name + "-*")
	if err != nil || len(left) > 0 {
		t.Errorf("the demo left %v (%v)", left, err)
	}
	return proofs
}

// FreeAddress is an address of loopback on which nobody listens, and whose port the
// kernel gives to nobody by chance.
func FreeAddress(t testing.TB) string {
	t.Helper()
	l, err := nl.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
