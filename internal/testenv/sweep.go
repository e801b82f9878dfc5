package testenv

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// SweepDead removes what test processes left that were killed: named network
// namespaces, and BPF file systems with their directories, whose name is the prefix,
// the process's number, a dash or nothing, and more.
func SweepDead(prefix string) {
	left, _ := filepath.Glob(filepath.Join("/run/netns", prefix+"*"))
	mounts, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); len(fields) > 2 && fields[2] == "bpf" {
			left = append(left, fields[1])
		}
	}
	for _, path := range left {
		rest, ours := strings.CutPrefix(filepath.Base(path), prefix)
		pid, _, _ := strings.Cut(rest, "-")
		if ours && dead(pid) {
			_ = unix.Unmount(path, unix.MNT_DETACH)
			_ = os.Remove(path)
		}
	}
}

func dead(pid string) bool {
	n, err := strconv.Atoi(pid)
	return err == nil && errors.Is(unix.Kill(n, 0), unix.ESRCH)
}
