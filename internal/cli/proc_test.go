package cli

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestParseStat(t *testing.T) {
	const rest = " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21\n"
	for stat, ended := range map[string]bool{
		"12 (vpcd) Z 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 1 0 4711 20 21": true,
		"12 (vpcd) Z 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 2 0 4711 20 21": false,
		"12 (vpcd) D 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 1 0 4711 20 21": false,
	} {
		if start, got, err := parseStat([]byte(stat)); err != nil || start != 4711 || got != ended {
			t.Errorf("parseStat(%q) = %d, %t, %v", stat, start, got, err)
		}
	}
	for stat, ok := range map[string]bool{
		"12 (vpcd)" + rest:        true,
		"12 (a) b (c ) d)" + rest: true,
		"12 (vpcd) S 1 2 3":       false,
		"":                        false,
		"12 vpcd S":               false,
		"12 (x)" + " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 x 20": false,
	} {
		start, ended, err := parseStat([]byte(stat))
		if (err == nil) != ok || (ok && (start != 4711 || ended)) {
			t.Errorf("parseStat(%q) = %d, %t, %v", stat, start, ended, err)
		}
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("12 (vpcd) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21\n"))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _, _ = parseStat(b) })
}

func TestEnd(t *testing.T) {
	soft, hard := exec.Command("sleep", "60"), exec.Command("bash", "-c", "trap '' TERM; echo ready; while :; do read -t 60; done")
	in, err := hard.StdinPipe() // keeps read waiting
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := hard.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var procs []proc
	for _, c := range []*exec.Cmd{soft, hard} {
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		p, err := procOf(c.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		procs = append(procs, p)
	}
	if _, err := out.Read(make([]byte, 10)); err != nil { // its trap is set
		t.Fatal(err)
	}
	if !procs[0].alive() {
		t.Fatal("a process that runs is not alive")
	}
	other := procs[0]
	other.Start++ // the pid of another process, in another life
	if other.alive() {
		t.Error("a reused pid is taken for the process")
	}
	if err := other.signal(unix.SIGKILL); err != nil || !procs[0].alive() {
		t.Errorf("a reused pid was signalled: %v", err)
	}
	if left := end(t.Context(), procs, 50*time.Millisecond); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	_ = soft.Wait()
	if err := hard.Wait(); err == nil {
		t.Error("who ignores SIGTERM was not killed")
	}
}

const leaderEnv = "UL_TEST_LEADER_ENDS_FIRST"

// init is of a child that TestLeaderEndsFirst starts: its first thread ends, another
// waits for the end of standard input.
func init() {
	if os.Getenv(leaderEnv) == "" {
		return
	}
	waits := make(chan struct{})
	go func() {
		goruntime.LockOSThread()
		close(waits)
		_, _ = unix.Read(0, make([]byte, 1))
		unix.Exit(0)
	}()
	<-waits
	_, _, _ = unix.RawSyscall(unix.SYS_EXIT, 0, 0, 0) // of this thread alone, which init runs on
}

// A process has not ended while one of its threads lives.
func TestLeaderEndsFirst(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), leaderEnv+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	p, err := procOf(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	zombie := func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID))
		return err == nil && bytes.Contains(b, []byte(") Z "))
	}
	if err := poll(t.Context(), time.Millisecond, func() (bool, error) { return zombie(), nil }); err != nil {
		t.Fatal(err)
	}
	if !p.alive() {
		t.Error("it has ended while a thread of it lives")
	}
	in.Close()
	if err := poll(t.Context(), time.Millisecond, func() (bool, error) { return !p.alive(), nil }); err != nil || !zombie() {
		t.Errorf("when its last thread has ended: %v", err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

func TestProcessesOfDir(t *testing.T) {
	dir := t.TempDir()
	run := func(name string, args ...string) proc {
		// A shell that has our arguments, as vpcd would.
		cmd := &exec.Cmd{Path: "/bin/bash", Args: append([]string{name, "-c", "read -t 60; exit", "x"}, args...)}
		in, err := cmd.StdinPipe() // keeps read waiting
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { in.Close() })
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		p, err := procOf(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	lab := filepath.Join(dir, "demo")
	want := []proc{run("/x/vpcd", "--dir", lab+"/vpcd"), run("underlay-agent", "--socket="+lab+"/agent.sock")}
	run("vpcd", "--dir", lab+"-2/vpcd") // another lab's
	run("vi", lab+"/lab.json")          // a person's
	got := processesOfDir(lab, nil)
	slices.SortFunc(got, func(a, b proc) int { return a.PID - b.PID })
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if got := processesOfDir(lab, []int{want[0].PID}); len(got) != 1 {
		t.Errorf("skipped none: %v", got)
	}
}

func TestOurselves(t *testing.T) {
	pids := ourselves()
	if !slices.Contains(pids, os.Getpid()) || !slices.Contains(pids, os.Getppid()) {
		t.Errorf("ourselves() = %v, want %d and %d in it", pids, os.Getpid(), os.Getppid())
	}
}

func TestMountsBelow(t *testing.T) {
	const mountinfo = `22 1 0:21 / / rw - ext4 /dev/vda rw
23 22 0:22 / /run rw - tmpfs tmpfs rw
24 23 0:23 / /run/underlay/demo/bpf rw - bpf bpffs rw
25 23 0:23 / /run/underlay/demo-2/bpf rw - bpf bpffs rw
26 24 0:24 / /run/underlay/demo/bpf/a\040b rw - bpf bpffs rw
short
`
	want := []string{"/run/underlay/demo/bpf", "/run/underlay/demo/bpf/a b"}
	if d := cmp.Diff(want, mountsBelow(mountinfo, "/run/underlay/demo")); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}
