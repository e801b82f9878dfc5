package kubebuild

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// buildLock is the right to build, of one process at a time. The kernel gives it
// back when the process ends, however it ends.
type buildLock struct {
	f     *os.File
	began time.Time
}

// lockBuild waits for the lock of the cache at root, and tells every few seconds
// who has it.
func lockBuild(ctx context.Context, root string, waiting func(holder string)) (*buildLock, error) {
	if err := os.MkdirAll(root, 0o755); err != nil {
		return nil, fmt.Errorf("make the cache of Kubernetes' programs: %w; name another folder in UNDERLAY_CACHE", err)
	}
	f, err := os.OpenFile(filepath.Join(root, "lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock the cache of Kubernetes' programs: %w", err)
	}
	for told := (time.Time{}); ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			l := &buildLock{f: f, began: time.Now()}
			l.tell("beginning")
			return l, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock the cache of Kubernetes' programs: %w", err)
		}
		if time.Since(told) > time.Second {
			told = time.Now()
			waiting(holder(f))
		}
		select {
		case <-ctx.Done():
			defer f.Close()
			return nil, fmt.Errorf("wait for the build of %s: interrupted (%w)", holder(f), context.Cause(ctx))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// holder reads who has the lock: what tell wrote.
func holder(f *os.File) string {
	b := make([]byte, 256)
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) || n == 0 {
		return "another process"
	}
	return strings.TrimSpace(string(b[:n]))
}

// tell writes for others what this builder does.
func (l *buildLock) tell(what string) {
	s := fmt.Sprintf("process %d (%s, since %s)\n", os.Getpid(), what, l.began.Format("15:04:05"))
	if l.f.Truncate(0) == nil {
		_, _ = l.f.WriteAt([]byte(s), 0)
	}
}

func (l *buildLock) release() {
	_ = l.f.Truncate(0)
	l.f.Close()
}
