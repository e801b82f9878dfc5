package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A program that ends is started again: at once the first time, then with a
// pause that doubles, as long as it does not run for a while in between.
const (
	firstPause = 200 * time.Millisecond
	longPause  = 10 * time.Second
	whileRuns  = 30 * time.Second
)

// reaper starts processes and reaps them, and with them all orphans of the PID
// namespace: it is for its first process, where they end up. Safe for
// concurrent use.
type reaper struct {
	mu       sync.Mutex // a child that is reaped has been registered
	children map[int]chan unix.WaitStatus
}

func newReaper() *reaper { return &reaper{children: map[int]chan unix.WaitStatus{}} }

// start starts cmd. Its end arrives on the channel.
func (r *reaper) start(cmd *exec.Cmd) (int, <-chan unix.WaitStatus, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := cmd.Start(); err != nil {
		return 0, nil, err
	}
	pid, ended := cmd.Process.Pid, make(chan unix.WaitStatus, 1)
	r.children[pid] = ended
	return pid, ended, cmd.Process.Release()
}

// run starts cmd and waits for it.
func (r *reaper) run(cmd *exec.Cmd) error {
	_, ended, err := r.start(cmd)
	if err != nil {
		return err
	}
	if ws := <-ended; ws != 0 {
		return errors.New(describe(ws))
	}
	return nil
}

// Run reaps until ctx ends. sigchld delivers SIGCHLD, which is one for many
// that end at once.
func (r *reaper) Run(ctx context.Context, sigchld <-chan os.Signal) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-sigchld:
		}
		for r.reap() {
		}
	}
}

func (r *reaper) reap() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	var ws unix.WaitStatus
	pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
	if errors.Is(err, unix.EINTR) {
		return true
	}
	if err != nil || pid <= 0 {
		return false
	}
	if ended, ok := r.children[pid]; ok {
		delete(r.children, pid)
		ended <- ws
	}
	return true
}

func describe(ws unix.WaitStatus) string {
	if ws.Signaled() {
		return fmt.Sprintf("killed by %s", unix.SignalName(ws.Signal()))
	}
	return fmt.Sprintf("exit status %d", ws.ExitStatus())
}

// State is what a machine's first process writes about itself to state.json.
type State struct {
	BootID   string         `json:"bootID"`          // of this life of the machine
	Step     string         `json:"step"`            // what it does: "starting kubelet"; "" when all is started
	Error    string         `json:"error,omitempty"` // of that step
	Programs []ProgramState `json:"programs"`
}

// ProgramState is the course of a program.
type ProgramState struct {
	Name     string    `json:"name"`
	PID      int       `json:"pid,omitempty"` // inside; 0: it does not run
	Since    time.Time `json:"since,omitzero"`
	Restarts int       `json:"restarts"`
	LastEnd  string    `json:"lastEnd,omitempty"` // "exit status 1", "killed by SIGKILL"
}

// supervisor keeps the programs of a machine running.
type supervisor struct {
	spec  *Spec
	reap  *reaper
	log   *slog.Logger
	state string // a path

	mu  sync.Mutex
	now State
}

func (s *supervisor) update(change func(*State)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.now)
	if err := writeState(s.state, &s.now); err != nil {
		s.log.Warn("state not written", "err", err)
	}
}

func (s *supervisor) program(i int, change func(*ProgramState)) {
	s.update(func(st *State) { change(&st.Programs[i]) })
}

// run starts the programs in their order and keeps them running until ctx
// ends. What cannot be started is tried again: nobody else would.
func (s *supervisor) run(ctx context.Context, images map[string]*os.File) {
	for _, p := range s.spec.Programs {
		s.now.Programs = append(s.now.Programs, ProgramState{Name: p.Name})
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	for i, p := range s.spec.Programs {
		s.update(func(st *State) { st.Step, st.Error = "starting "+p.Name, "" })
		if p.After != nil {
			actx, cancel := context.WithTimeout(ctx, time.Minute)
			if err := p.After.wait(actx, nil); err != nil && ctx.Err() == nil {
				s.log.Warn("not waited for any longer", "program", p.Name, "err", err)
			}
			cancel()
		}
		wg.Go(func() { s.keep(ctx, i, p) })
		if p.Ready != nil {
			tell := func(err error) { s.update(func(st *State) { st.Error = err.Error() }) }
			if p.Ready.wait(ctx, tell) != nil {
				return
			}
			s.log.Info("program ready", "program", p.Name)
		}
		if len(p.Images) > 0 && s.loadImages(ctx, p, images) != nil {
			return
		}
	}
	s.update(func(st *State) { st.Step, st.Error = "", "" })
	s.log.Info("machine up")
}

// keep runs a program again and again until ctx ends.
func (s *supervisor) keep(ctx context.Context, i int, p Program) {
	pause := firstPause
	for {
		began := time.Now()
		how := ""
		pid, ended, err := s.startProgram(p)
		if err != nil {
			how = err.Error()
		} else {
			s.log.Info("program started", "program", p.Name, "pid", pid)
			s.program(i, func(st *ProgramState) { st.PID, st.Since = pid, began })
			select {
			case <-ctx.Done():
				return
			case ws := <-ended:
				how = describe(ws)
			}
		}
		if time.Since(began) > whileRuns {
			pause = firstPause
		}
		s.log.Warn("program ended", "program", p.Name, "how", how, "again_in", pause.String())
		s.program(i, func(st *ProgramState) { st.PID, st.Since, st.LastEnd, st.Restarts = 0, time.Time{}, how, st.Restarts+1 })
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, longPause)
	}
}

func (s *supervisor) startProgram(p Program) (int, <-chan unix.WaitStatus, error) {
	if err := os.MkdirAll(filepath.Dir(p.Log), 0o755); err != nil {
		return 0, nil, err
	}
	log, err := os.OpenFile(p.Log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return 0, nil, err
	}
	defer log.Close()
	cmd := exec.Command(p.Argv[0], p.Argv[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	return s.reap.start(cmd)
}

// imagesLoaded lists in containerd's directory what was loaded into it.
const imagesLoaded = "/var/lib/containerd/underlay-images"

// loadImages loads tarballs into containerd, those that it has not yet. A node
// that is powered on again has them.
func (s *supervisor) loadImages(ctx context.Context, p Program, images map[string]*os.File) error {
	s.update(func(st *State) { st.Step, st.Error = "loading images", "" })
	have, err := os.ReadFile(imagesLoaded)
	if err != nil {
		have = nil
	}
	had := string(have)
	list := ""
	for _, tar := range p.Images {
		f := images[tar]
		st, err := f.Stat()
		if err != nil {
			return fmt.Errorf("look at image %s: %w", tar, err)
		}
		list += fmt.Sprintf("%s %d %d\n", tar, st.Size(), st.ModTime().UnixNano())
	}
	if list == had {
		return nil
	}
	for _, tar := range p.Images {
		for {
			began := time.Now()
			err := s.loadImage(images[tar])
			if err == nil {
				s.log.Info("image loaded", "image", filepath.Base(tar), "took", time.Since(began).String())
				break
			}
			s.log.Warn("image not loaded", "image", tar, "err", err)
			s.update(func(st *State) { st.Error = err.Error() })
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(time.Second):
			}
		}
	}
	return os.WriteFile(imagesLoaded, []byte(list), 0o644)
}

func (s *supervisor) loadImage(f *os.File) error {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	cmd := exec.Command("ctr", "--address", containerdSocket, "--namespace", "k8s.io", "images", "import", "--no-unpack=false", "-")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = f, os.Stdout, os.Stderr
	if err := s.reap.run(cmd); err != nil {
		return fmt.Errorf("load image %s: ctr images import: %w", f.Name(), err)
	}
	return nil
}
