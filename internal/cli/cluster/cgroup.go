package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const cgroupDir = "/sys/fs/cgroup"

// hierarchy is one of cgroup v1, or the one of v2.
type hierarchy struct {
	name    string // below /sys/fs/cgroup: "cpu", "cpu,cpuacct", "systemd"; "" is v2
	options string // of mount(2): "cpu", "cpu,cpuacct", "none,name=systemd"
}

func (h hierarchy) unified() bool { return h.name == "" }

func (h hierarchy) dir(cgroup string) string { return filepath.Join(cgroupDir, h.name, cgroup) }

// v1 controllers that a node uses. hugetlb is left to v2 where the machine has
// it there, and net_cls and the like to nobody.
var v1Controllers = []string{"blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "hugetlb", "memory", "perf_event", "pids", "net_cls", "net_prio", "rdma", "misc", "name=systemd"}

// hierarchies reads from /proc/self/mountinfo what the machine has below
// /sys/fs/cgroup. Where there is any of v1, v2 holds no controller that a
// kubelet wants and is left out.
func hierarchies(mountinfo string) []hierarchy {
	var v1 []hierarchy
	v2 := false
	for line := range strings.Lines(mountinfo) {
		head, tail, ok := strings.Cut(strings.TrimSpace(line), " - ")
		f, g := strings.Fields(head), strings.Fields(tail)
		if !ok || len(f) < 5 || len(g) < 3 {
			continue
		}
		if g[0] == "cgroup2" && f[4] == cgroupDir {
			v2 = true
		}
		name, ok := strings.CutPrefix(f[4], cgroupDir+"/")
		if g[0] != "cgroup" || !ok || strings.Contains(name, "/") {
			continue
		}
		var controllers []string
		for _, o := range strings.Split(g[2], ",") {
			if o == "name=systemd" {
				controllers = append(controllers, "none")
			}
			if slices.Contains(v1Controllers, o) {
				controllers = append(controllers, o)
			}
		}
		if len(controllers) > 0 {
			v1 = append(v1, hierarchy{name: name, options: strings.Join(controllers, ",")})
		}
	}
	if len(v1) == 0 && v2 {
		return []hierarchy{{}}
	}
	return v1
}

func ownHierarchies() ([]hierarchy, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("look for cgroups: %w", err)
	}
	hs := hierarchies(string(b))
	if len(hs) == 0 {
		return nil, errors.New("look for cgroups: nothing is mounted below " + cgroupDir + ", and a kubelet needs them; in a container, make it privileged")
	}
	return hs, nil
}

// labCgroup is the subtree of a lab in every hierarchy.
func labCgroup(lab string) string { return "/ul-" + lab }

// cgroupOf is the subtree of a machine of a lab.
func cgroupOf(lab, machine string) string { return path.Join(labCgroup(lab), machine) }

// systemCgroup is where a machine's own programs are, below its subtree: v2
// wants processes in leaves alone.
const systemCgroup = "system"

// MakeCgroups makes the subtree of a machine in every hierarchy. What is there
// stays.
func MakeCgroups(lab, machine string) error {
	hs, err := ownHierarchies()
	if err != nil {
		return err
	}
	for _, h := range hs {
		parent := h.dir("/")
		for _, name := range []string{labCgroup(lab), machine, systemCgroup} {
			dir := filepath.Join(parent, name)
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("make cgroup %s: %w", dir, err)
			}
			if err := h.prepare(parent, dir); err != nil {
				return fmt.Errorf("make cgroup %s: %w", dir, err)
			}
			parent = dir
		}
	}
	return nil
}

// prepare makes a new cgroup fit for processes and children: a cpuset of v1
// begins without CPUs and memory, and one of v2 without controllers.
func (h hierarchy) prepare(parent, dir string) error {
	if h.unified() {
		if filepath.Base(dir) == systemCgroup {
			return nil
		}
		b, err := os.ReadFile(filepath.Join(parent, "cgroup.controllers"))
		if err != nil {
			return err
		}
		for _, c := range strings.Fields(string(b)) {
			// Those that the machine does not hand down are the kubelet's to
			// miss, which names them.
			_ = os.WriteFile(filepath.Join(parent, "cgroup.subtree_control"), []byte("+"+c), 0o644)
			_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0o644)
		}
		return nil
	}
	if !slices.Contains(strings.Split(h.options, ","), "cpuset") {
		return nil
	}
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		b, err := os.ReadFile(filepath.Join(parent, name))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name), bytes.TrimSpace(b), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// joinCgroups moves this process into the machine's own part of its subtree.
func joinCgroups(cgroup string) error {
	hs, err := ownHierarchies()
	if err != nil {
		return err
	}
	for _, h := range hs {
		file := filepath.Join(h.dir(cgroup), systemCgroup, "cgroup.procs")
		if err := os.WriteFile(file, []byte("0"), 0o644); err != nil {
			return fmt.Errorf("join cgroup: %w", err)
		}
	}
	return nil
}

// HasCgroups reports whether anything of a lab's subtree is there.
func HasCgroups(lab string) bool {
	hs, err := ownHierarchies()
	return err == nil && slices.ContainsFunc(hs, func(h hierarchy) bool {
		_, err := os.Stat(h.dir(labCgroup(lab)))
		return err == nil
	})
}

// Labs returns the names of the labs that have a subtree.
func Labs() []string {
	hs, err := ownHierarchies()
	if err != nil {
		return nil
	}
	var names []string
	for _, h := range hs {
		dirs, err := filepath.Glob(h.dir(labCgroup("*")))
		if err != nil {
			continue
		}
		for _, d := range dirs {
			names = append(names, strings.TrimPrefix(filepath.Base(d), "ul-"))
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// CgroupProcesses returns the pids of all processes in a lab's subtree.
func CgroupProcesses(lab string) []int {
	hs, err := ownHierarchies()
	if err != nil {
		return nil
	}
	var pids []int
	for _, h := range hs {
		_ = filepath.WalkDir(h.dir(labCgroup(lab)), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.Name() != "cgroup.procs" {
				return nil // what is gone has no processes
			}
			b, err := os.ReadFile(path)
			if err != nil {
				return nil
			}
			for _, s := range strings.Fields(string(b)) {
				var pid int
				if _, err := fmt.Sscan(s, &pid); err == nil && pid > 0 {
					pids = append(pids, pid)
				}
			}
			return nil
		})
	}
	slices.Sort(pids)
	return slices.Compact(pids)
}

// RemoveCgroups removes the subtree of a machine, or of the whole lab when
// machine is "". Its processes have ended; the kernel may take a moment to see
// it.
func RemoveCgroups(ctx context.Context, lab, machine string) error {
	hs, err := ownHierarchies()
	if err != nil {
		return nil // none here, so none of ours
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for {
		var errs []error
		for _, h := range hs {
			errs = append(errs, removeCgroup(h.dir(path.Join(labCgroup(lab), machine))))
		}
		err := errors.Join(errs...)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// removeCgroup removes dir and what is below it, the deepest first.
func removeCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove cgroup: %w", err)
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeCgroup(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove cgroup %s: %w", dir, err)
	}
	return nil
}
