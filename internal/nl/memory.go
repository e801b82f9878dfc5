package nl

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"
)

// memoryWait is how long AwaitMemory goes on: the kernel's worker that makes
// room needs milliseconds, on a busy machine tens of them.
const memoryWait = time.Second

// AwaitMemory calls fn again, after pauses that double from 1 ms, while it fails
// with ENOMEM, for a second in all, and returns its last error.
//
// An entry of a BPF map without preallocation is taken from a small store per CPU
// (kernel/bpf/memalloc.c), which is filled up in interrupt context: there the
// kernel may not wait for memory, and a per-CPU value comes only out of pages that
// are there already (mm/percpu.c, atomic allocations) until a worker has made
// more. A burst of updates empties the store while gigabytes are free.
func AwaitMemory(fn func() error) error {
	err := fn()
	for pause, waited := time.Millisecond, time.Duration(0); errors.Is(err, unix.ENOMEM) && waited < memoryWait; pause *= 2 {
		time.Sleep(pause) //nolint:forbidigo // the kernel tells nobody when there is memory
		waited += pause
		err = fn()
	}
	return err
}
