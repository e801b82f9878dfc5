package runtimes

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/underlay-cni/underlay/test/lab"
)

// containerdList is the guide's.
const containerdList = `{"cniVersion":"1.0.0","name":"underlay","plugins":[{"type":"underlay-cni"}]}`

// Debian's containerd, its containers made by ctr.
func TestContainerd(t *testing.T) {
	w := newWorld(t, containerdList, "containerd")
	h := w.h
	daemon := startContainerd(h)
	h.run("ctr", "images", "import", "/run/bin/peer.tar")
	// ctr asks for CPU shares even when told nothing; there may be no
	// controller for them.
	ctrRun := func(more ...string) []string {
		return append([]string{"ctr", "run", "--cpu-shares", "0", "--cni"}, more...)
	}
	seen := func(name string) container {
		t.Helper()
		w.up("default-" + name)
		return container{id: "default-" + name, netns: "/proc/" + pidOf(t, h, name) + "/ns/net", exec: func(args ...string) string {
			return h.run(append([]string{"ctr", "task", "exec", "--exec-id", "e" + fmt.Sprint(time.Now().UnixNano()), name}, args...)...)
		}}
	}

	// ctr in the foreground: it makes the attachment, and ends it.
	ctr := h.start(ctrRun("--rm", imageName, "web")...)
	web := w.holds(seen("web"))
	h.run("ctr", "task", "kill", "--signal", "SIGKILL", "web")
	ctr.wait()
	w.returned("default-web", web.IP)

	// The agent is gone when the container ends: nobody waits for it, and the
	// next one knows.
	ctr = h.start(ctrRun("--rm", imageName, "web")...)
	web = w.holds(seen("web"))
	w.Kill("underlay-agent", w.node.Name)
	h.run("ctr", "task", "kill", "--signal", "SIGKILL", "web")
	ctr.wait()
	if left := h.run("ctr", "containers", "ls", "--quiet"); left != "" {
		t.Errorf("left without an agent: %s", left)
	}
	// Nor does one start without it.
	if _, stderr, err := h.try(ctrRun("--rm", imageName, "none")...); err == nil || !strings.Contains(stderr, "no agent answers") {
		t.Errorf("without an agent, ctr run: %v\n%s", err, stderr)
	}
	w.restartAgent()
	w.returned("default-web", web.IP)
	if live := w.live("default-none"); len(live) != 0 {
		t.Errorf("the container that did not start has %+v", live)
	}

	// A container outlives containerd. Detached, ctr 1.6 ends no attachment;
	// that is left to whoever removes the container, as the guide says.
	h.run(ctrRun("--detach", imageName, "keep")...)
	keep := w.holds(seen("keep"))
	daemon.kill()
	if got := lab.AskTCP(t, w.pod.Netns, netip.AddrPortFrom(keep.IP, 80)); got != w.pod.IP.String() {
		t.Errorf("without containerd the container sees the pod as %q", got)
	}
	startContainerd(h)
	w.holds(seen("keep"))
	h.run("ctr", "task", "kill", "--signal", "SIGKILL", "keep")
	lab.Eventually(t, 5*time.Second, "the task ends", func() error {
		if _, stderr, err := h.try("ctr", "task", "rm", "keep"); err != nil && !strings.Contains(stderr, "exit code 137") {
			return fmt.Errorf("%s", stderr)
		}
		return nil
	})
	h.run("ctr", "containers", "rm", "keep")
	if live := w.live("default-keep"); len(live) != 1 {
		t.Errorf("ctr ended the attachment of a detached container after all: %+v; tell the guide", live)
	}
	h.run("sh", "-c", `CNI_COMMAND=DEL CNI_CONTAINERID=default-keep CNI_IFNAME=eth0 CNI_PATH=/opt/cni/bin /opt/cni/bin/underlay-cni <<-END
		{"cniVersion":"1.0.0","name":"underlay","type":"underlay-cni"}
	END`)
	w.returned("default-keep", keep.IP)
}

// startContainerd returns once the daemon answers.
func startContainerd(h *host) *process {
	h.t.Helper()
	daemon := h.start("containerd")
	lab.Eventually(h.t, 20*time.Second, "containerd answers", func() error {
		_, stderr, err := h.try("ctr", "--connect-timeout", "1s", "version")
		if err != nil {
			return fmt.Errorf("%w: %s", err, stderr)
		}
		return nil
	})
	return daemon
}

// pidOf returns the process ID of a task once it runs.
func pidOf(t *testing.T, h *host, name string) (pid string) {
	t.Helper()
	lab.Eventually(t, 30*time.Second, name+" runs", func() error {
		tasks := h.run("ctr", "task", "ls")
		for line := range strings.Lines(tasks) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == name && f[2] == "RUNNING" {
				pid = f[1]
				return nil
			}
		}
		return errors.New(tasks)
	})
	return pid
}
