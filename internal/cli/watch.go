package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/underlay-cni/underlay/internal/cli/cluster"
)

// machineWatch waits for what the machines of a cluster do, and notices when
// they never will.
type machineWatch struct {
	home     home
	api      *cluster.API
	machines []string
}

// manyEnds is after how many ends a program that does not run just then is not
// waited for. (One that runs may have ended while it had to wait for others.)
const manyEnds = 3

// await calls done until it returns nil, as long as the machines are well. The
// error then has a log that explains it, when there is one.
func (w *machineWatch) await(ctx context.Context, done func() error) error {
	var last error
	err := poll(ctx, 150*time.Millisecond, func() (bool, error) {
		err := done()
		if err == nil {
			return true, nil
		}
		if ctx.Err() == nil {
			last = err
		}
		if p, err := readProc(w.home.forwardPID()); err != nil || !p.alive() {
			return false, &nodeError{log: w.home.forwardLog(), err: errors.New("the forwarder to the API server ended")}
		}
		for _, m := range w.machines {
			if err := w.ill(m); err != nil {
				return false, err
			}
		}
		return false, w.troubled(ctx)
	})
	if err != nil && last != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("%w: %w", err, last)
	}
	return err
}

// ill returns an error when a machine's first process has ended, or a program
// of it ends again and again.
func (w *machineWatch) ill(machine string) error {
	p, err := readProc(w.home.initPID(machine))
	if err != nil {
		return err
	}
	if !p.alive() {
		return &nodeError{log: cluster.InitLog(w.home.dir(), machine), err: fmt.Errorf("the first process of %s ended", machine)}
	}
	s, err := cluster.ReadState(w.home.dir(), machine)
	if err != nil {
		return nil // not written yet
	}
	for _, p := range s.Programs {
		if p.Restarts >= manyEnds && p.PID == 0 {
			return &nodeError{log: w.programLog(machine, p.Name), err: fmt.Errorf("%s on %s does not stay up: %s, %d times", p.Name, machine, p.LastEnd, p.Restarts)}
		}
	}
	return nil
}

// troubled returns an error when a container of the cluster's own pods ends
// again and again, or cannot be made.
func (w *machineWatch) troubled(ctx context.Context) error {
	troubles, err := w.api.Troubles(ctx, "kube-system")
	if err != nil {
		return nil // it does not answer (yet): that is for others to judge
	}
	for _, t := range troubles {
		if t.Restarts < manyEnds && !t.NoImage {
			continue
		}
		return &nodeError{
			log: w.home.containerLog(t.Node, "kube-system_"+t.Pod+"_*", t.Container),
			err: fmt.Errorf("container %s of pod %s on %s does not stay up: %s", t.Container, t.Pod, t.Node, t.Why),
		}
	}
	return nil
}

func (w *machineWatch) programLog(machine, program string) string {
	return filepath.Join(cluster.LogDir(w.home.dir(), w.home.data(), machine), program+".log")
}

// containerLog is the newest log of a container on a node, in the runtime's
// layout; "" when there is none.
func (h home) containerLog(node, pod, container string) string {
	logs, err := filepath.Glob(filepath.Join(cluster.LogDir(h.dir(), h.data(), node), "pods", pod, container, "*.log"))
	if err != nil {
		return ""
	}
	newest, when := "", time.Time{}
	for _, l := range logs {
		if st, err := os.Stat(l); err == nil && !st.ModTime().Before(when) {
			newest, when = l, st.ModTime()
		}
	}
	return newest
}
