package nl

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

func TestAwaitMemory(t *testing.T) {
	other := errors.New("something else")
	for _, tc := range []struct {
		name  string
		fails int // with ENOMEM, before then
		then  error
		want  error
		calls int
		took  time.Duration
	}{
		{name: "at once", calls: 1},
		{name: "another error", then: other, want: other, calls: 1},
		{name: "after a while", fails: 3, calls: 4, took: 7 * time.Millisecond},
		{name: "then another error", fails: 1, then: other, want: other, calls: 2, took: time.Millisecond},
		{name: "never", fails: 1000, want: unix.ENOMEM, calls: 11, took: 1023 * time.Millisecond},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				calls, began := 0, time.Now()
				err := AwaitMemory(func() error {
					calls++
					if calls <= tc.fails {
						return fmt.Errorf("update: %w", unix.ENOMEM)
					}
					return tc.then
				})
				if !errors.Is(err, tc.want) || calls != tc.calls || time.Since(began) != tc.took {
					t.Errorf("%v after %d calls and %v, want %v, %d, %v", err, calls, time.Since(began), tc.want, tc.calls, tc.took)
				}
			})
		})
	}
}
