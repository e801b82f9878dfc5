package cluster

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// Cloneflags are the namespaces that a machine's first process is started in,
// besides the network namespace of its instance.
const Cloneflags = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC

// maxFiles is how many files each program of a machine may open, if the
// machine that the lab is on lets it.
const maxFiles = 65536

// Init is the life of a machine's first process. home is its directory. It
// returns only when it cannot begin, or when it is told to end, and with it
// everything in its PID namespace ends.
func Init(ctx context.Context, home string, out io.Writer) error {
	if os.Getpid() != 1 {
		return errors.New("this is for the first process of a PID namespace; underlay up --kubernetes starts it")
	}
	s, err := ReadSpec(home)
	if err != nil {
		return err
	}
	images := map[string]*os.File{} // opened before the mounts that may hide them
	for _, p := range s.Programs {
		for _, tar := range p.Images {
			f, err := os.Open(tar)
			if err != nil {
				return fmt.Errorf("open image: %w", err)
			}
			defer f.Close()
			images[tar] = f
		}
	}
	if s.Cgroup != "" {
		if err := joinCgroups(s.Cgroup); err != nil {
			return err
		}
	}
	bootID := newBootID()
	if err := s.mountAll(bootID); err != nil {
		return err
	}
	if s.Private {
		if err := s.writeFiles(); err != nil {
			return err
		}
		home = inside
	}
	if err := unix.Sethostname([]byte(s.Machine)); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return fmt.Errorf("leave the working directory: %w", err)
	}
	if err := raiseFiles(); err != nil {
		return err
	}

	sigchld := make(chan os.Signal, 1)
	signal.Notify(sigchld, unix.SIGCHLD)
	sup := &supervisor{
		spec: s, reap: newReaper(), state: filepath.Join(home, stateFile),
		log: slog.New(slog.NewTextHandler(out, nil)),
		now: State{BootID: bootID},
	}
	go sup.reap.Run(ctx, sigchld)
	sup.log.Info("machine starts", "machine", s.Machine, "lab", s.Lab)
	go sup.run(ctx, images)
	// To end means to lose power: the kernel ends all others.
	<-ctx.Done()
	sup.log.Info("machine ends")
	return nil
}

// newBootID returns a random UUID (RFC 9562, version 4), as the kernel makes
// one at its start.
func newBootID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func raiseFiles() error {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return fmt.Errorf("read the limit of open files: %w", err)
	}
	l.Cur = min(l.Max, maxFiles)
	// Of package syscall, so that children get it too: the runtime gives them
	// the limit that it was started with unless this one was called.
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return fmt.Errorf("raise the limit of open files: %w", err)
	}
	return nil
}

// ReadState reads what a machine's first process says about itself.
func ReadState(dir, machine string) (*State, error) {
	path := filepath.Join(Home(dir, machine), stateFile)
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the state of %s: %w", machine, err)
	}
	var s State
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return &s, nil
}

// writeState writes beside path and renames: a reader sees the old or the new.
func writeState(path string, s *State) error {
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
