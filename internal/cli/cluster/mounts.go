package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// covered are kernel parameters of the whole machine that a kubelet sets. A
// node has ordinary files over them: it reads what it wrote, and the machine
// stays as it is.
var covered = []string{
	"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
	"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
}

// layered are the directories of which a node sees the machine's content and
// writes to a layer of its own, which is gone with its power. They also give
// room for mount points that the machine may not have.
var layered = []string{"/etc", "/opt", "/var"}

func sortBinds(b []Bind) {
	slices.SortFunc(b, func(x, y Bind) int { return strings.Compare(x.To, y.To) })
}

// mountAll makes the view of the file system that a machine has. It runs in a
// mount namespace and a PID namespace of its own, as the first process there.
func (s *Spec) mountAll(bootID string) error {
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("keep mounts to ourselves: %w", err)
	}
	if s.Private {
		if err := s.mountPrivate(); err != nil {
			return err
		}
	}
	if err := mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	if s.Private {
		if err := cover(bootID); err != nil {
			return err
		}
	}
	// A kubelet's mounts reach its containers, and theirs reach it, when they
	// ask for that; in this namespace alone.
	if err := unix.Mount("", "/", "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("share mounts within the node: %w", err)
	}
	return nil
}

func (s *Spec) mountPrivate() error {
	// Take hold of what will be bound before /run hides it.
	trees := make([]int, len(s.Binds))
	for i, b := range s.Binds {
		fd, err := unix.OpenTree(unix.AT_FDCWD, b.From, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
		if err != nil {
			return fmt.Errorf("take hold of %s: %w", b.From, err)
		}
		defer unix.Close(fd)
		trees[i] = fd
	}
	hs, err := ownHierarchies()
	if err != nil {
		return err
	}

	if err := mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
		return err
	}
	for _, dir := range []string{"/run/netns", "/run/lock"} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return fmt.Errorf("make %s: %w", dir, err)
		}
	}
	for _, dir := range layered {
		upper, work := filepath.Join("/run/node-layers", dir, "upper"), filepath.Join("/run/node-layers", dir, "work")
		for _, d := range []string{upper, work} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				return fmt.Errorf("make %s: %w", d, err)
			}
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("make %s: %w", dir, err)
		}
		if err := mount("overlay", dir, "overlay", 0, "lowerdir="+dir+",upperdir="+upper+",workdir="+work); err != nil {
			return err
		}
	}
	for i, b := range s.Binds {
		if err := os.MkdirAll(b.To, 0o755); err != nil {
			return fmt.Errorf("make %s: %w", b.To, err)
		}
		if err := unix.MoveMount(trees[i], "", unix.AT_FDCWD, b.To, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return fmt.Errorf("bind %s to %s: %w", b.From, b.To, err)
		}
	}

	// sysfs shows the network namespace of who mounts it.
	if err := mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	if err := mountCgroups(hs); err != nil {
		return err
	}
	return mount("bpf", "/sys/fs/bpf", "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700")
}

func mountCgroups(hs []hierarchy) error {
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if hs[0].unified() {
		return mount("cgroup2", cgroupDir, "cgroup2", flags, "")
	}
	if err := mount("tmpfs", cgroupDir, "tmpfs", flags, "mode=0755"); err != nil {
		return err
	}
	for _, h := range hs {
		dir := h.dir("/")
		if err := os.Mkdir(dir, 0o755); err != nil {
			return fmt.Errorf("make %s: %w", dir, err)
		}
		if err := mount("cgroup", dir, "cgroup", flags, h.options); err != nil {
			return err
		}
		// Runtimes look for each controller under its own name.
		for _, c := range strings.Split(h.options, ",") {
			if link := filepath.Join(cgroupDir, c); c != h.name && c != "none" && !strings.HasPrefix(c, "name=") {
				if err := os.Symlink(h.name, link); err != nil {
					return fmt.Errorf("link %s: %w", link, err)
				}
			}
		}
	}
	return nil
}

// cover lays files over the kernel parameters in covered, with their values,
// and over the boot ID: that a kubelet has another one than before is how
// Kubernetes learns that a node was rebooted.
func cover(bootID string) error {
	const boot = "kernel/random/boot_id"
	for _, name := range append([]string{boot}, covered...) {
		path := filepath.Join("/proc/sys", name)
		b, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue // not in every kernel
		}
		if err != nil {
			return fmt.Errorf("cover %s: %w", path, err)
		}
		if name == boot {
			b = []byte(bootID + "\n")
		}
		file := filepath.Join("/run/node-sysctl", strings.ReplaceAll(name, "/", "."))
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return fmt.Errorf("cover %s: %w", path, err)
		}
		if err := os.WriteFile(file, b, 0o644); err != nil {
			return fmt.Errorf("cover %s: %w", path, err)
		}
		if err := unix.Mount(file, path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("cover %s: %w", path, err)
		}
	}
	return nil
}

func mount(source, target, fstype string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", fstype, target, err)
	}
	return nil
}

// writeFiles writes the files of the node's own layer. A link, as resolv.conf
// often is, is replaced: what it points to is not the node's.
func (s *Spec) writeFiles() error {
	for path, text := range s.Files {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return fmt.Errorf("write %s: %w", path, err)
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("write %s: %w", path, err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return fmt.Errorf("write %s: %w", path, err)
		}
	}
	return nil
}
