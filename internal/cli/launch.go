package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/underlay-cni/underlay/internal/nl"
)

// program finds one of our binaries: beside this one, else in PATH.
func program(name string) (string, error) {
	if self, err := os.Executable(); err == nil {
		if self, err = filepath.EvalSymlinks(self); err == nil {
			p := filepath.Join(filepath.Dir(self), name)
			if unix.Access(p, unix.X_OK) == nil {
				return p, nil
			}
		}
	}
	p, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("find %s: it is neither beside underlay nor in PATH; build all commands with: make build", name)
	}
	return filepath.Abs(p)
}

// background starts cmd in the network namespace at netns ("" is our own),
// in a session of its own so that it outlives this terminal, with its output
// appended to log. The function it returns waits for its end; whoever started
// it need not call it.
func background(cmd *exec.Cmd, netns, log string) (proc, func() error, error) {
	what := filepath.Base(cmd.Path)
	if err := os.MkdirAll(filepath.Dir(log), 0o755); err != nil {
		return proc{}, nil, fmt.Errorf("start %s: %w", what, err)
	}
	f, err := os.OpenFile(log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return proc{}, nil, fmt.Errorf("start %s: %w", what, err)
	}
	defer f.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = nil, f, f
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &unix.SysProcAttr{}
	}
	cmd.SysProcAttr.Setsid = true
	if err := startIn(cmd, netns); err != nil {
		return proc{}, nil, fmt.Errorf("start %s: %w", what, err)
	}
	p, err := procOf(cmd.Process.Pid)
	if err != nil {
		err = cmd.Wait()
		return proc{}, nil, fmt.Errorf("start %s: it ended at once (%w); %s", what, ended(err), lastLines(log, 5))
	}
	return p, cmd.Wait, nil
}

func ended(err error) error {
	if err == nil {
		return errors.New("exit code 0")
	}
	return err
}

// startIn starts cmd from a thread that is in the network namespace at netns:
// a child begins where the thread is that forked it.
func startIn(cmd *exec.Cmd, netns string) error {
	if netns == "" {
		return cmd.Start()
	}
	return nl.Do(netns, cmd.Start)
}

// replace turns this process into argv, inside the network namespace at netns.
// It returns only when that fails. As ip-netns(8) does, it gives the program a
// mount namespace of its own in which /sys shows that network namespace; and
// /etc/resolv.conf is the file resolv, if there is one.
func replace(netns, resolv string, argv []string) error {
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return fmt.Errorf("run %s: %w", argv[0], err)
	}
	return nl.Do(netns, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("make a mount namespace: %w", err)
		}
		if err := unix.Mount("", "/", "none", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("keep mounts to ourselves: %w", err)
		}
		// Without a /sys of its own the program sees the machine's devices in
		// it; it can work all the same, so a refusal is no reason to stop.
		_ = unix.Mount("underlay", "/sys", "sysfs", 0, "")
		if exists(resolv) && exists("/etc/resolv.conf") {
			if err := unix.Mount(resolv, "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
				return fmt.Errorf("show the VPC's resolv.conf: %w", err)
			}
		}
		if err := unix.Exec(path, argv, os.Environ()); err != nil {
			return fmt.Errorf("run %s: %w", path, err)
		}
		return nil
	})
}

// lastLines returns the end of a log as a message tells it.
func lastLines(path string, n int) string {
	lines, err := tail(path, n)
	if err != nil || len(lines) == 0 {
		return "its log " + path + " is empty"
	}
	return fmt.Sprintf("the last lines of %s:\n    %s", path, strings.Join(lines, "\n    "))
}

// tail returns the last n lines of a file, of its last 64 KiB.
func tail(path string, n int) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const most = 64 << 10
	if st, err := f.Stat(); err == nil && st.Size() > most {
		if _, err := f.Seek(-most, io.SeekEnd); err != nil {
			return nil, err
		}
	}
	b, err := io.ReadAll(io.LimitReader(f, most))
	if err != nil {
		return nil, err
	}
	s := strings.TrimRight(string(b), "\n")
	if s == "" {
		return nil, nil
	}
	lines := strings.Split(s, "\n")
	return lines[max(0, len(lines)-n):], nil
}

// whileAlive runs wait with a context that ends when the process behind exited
// does: who waits for a service learns at once that it will never come.
func whileAlive(ctx context.Context, what string, exited func() error, wait func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() { // ends with the process, or with this program
		cancel(fmt.Errorf("%s ended: %w", what, ended(exited())))
	}()
	return wait(ctx)
}
