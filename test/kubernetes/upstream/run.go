package upstream

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Suite is the test binary and what it needs.
type Suite struct {
	Binary     string // e2e.test
	Ginkgo     string // its command line, of the same version
	Kubectl    string // some specs call it
	Kubeconfig string
	Procs      int           // of Ginkgo's that run specs side by side
	Timeout    time.Duration // of the whole run
	Dir        string        // where reports and logs go; made if need be
	// Done is called for each finished spec, from the goroutine that called Run;
	// of is how many there are to run. May be nil.
	Done func(r Result, done, of int)
}

// Result is one finished spec.
type Result struct {
	Name    string  `json:"name"`
	State   string  `json:"state"` // "passed", "failed", "skipped" (by itself), "timedout", …
	Seconds float64 `json:"seconds"`
	Message string  `json:"message,omitempty"`
}

// Passed reports whether the spec was executed and holds.
func (r Result) Passed() bool { return r.State == "passed" }

// The suite's own files in Dir.
const (
	LogName      = "ginkgo.log"     // what Ginkgo printed, with each failed spec's own log
	progressName = "progress.jsonl" // a Result per line
	specsName    = "specs.txt"      // what was selected
	junitName    = "junit_01.xml"   // upstream's name for it
)

// List returns the names of the network specs that the binary has.
func (s *Suite) List(ctx context.Context) ([]string, error) {
	cmd := exec.CommandContext(ctx, s.Binary, "-list")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("list the specs of %s: %w\n%s", s.Binary, err, stderr.Bytes())
	}
	return strings.FieldsFunc(string(out), func(r rune) bool { return r == '\n' }), nil
}

// Run runs the named specs and returns what came of those that finished, in the
// order in which they did. Failed specs are no error; that the suite could not
// run is, with the end of its log.
func (s *Suite) Run(ctx context.Context, names []string) ([]Result, error) {
	if err := os.MkdirAll(s.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the folder for reports: %w", err)
	}
	progress, specs := filepath.Join(s.Dir, progressName), filepath.Join(s.Dir, specsName)
	if err := os.WriteFile(specs, []byte(strings.Join(names, "\n")+"\n"), 0o644); err != nil {
		return nil, fmt.Errorf("write the selection of specs: %w", err)
	}
	if err := os.WriteFile(progress, nil, 0o644); err != nil {
		return nil, fmt.Errorf("begin the progress file: %w", err)
	}
	log, err := os.Create(filepath.Join(s.Dir, LogName))
	if err != nil {
		return nil, fmt.Errorf("begin the log: %w", err)
	}
	defer log.Close()

	cmd := exec.CommandContext(ctx, s.Ginkgo,
		fmt.Sprintf("--procs=%d", s.Procs), "--no-color", "--timeout="+s.Timeout.String(), s.Binary, "--",
		"-kubeconfig="+s.Kubeconfig, "-kubectl-path="+s.Kubectl, "-provider=local",
		"-specs="+specs, "-progress="+progress, "-report-dir="+s.Dir)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+s.Kubeconfig)
	cmd.Stdout, cmd.Stderr = log, log
	// An interrupt lets specs clean up after themselves and reports be written.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	cmd.WaitDelay = time.Minute
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start Ginkgo: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()

	f, err := os.Open(progress)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("follow the progress: %w", err), cmd.Cancel(), <-ended)
	}
	defer f.Close()
	results, end := s.follow(f, len(names), ended)
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return results, fmt.Errorf("run the specs: %w", context.Cause(ctx))
	case end == nil, errors.As(end, &exit) && len(results) > 0:
		return results, nil // that specs failed stands in the results
	}
	return results, fmt.Errorf("run the specs: %w; the end of %s:\n%s", end, log.Name(), tail(log.Name(), 4000))
}

// follow reads results as they are appended, until the suite has ended.
func (s *Suite) follow(r io.Reader, of int, ended <-chan error) ([]Result, error) {
	var (
		results []Result
		pending []byte
	)
	read := func() {
		more, _ := io.ReadAll(r)
		pending = append(pending, more...)
		for {
			line, rest, whole := bytes.Cut(pending, []byte("\n"))
			if !whole {
				return
			}
			pending = rest
			var res Result
			if err := json.Unmarshal(line, &res); err != nil {
				res = Result{Name: string(line), State: "unreadable", Message: err.Error()}
			}
			results = append(results, res)
			if s.Done != nil {
				s.Done(res, len(results), of)
			}
		}
	}
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			read()
		case err := <-ended:
			read()
			return results, err
		}
	}
}

// tail returns the last bytes of a file.
func tail(path string, n int) []byte {
	b, _ := os.ReadFile(path)
	if len(b) > n {
		b = b[len(b)-n:]
	}
	return b
}
