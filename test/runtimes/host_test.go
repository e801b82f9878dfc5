package runtimes

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/internal/nl"
	"github.com/underlay-cni/underlay/test/lab"
)

// host is a machine for a container runtime: a node of a lab with mounts,
// processes and cgroups of its own.
type host struct {
	t    *testing.T
	node lab.Node
	pid  int // of its init
}

// newHost starts the machine of a node, to be ended with all its processes when
// the test ends. The list is what is written into /etc/cni/net.d.
func newHost(t *testing.T, l *lab.Lab, n lab.Node, list string) *host {
	t.Helper()
	script, err := filepath.Abs("host.sh")
	if err != nil {
		t.Fatal(err)
	}
	cgroup := "underlay-" + l.Name
	cmd := exec.Command("bash", script, t.TempDir(), cgroup, filepath.Join(l.Dir(), "nodes", n.Name), lab.Bin)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdin, err := cmd.StdinPipe() // closed by our end, however that comes
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := nl.Do(n.Netns, cmd.Start); err != nil {
		t.Fatalf("start the machine of %s: %v", n.Name, err)
	}
	t.Cleanup(func() {
		stdin.Close()
		_ = cmd.Process.Kill() // and with it every process of its PID namespace
		_ = cmd.Wait()
		removeCgroups(t, cgroup)
	})
	if line, _ := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		_ = cmd.Wait()
		t.Fatalf("the machine of %s did not come up: %s", n.Name, &stderr)
	}
	h := &host{t: t, node: n, pid: cmd.Process.Pid}
	h.write("/etc/cni/net.d/10-underlay.conflist", list)
	return h
}

// removeCgroups removes the cgroups of a machine, now that nothing runs in them,
// and those that a killed test left.
func removeCgroups(t *testing.T, cgroup string) {
	t.Helper()
	const script = `mount -t cgroup2 cgroup2 "$1" && cd "$1" && for c in underlay-t*; do
		pid=${c#underlay-t} pid=${pid%%[a-z]*}
		if [ "$c" = "$2" ] || ! kill -0 "$pid" 2>/dev/null; then find "$c" -depth -type d -delete; fi
	done`
	if out, err := exec.Command("unshare", "--mount", "sh", "-c", script, "sh", t.TempDir(), cgroup).CombinedOutput(); err != nil {
		t.Errorf("remove the cgroups of %s: %v\n%s", cgroup, err, out)
	}
}

// command returns a command that runs on the machine and, like all there, in
// its cgroup.
func (h *host) command(ctx context.Context, args ...string) *exec.Cmd {
	const script = `echo 0 >/sys/fs/cgroup/init/cgroup.procs && exec "$@"`
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--target", fmt.Sprint(h.pid), "--all", "sh", "-c", script, "sh"}, args...)...)
	cmd.Env = []string{"PATH=/run/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}
	cmd.WaitDelay = 2 * time.Second // what stays behind in the background does not keep us
	return cmd
}

// try runs a command to its end, at most a minute.
func (h *host) try(args ...string) (stdout, stderr string, err error) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), time.Minute)
	defer cancel()
	cmd := h.command(ctx, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err = cmd.Run()
	return out.String(), errOut.String(), err
}

// run is try with a command that must succeed; it returns what it printed,
// without the space around it.
func (h *host) run(args ...string) string {
	h.t.Helper()
	stdout, stderr, err := h.try(args...)
	if err != nil {
		h.t.Fatalf("%s: %v\n%s%s", strings.Join(args, " "), err, stdout, stderr)
	}
	return strings.TrimSpace(stdout)
}

// write writes a file of the machine.
func (h *host) write(path, content string) {
	h.t.Helper()
	cmd := h.command(h.t.Context(), "tee", path)
	cmd.Stdin = strings.NewReader(content)
	if out, err := cmd.CombinedOutput(); err != nil {
		h.t.Fatalf("write %s: %v\n%s", path, err, out)
	}
}

// process is a command that goes on while others run.
type process struct {
	h    *host
	what string
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed when it has ended
	err  error         // after that
}

// start starts a command; its output is shown if the test fails.
func (h *host) start(args ...string) *process {
	h.t.Helper()
	p := &process{h: h, what: strings.Join(args, " "), log: filepath.Join(h.t.TempDir(), "log"), done: make(chan struct{})}
	f, err := os.Create(p.log)
	if err != nil {
		h.t.Fatal(err)
	}
	defer f.Close()
	p.cmd = h.command(context.WithoutCancel(h.t.Context()), args...)
	p.cmd.Stdout, p.cmd.Stderr = f, f
	if err := p.cmd.Start(); err != nil {
		h.t.Fatalf("%s: %v", p.what, err)
	}
	go func() { // ends with the process, that with the machine
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	h.t.Cleanup(func() {
		if b, _ := os.ReadFile(p.log); h.t.Failed() && len(b) > 0 {
			h.t.Logf("%s:\n%s", p.what, b[max(0, len(b)-4000):])
		}
	})
	return p
}

// wait waits until the process has ended by itself, well or not.
func (p *process) wait() {
	p.h.t.Helper()
	select {
	case <-p.done:
	case <-time.After(20 * time.Second):
		p.h.t.Fatalf("%s goes on after 20 s", p.what)
	}
}

// kill ends the process as a crash would. nsenter has become the process: with
// a PID namespace to enter it stays as the parent, so the child is what dies.
func (p *process) kill() {
	p.h.t.Helper()
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", p.cmd.Process.Pid, p.cmd.Process.Pid))
	if err != nil {
		p.h.t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Sscan(string(children), &pid); err != nil {
		p.h.t.Fatalf("%s has no process: %v", p.what, err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		p.h.t.Fatal(err)
	}
	p.wait()
}
