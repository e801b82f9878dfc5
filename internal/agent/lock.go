package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// lockPoll is how often the lock is tried while another agent has it.
const lockPoll = 200 * time.Millisecond

// Lock makes this process the one agent of the socket: it waits until no other
// holds the lock, which is beside the socket and ends with its process. During
// an update the new agent waits here, and has touched neither the socket nor
// EC2 nor the kernel.
func Lock(ctx context.Context, socket string, log *slog.Logger) (*os.File, error) {
	path := socket + ".lock"
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the lock: %w", err)
	}
	said := false
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			_ = f.Truncate(0)
			_, _ = f.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0) // for people
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if !said {
			pid, _ := os.ReadFile(path)
			log.Warn("another agent serves this node; waiting for its end", "op", "lock", "path", path, "pid", strings.TrimSpace(string(pid)))
			said = true
		}
		t := time.NewTimer(lockPoll)
		select {
		case <-ctx.Done():
			t.Stop()
			f.Close()
			return nil, ctx.Err()
		case <-t.C:
		}
	}
}
