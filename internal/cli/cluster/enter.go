package cluster

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrNoCommand is wrapped by what Enter returns when there is no such command
// inside.
var ErrNoCommand = errors.New("there is no such command")

// Path is what a machine's programs find others by.
const Path = binInside + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Enter runs argv in all namespaces of the machine whose first process is pid,
// with the standard streams of this one and with env, and returns the exit
// code. Signals that a person sends from the terminal reach the command by
// themselves.
func Enter(pid int, argv, env []string) (int, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return 0, fmt.Errorf("find the machine's first process %d: %w", pid, err)
	}
	defer unix.Close(fd)

	type result struct {
		code int
		err  error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // for good: this thread does not come back
		code, err := enter(fd, argv, env)
		done <- result{code, err}
	}()
	r := <-done
	return r.code, r.err
}

func enter(pidfd int, argv, env []string) (int, error) {
	// A thread that shares its root and working directory with others may not
	// change its mount namespace.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return 0, fmt.Errorf("have a root of our own: %w", err)
	}
	const all = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWNET
	if err := unix.Setns(pidfd, all); err != nil {
		return 0, fmt.Errorf("enter the machine: %w", err)
	}
	path, err := lookInside(argv[0], env)
	if err != nil {
		return 0, err
	}
	cmd := &exec.Cmd{Path: path, Args: argv, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Dir: "/"}
	cmd.Env = env
	// The terminal sends these to the command too, which knows what to do.
	// They are not ignored, or the command would begin so.
	signal.Notify(make(chan os.Signal, 1), unix.SIGINT, unix.SIGQUIT)
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("run %s: %w", argv[0], err)
	}
	terminate := make(chan os.Signal, 1)
	signal.Notify(terminate, unix.SIGTERM, unix.SIGHUP)
	go func() { // ends with this program
		for s := range terminate {
			_ = cmd.Process.Signal(s) // it may have ended
		}
	}()
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			return 128 + int(ws.Signal()), nil // as a shell tells it
		}
		return exit.ExitCode(), nil
	}
	return 0, err
}

// lookInside finds a command by the PATH in env, on a thread that is inside.
func lookInside(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	path := ""
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			path = v
		}
	}
	for _, dir := range strings.Split(path, ":") {
		p := filepath.Join(dir, name)
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() && unix.Access(p, unix.X_OK) == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("run %q: %w", name, ErrNoCommand)
}

// NodeEnv is the environment of a command inside a node, made of that of a
// person's shell: programs are found as the node's own find them, ctr and
// crictl find the runtime, and kubectl speaks as the node does.
func NodeEnv(shell []string) []string {
	return withEnv(shell, "PATH="+Path, "KUBECONFIG="+etcInside+"/kubelet.conf",
		"CONTAINERD_ADDRESS="+containerdSocket, "CONTAINERD_NAMESPACE=k8s.io", "CONTAINER_RUNTIME_ENDPOINT=unix://"+containerdSocket)
}

// VPCEnv is the environment of a command on another machine of the VPC, where
// kubectl reaches the API server by its own address.
func VPCEnv(shell []string, dir, bin string) []string {
	return withEnv(shell, "PATH="+bin+":"+os.Getenv("PATH"), "KUBECONFIG="+VPCKubeconfig(dir))
}

func withEnv(env []string, more ...string) []string {
	out := slices.DeleteFunc(slices.Clone(env), func(e string) bool {
		name, _, _ := strings.Cut(e, "=")
		return slices.ContainsFunc(more, func(m string) bool { return strings.HasPrefix(m, name+"=") })
	})
	return append(out, more...)
}
