package nl

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// NetnsDir is where named network namespaces are, as ip-netns(8) keeps them.
const NetnsDir = "/run/netns"

// Path returns the path of the network namespace called name.
func Path(name string) string { return filepath.Join(NetnsDir, name) }

// Do runs fn on a thread that is in the network namespace at nsPath, and
// returns its error. Everything that names a device by index or opens a socket
// belongs in fn; what it opens stays in that namespace.
//
// fn runs in a goroutine of its own, locked to its thread, and must not start
// another one: that would run elsewhere. A thread that cannot be put back
// (because setns fails, or fn ends by runtime.Goexit) is discarded. Safe for
// concurrent use.
func Do(nsPath string, fn func() error) error {
	target, err := unix.Open(nsPath, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open network namespace %s: %w", nsPath, err)
	}
	defer unix.Close(target)
	return onThread(func() error {
		if err := unix.Setns(target, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", nsPath, err)
		}
		return fn()
	})
}

// DoNew is Do in a network namespace made for it, which goes with what fn
// leaves open there.
func DoNew(fn func() error) error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network namespace: %w", err)
		}
		return fn()
	})
}

// onThread runs fn on a locked thread whose network namespace fn may change,
// and puts the thread back afterwards.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // without an Unlock, the thread ends with the goroutine
		result := errors.New("run in network namespace: function ended its goroutine")
		defer func() { done <- result }()
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			result = fmt.Errorf("open own network namespace: %w", err)
			return
		}
		defer unix.Close(home)
		result = fn()
		if unix.Setns(home, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return <-done
}

// NewNamed makes a network namespace with its loopback device up, and binds it
// to Path(name). It appears there whole or not at all; a plain file that an
// interrupted attempt left there is replaced. It returns an error that wraps
// fs.ErrExist if a namespace of that name is there.
//
// As ip-netns(8) does, it makes /run/netns a shared mount point first:
// otherwise the ip command would do so later by binding the directory onto
// itself, and a second copy of each namespace's mount would lie hidden below,
// where no unmount reaches it and keeps the namespace alive.
func NewNamed(name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	unlock, err := lockNetnsDir()
	if err != nil {
		return err
	}
	defer unlock()

	path := Path(name)
	if isNetns(path) {
		return fmt.Errorf("make network namespace %s: %w", name, fs.ErrExist)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE, 0o444)
	if err != nil {
		return fmt.Errorf("make network namespace %s: %w", name, err)
	}
	f.Close()
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace %s: %w", name, err)
		}
		if err := loopbackUp(); err != nil {
			return fmt.Errorf("set lo up in network namespace %s: %w", name, err)
		}
		if err := unix.Mount("/proc/thread-self/ns/net", path, "none", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind network namespace to %s: %w", path, err)
		}
		return nil
	})
	if err != nil {
		_ = os.Remove(path)
	}
	return err
}

// DeleteNamed unbinds the network namespace called name. The namespace itself
// lives on as long as a process, a socket or an open file holds it. It returns
// nil if there is none.
func DeleteNamed(name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	path := Path(name)
	for {
		// Mounts can be stacked; EINVAL: nothing (more) is mounted here.
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		if errors.Is(err, unix.EINVAL) {
			break
		}
		if err != nil {
			return fmt.Errorf("unmount network namespace %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete network namespace %s: %w", name, err)
	}
	return nil
}

// ExistsNamed tells whether a network namespace is bound to Path(name).
func ExistsNamed(name string) bool { return checkName(name) == nil && isNetns(Path(name)) }

func checkName(name string) error {
	if name == "" || name == "." || name == ".." || len(name) > 255 || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("%q is no name for a network namespace", name)
	}
	return nil
}

func isNetns(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.NSFS_MAGIC
}

// lockNetnsDir makes the directory and its mount, and locks it (flock) against
// other processes that do the same.
func lockNetnsDir() (unlock func(), err error) {
	if err := os.MkdirAll(NetnsDir, 0o755); err != nil {
		return nil, fmt.Errorf("make %s: %w", NetnsDir, err)
	}
	dir, err := os.Open(NetnsDir)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", NetnsDir, err)
	}
	for {
		err = unix.Flock(int(dir.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		dir.Close()
		return nil, fmt.Errorf("lock %s: %w", NetnsDir, err)
	}
	share := func() error { return unix.Mount("", NetnsDir, "none", unix.MS_SHARED|unix.MS_REC, "") }
	if err := share(); errors.Is(err, unix.EINVAL) { // not a mount point yet
		if err := unix.Mount(NetnsDir, NetnsDir, "none", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			dir.Close()
			return nil, fmt.Errorf("bind %s onto itself: %w", NetnsDir, err)
		}
		if err := share(); err != nil {
			dir.Close()
			return nil, fmt.Errorf("share mount %s: %w", NetnsDir, err)
		}
	} else if err != nil {
		dir.Close()
		return nil, fmt.Errorf("share mount %s: %w", NetnsDir, err)
	}
	return func() { dir.Close() }, nil
}

// loopbackUp sets lo up in the calling thread's namespace.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, ifr); err != nil {
		return err
	}
	ifr.SetUint16(ifr.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}
