package cli

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// progress tells on stderr what takes seconds: one line per step, rewritten
// with its duration on a terminal, printed once when it ends elsewhere.
type progress struct {
	w   io.Writer
	tty bool
	now func() time.Time

	mu   sync.Mutex
	open bool // a line without its end stands on the terminal
}

func newProgress(w io.Writer, now func() time.Time) *progress {
	return &progress{w: w, tty: isTerminal(w), now: now}
}

// step says that what begins; the function it returns says that it has ended,
// with how it went ("" repeats what).
func (p *progress) step(what string) (done func(result string)) {
	began := p.now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.tty {
		fmt.Fprintf(p.w, "  %s …", what)
		p.open = true
	}
	return func(result string) {
		p.mu.Lock()
		defer p.mu.Unlock()
		if result == "" {
			result = what
		}
		if p.tty && p.open {
			fmt.Fprint(p.w, "\r\x1b[K")
		}
		p.open = false
		fmt.Fprintf(p.w, "  %s (%s)\n", result, seconds(p.now().Sub(began)))
	}
}

// broken ends an open line, before an error is printed.
func (p *progress) broken() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open {
		fmt.Fprintln(p.w)
		p.open = false
	}
}

func seconds(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}
