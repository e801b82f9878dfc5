package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// tcx attaches the programs by TCX links, pinned as links/<device>_<program>.
type tcx Datapath

func (t *tcx) pin(dev device, p program) string {
	return filepath.Join(linkDir(t.opts.BPFFS), dev.name+"_"+p.name)
}

// probe attaches to a device that does not exist.
func (t *tcx) probe() error {
	d := (*Datapath)(t)
	const noDevice = 1<<31 - 1
	return d.in(func() error {
		l, err := link.AttachTCX(link.TCXOptions{Interface: noDevice, Program: d.objs.FromPod, Attach: ebpf.AttachTCXIngress})
		switch {
		case err == nil:
			return errors.Join(errors.New("attach a program to a device that does not exist: the kernel agreed"), l.Close())
		case errors.Is(err, unix.ENODEV):
			return nil
		case errors.Is(err, ebpf.ErrNotSupported):
			return fmt.Errorf("attach programs by TCX links: Linux %s has none: run Linux 6.6 or later, built with CONFIG_NET_XGRESS, or --hook clsact: %w", kernelRelease(), err)
		}
		return fmt.Errorf("probe for TCX links (Linux 6.6; this is %s): %w", kernelRelease(), err)
	})
}

// attach puts the programs first on their hooks, so that nobody's program
// sees what ours drop.
func (t *tcx) attach(dev device) error {
	d := (*Datapath)(t)
	for _, p := range dev.programs {
		l, err := t.attached(dev, p)
		if err == nil {
			err = l.Update(p.of(d))
			_ = l.Close()
			if err != nil {
				return fmt.Errorf("replace %s of %s: %w", p.name, dev.name, err)
			}
			continue
		}
		if err := t.unpin(dev, p); err != nil {
			return err
		}
		err = d.in(func() error {
			l, err := link.AttachTCX(link.TCXOptions{Interface: dev.index, Program: p.of(d), Attach: p.tcx, Anchor: link.Head()})
			if err != nil {
				return fmt.Errorf("attach %s to %s: %w", p.name, dev.name, err)
			}
			err = l.Pin(t.pin(dev, p))
			_ = l.Close() // the pin holds it now, or it is to go
			if err != nil {
				return fmt.Errorf("pin %s of %s: %w", p.name, dev.name, err)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (t *tcx) check(dev device) error {
	var errs []error
	for _, p := range dev.programs {
		l, err := t.attached(dev, p)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		_ = l.Close()
	}
	return errors.Join(errs...)
}

// attached opens the pinned link of a program if it stands on the device; the
// caller closes it.
func (t *tcx) attached(dev device, p program) (link.Link, error) {
	path := t.pin(dev, p)
	l, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		return nil, fmt.Errorf("open pinned link %s: %w", path, err)
	}
	info, err := l.Info()
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("read pinned link %s: %w", path, err)
	}
	x := info.TCX()
	if x == nil || int(x.Ifindex) != dev.index || ebpf.AttachType(x.AttachType) != p.tcx {
		l.Close()
		return nil, fmt.Errorf("pinned link %s is detached from %s", path, dev.name)
	}
	return l, nil
}

// detach does not leave it to the kernel to detach what has no pin any more, which
// it does a moment later.
func (t *tcx) detach(dev device) error {
	for _, p := range dev.programs {
		l, err := t.attached(dev, p)
		if err != nil {
			continue // it is not there
		}
		err = l.Detach()
		_ = l.Close()
		if err != nil {
			return fmt.Errorf("detach %s of %s: %w", p.name, dev.name, err)
		}
	}
	return t.forget(dev)
}

func (t *tcx) forget(dev device) error {
	var errs []error
	for _, p := range dev.programs {
		errs = append(errs, t.unpin(dev, p))
	}
	return errors.Join(errs...)
}

func (t *tcx) unpin(dev device, p program) error {
	if err := os.Remove(t.pin(dev, p)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove pin: %w", err)
	}
	return nil
}
