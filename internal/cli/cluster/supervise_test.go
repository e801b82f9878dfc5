package cluster

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// eventually polls until ok says so.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick, deadline := time.NewTicker(5*time.Millisecond), time.After(20*time.Second)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

// aReaper makes this process one that orphans come to.
func aReaper(t *testing.T) *reaper {
	t.Helper()
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	r := newReaper()
	sigchld := make(chan os.Signal, 1)
	signal.Notify(sigchld, unix.SIGCHLD)
	done := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { defer close(done); r.Run(ctx, sigchld) }()
	t.Cleanup(func() { cancel(); <-done; signal.Stop(sigchld) })
	return r
}

func TestReaper(t *testing.T) {
	r := aReaper(t)
	if err := r.run(exec.Command("sh", "-c", "exit 3")); err == nil || err.Error() != "exit status 3" {
		t.Errorf("exit 3: %v", err)
	}
	if err := r.run(exec.Command("sh", "-c", "kill -9 $$")); err == nil || err.Error() != "killed by SIGKILL" {
		t.Errorf("killed: %v", err)
	}
	if err := r.run(exec.Command("true")); err != nil {
		t.Errorf("true: %v", err)
	}
	if err := r.run(exec.Command("/no/such/program")); err == nil {
		t.Error("a program that is not there was run")
	}

	// A grandchild whose parent ends comes to us, and goes.
	file := filepath.Join(t.TempDir(), "pid")
	if err := r.run(exec.Command("sh", "-c", "sh -c 'echo $$ >"+file+".new; mv "+file+".new "+file+"; read x </dev/null' & ")); err != nil {
		t.Fatal(err)
	}
	var pid int
	eventually(t, "the orphan has begun", func() bool {
		b, err := os.ReadFile(file)
		if err != nil {
			return false
		}
		pid, err = strconv.Atoi(strings.TrimSpace(string(b)))
		return err == nil
	})
	eventually(t, "the orphan is reaped", func() bool { return unix.Kill(pid, 0) == unix.ESRCH })
}

func TestProgramsAreKeptRunning(t *testing.T) {
	dir := t.TempDir()
	ran := filepath.Join(dir, "ran")
	socket := filepath.Join(dir, "sock")
	s := &supervisor{
		reap: aReaper(t), log: slog.New(slog.DiscardHandler), state: filepath.Join(Home(dir, "node-1"), stateFile),
		spec: &Spec{Programs: []Program{
			{Name: "ends", Argv: []string{"sh", "-c", "echo ran >>" + ran + "; exit 4"}, Log: filepath.Join(dir, "log", "ends.log")},
			{Name: "waits", Argv: []string{"sleep", "600"}, Log: filepath.Join(dir, "waits.log"), Ready: &Probe{Unix: socket}},
			{Name: "after", Argv: []string{"sleep", "600"}, Log: filepath.Join(dir, "after.log")},
		}},
	}
	if err := os.MkdirAll(Home(dir, "node-1"), 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); s.run(ctx, nil) }()
	state := func() State {
		st, err := ReadState(dir, "node-1")
		if err != nil {
			return State{Programs: make([]ProgramState, 3)}
		}
		return *st
	}
	t.Cleanup(func() {
		cancel()
		<-done
		for _, p := range state().Programs {
			if p.PID > 0 {
				_ = unix.Kill(p.PID, unix.SIGKILL)
			}
		}
	})

	eventually(t, "what ends is started again", func() bool { return state().Programs[0].Restarts >= 2 })
	if st := state(); st.Programs[0].LastEnd != "exit status 4" || st.Step != "starting waits" || st.Programs[2].Restarts != 0 || st.Programs[2].PID != 0 {
		t.Errorf("state while a program is not ready: %+v", st)
	}
	b, err := os.ReadFile(ran)
	if err != nil || strings.Count(string(b), "ran\n") < 2 {
		t.Errorf("it ran: %q, %v", b, err)
	}

	// Its socket appears: the next one's turn.
	l := listenUnix(t, socket)
	defer l.Close()
	eventually(t, "the program after it starts", func() bool { st := state(); return st.Step == "" && st.Programs[2].PID > 0 })

	// Killed, it comes again.
	first := state().Programs[2].PID
	if err := unix.Kill(first, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "what was killed is started again", func() bool {
		p := state().Programs[2]
		return p.PID > 0 && p.PID != first && p.Restarts == 1 && p.LastEnd == "killed by SIGKILL"
	})
}

func TestBootIDs(t *testing.T) {
	form := regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
	a, b := newBootID(), newBootID()
	if a == b || !form.MatchString(a) || !form.MatchString(b) {
		t.Errorf("boot IDs %q and %q", a, b)
	}
}
