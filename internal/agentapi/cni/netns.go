package cni

import (
	"errors"
	"os"
	"syscall"
)

const (
	nsGetType   = 0xb703     // NS_GET_NSTYPE, linux/nsfs.h
	cloneNewNet = 0x40000000 // CLONE_NEWNET, linux/sched.h
)

// isNetns returns nil when f is a network namespace.
func isNetns(f *os.File) error {
	kind, _, errno := syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), nsGetType, 0)
	if errno != 0 {
		return errors.New("it is no namespace at all")
	}
	if kind != cloneNewNet {
		return errors.New("it is a namespace of another kind")
	}
	return nil
}
