package kubebuild

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// Reporter tells people how a build goes: on a terminal one line that is
// rewritten each second and stays with its duration when a step ends, elsewhere
// a line when a step begins and every ten seconds while it lasts.
type Reporter struct {
	w   io.Writer
	tty bool
	now func() time.Time

	mu       sync.Mutex
	step     string // what precedes the colon
	detail   string
	done, of int
	began    time.Time // of the whole
	stepped  time.Time // when the step began
	printed  time.Time // when a line was last printed
	quit     chan struct{}
	ended    chan struct{}
}

// NewReporter returns a reporter that writes to w. Progress is for Options; End
// has to be called.
func NewReporter(w io.Writer, tty bool) *Reporter {
	return &Reporter{w: w, tty: tty, now: time.Now}
}

// Progress is Options.Progress.
func (r *Reporter) Progress(what string, done, of int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	step, detail, _ := strings.Cut(what, ": ")
	now := r.now()
	if r.quit == nil {
		r.began = now
		r.quit, r.ended = make(chan struct{}), make(chan struct{})
		go r.tick(r.quit, r.ended) // until End
	}
	if step == r.step && done == r.done {
		r.detail = detail
		return
	}
	r.finish(now)
	r.step, r.detail, r.done, r.of, r.stepped = step, detail, done, of, now
	if done < of {
		r.print(now)
		if r.tty && detail != "" { // said before the step began: it is worth a line
			fmt.Fprintln(r.w)
		}
	}
}

// End ends the output. It may be called without any Progress.
func (r *Reporter) End() {
	r.mu.Lock()
	quit, ended := r.quit, r.ended
	r.mu.Unlock()
	if quit == nil {
		return
	}
	close(quit)
	<-ended
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.tty {
		fmt.Fprint(r.w, "\r\x1b[K")
	}
	r.quit = nil
}

// tick prints while nothing is told: a link of a large program is silent.
func (r *Reporter) tick(quit, ended chan struct{}) {
	defer close(ended)
	every := 10 * time.Second
	if r.tty {
		every = time.Second
	}
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		select {
		case <-quit:
			return
		case <-t.C:
			r.mu.Lock()
			if now := r.now(); r.done < r.of && now.Sub(r.printed) >= every {
				r.print(now)
			}
			r.mu.Unlock()
		}
	}
}

// finish says that the step has ended, if one was begun.
func (r *Reporter) finish(now time.Time) {
	if r.step == "" || r.of == 0 {
		return
	}
	line := fmt.Sprintf("  [%d/%d] %s: done (%s)\n", r.done+1, r.of, r.step, length(now.Sub(r.stepped)))
	if r.tty {
		fmt.Fprint(r.w, "\r\x1b[K"+line)
	} else if now.Sub(r.stepped) >= time.Second {
		fmt.Fprint(r.w, line)
	}
}

// print prints the present state.
func (r *Reporter) print(now time.Time) {
	r.printed = now
	text := r.step
	if r.detail != "" {
		text += ": " + r.detail
	}
	line := fmt.Sprintf("  [%d/%d] %s", r.done+1, r.of, text)
	if elapsed := now.Sub(r.stepped); elapsed >= time.Second {
		line += fmt.Sprintf(" (%s, %s in all)", length(elapsed), length(now.Sub(r.began)))
	}
	if r.tty {
		const width = 110 // a line that wraps cannot be rewritten
		if len(line) > width {
			line = line[:width-1] + "…"
		}
		fmt.Fprint(r.w, "\r\x1b[K"+line)
		return
	}
	fmt.Fprintln(r.w, line)
}

// length is a duration as people read it: "850ms", "41s", "4m10s".
func length(d time.Duration) string {
	if d < time.Second {
		return d.Round(time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}
