package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// proc names a process for good: pids are reused, a pid with its start time is
// not.
type proc struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks after boot, field 22 of /proc/PID/stat
}

// procOf returns the name of the process that has pid now.
func procOf(pid int) (proc, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return proc{}, fmt.Errorf("look at process %d: %w", pid, err)
	}
	start, ended, err := parseStat(b)
	if err != nil {
		return proc{}, fmt.Errorf("look at process %d: %w", pid, err)
	}
	if ended {
		return proc{}, fmt.Errorf("look at process %d: it has ended", pid)
	}
	return proc{PID: pid, Start: start}, nil
}

// parseStat returns the start time in /proc/PID/stat, and whether the process has
// ended: a killed one's first thread can be a zombie while another is in the kernel
// still, with all that the process has open. The second field is the command's name
// in parentheses, which may hold anything.
func parseStat(b []byte) (start uint64, ended bool, err error) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return 0, false, errors.New("parse stat: no command name")
	}
	f := strings.Fields(string(b[i+1:])) // f[0] is field 3, the state
	if len(f) < 20 || len(f[0]) != 1 {
		return 0, false, fmt.Errorf("parse stat: %d fields after the command name", len(f))
	}
	start, err = strconv.ParseUint(f[19], 10, 64)
	threads, threadsErr := strconv.Atoi(f[17])
	if err := errors.Join(err, threadsErr); err != nil {
		return 0, false, fmt.Errorf("parse stat: %w", err)
	}
	return start, (f[0] == "Z" || f[0] == "X") && threads <= 1, nil
}

// alive reports whether the process still runs; a zombie does not.
func (p proc) alive() bool {
	if p.PID <= 0 {
		return false
	}
	now, err := procOf(p.PID)
	return err == nil && now == p
}

// signal sends sig to the process, by a pidfd that was checked to be it.
func (p proc) signal(sig unix.Signal) error {
	if p.PID <= 0 {
		return nil
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", p.PID, err)
	}
	defer unix.Close(fd)
	if !p.alive() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal process %d: %w", p.PID, err)
	}
	return nil
}

// end stops processes: SIGTERM, then SIGKILL for what is still there after
// grace. It returns those that no signal ended.
func end(ctx context.Context, procs []proc, grace time.Duration) []proc {
	signalAll := func(sig unix.Signal) {
		for _, p := range procs {
			_ = p.signal(sig) // what still lives is seen below
		}
	}
	wait := func(d time.Duration) {
		ctx, cancel := context.WithTimeout(ctx, d)
		defer cancel()
		_ = poll(ctx, 10*time.Millisecond, func() (bool, error) {
			procs = slices.DeleteFunc(procs, func(p proc) bool { return !p.alive() })
			return len(procs) == 0, nil
		})
	}
	procs = slices.Clone(procs)
	if grace > 0 {
		signalAll(unix.SIGTERM)
		wait(grace)
	}
	signalAll(unix.SIGKILL)
	wait(5 * time.Second)
	return procs
}

// poll calls done until it reports true or an error, or until ctx ends.
func poll(ctx context.Context, every time.Duration, done func() (bool, error)) error {
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		ok, err := done()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-t.C:
		}
	}
}

// nsID names a namespace: device and inode of its file.
type nsID struct {
	dev, ino uint64
}

// netnsID returns the identity of the network namespace at path; ok is false
// when there is none (a plain file, where a mount should be).
func netnsID(path string) (id nsID, ok bool) {
	var fst unix.Statfs_t
	if unix.Statfs(path, &fst) != nil || fst.Type != unix.NSFS_MAGIC {
		return nsID{}, false
	}
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return nsID{}, false
	}
	return nsID{dev: st.Dev, ino: st.Ino}, true
}

// processesIn returns the processes whose network namespace is one of ids,
// without those in skip.
func processesIn(ids []nsID, skip []int) []proc {
	return findProcesses(skip, func(pid int) bool {
		id, ok := netnsID(fmt.Sprintf("/proc/%d/ns/net", pid))
		return ok && slices.Contains(ids, id)
	})
}

// processesOfDir returns the processes of our programs that have a path at or
// below dir among their arguments.
func processesOfDir(dir string, skip []int) []proc {
	return findProcesses(skip, func(pid int) bool {
		args := arguments(pid)
		if len(args) == 0 || !slices.Contains(programs, filepath.Base(args[0])) {
			return false
		}
		return slices.ContainsFunc(args[1:], func(a string) bool {
			_, value, ok := strings.Cut(a, "=")
			return within(a, dir) || (ok && within(value, dir))
		})
	})
}

// programs are the names that our long-running processes have.
var programs = []string{"vpcd", "underlay-agent", "underlay"}

func within(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// processesOf returns the processes that have these pids now, without those in
// skip.
func processesOf(pids, skip []int) []proc {
	var found []proc
	for _, pid := range pids {
		if p, err := procOf(pid); err == nil && !slices.Contains(skip, pid) {
			found = append(found, p)
		}
	}
	return found
}

func findProcesses(skip []int, match func(pid int) bool) []proc {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var found []proc
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || slices.Contains(skip, pid) {
			continue
		}
		p, err := procOf(pid)
		if err == nil && match(pid) {
			found = append(found, p)
		}
	}
	return found
}

// ourselves returns this process and those that it descends from.
func ourselves() []int {
	var pids []int
	for pid := os.Getpid(); pid > 0; {
		pids = append(pids, pid)
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			break
		}
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if len(f) < 2 {
			break
		}
		if pid, err = strconv.Atoi(f[1]); err != nil {
			break
		}
	}
	return pids
}

func arguments(pid int) []string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || len(b) == 0 {
		return nil
	}
	return strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")
}

func describeProcess(pid int) string {
	args := arguments(pid)
	if len(args) == 0 {
		return fmt.Sprintf("process %d", pid)
	}
	args[0] = filepath.Base(args[0])
	return fmt.Sprintf("process %d (%s)", pid, shorten(strings.Join(args, " "), 60))
}

func shorten(s string, n int) string {
	r := []rune(s)
	if len(r) <= n {
		return s
	}
	return string(r[:n-1]) + "…"
}
