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
// namespaces, and BPF file systems in /run with their directories, whose name is the
// prefix, the process's number, and no more or a dash and more.
func SweepDead(prefix string) {
	left, _ := filepath.Glob(filepath.Join("/run/netns", prefix+"*"))
	mounts, _ := filepath.Glob(filepath.Join("/run", prefix+"*"))
	for _, path := range append(left, mounts...) {
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
