package kubebuild

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// buildEnv is what a build sets in its environment. Together with the arguments
// it decides whether Go's own cache is hit; it is part of every key.
func buildEnv(arch string) []string {
	return []string{"CGO_ENABLED=0", "GOOS=linux", "GOARCH=" + arch, "GOWORK=off", "GOFLAGS=-buildvcs=false"}
}

// findGo returns the go command. Under sudo PATH often lacks it, so it is looked
// for where its installer puts it, too.
func findGo() (string, error) {
	for _, name := range []string{"go", "/usr/local/go/bin/go", "/usr/lib/go/bin/go"} {
		if path, err := exec.LookPath(name); err == nil {
			return filepath.Abs(path)
		}
	}
	return "", errors.New("find the go command: it is not in PATH, and Kubernetes is compiled here; install Go 1.26 or newer (https://go.dev/dl), or put it in PATH")
}

func (b *builder) goVersion(ctx context.Context) (string, error) {
	cmd := exec.CommandContext(ctx, b.goTool, "env", "GOVERSION")
	cmd.Dir = filepath.Join(b.source, kubernetesModule)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("ask %s for its version: %w: %s", b.goTool, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return string(bytes.TrimSpace(out)), nil
}

// compile runs the go command for p. Its output goes to build.log, too.
func (b *builder) compile(ctx context.Context, p program, args []string) error {
	log, err := os.OpenFile(b.folder.log(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return fmt.Errorf("build %s: %w", p.name, err)
	}
	defer log.Close()
	c := goCommand{name: p.name, pkg: p.pkg, dir: filepath.Join(b.source, p.module), args: args, env: buildEnv(arch), log: log}
	if err := b.goRun(ctx, c); err != nil {
		return fmt.Errorf("%w\n(all of it: %s)", err, b.folder.log())
	}
	return nil
}

// goCommand is a run of the go command.
type goCommand struct {
	name string // what people know it by
	pkg  string // the package whose compilation is the last
	dir  string
	args []string
	env  []string
	log  io.Writer // beside the caller's log; may be nil
}

// goRun runs the go command and tells how far it is. Its error shows the last
// lines that the command printed.
func (b *builder) goRun(ctx context.Context, c goCommand) error {
	out := &output{pkg: c.pkg, tell: func(detail string) { b.progress(c.name+": "+detail, b.done, b.of) }}
	var logs []io.Writer
	for _, w := range []io.Writer{c.log, b.log} {
		if w != nil {
			logs = append(logs, w)
		}
	}
	out.log = io.MultiWriter(logs...)
	fmt.Fprintf(out.log, "# %s: cd %s && %s go %s\n", c.name, c.dir, quoted(c.env), quoted(c.args))

	cmd := exec.CommandContext(ctx, b.goTool, c.args...)
	cmd.Dir = c.dir
	cmd.Env = append(os.Environ(), c.env...)
	cmd.Stdout, cmd.Stderr = out, out
	// A group of its own: at an interrupt go ends its compilers and removes what
	// it wrote, in its own time, and a terminal's Ctrl-C does not reach it twice.
	// When this process is killed, go ends too; the kernel looks at the thread
	// that started it.
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGINT}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGINT) }
	cmd.WaitDelay = 10 * time.Second
	err := cmd.Run()
	out.flush()
	if err != nil {
		return fmt.Errorf("build %s: %w; the compiler's last lines:\n    %s", c.name, err, strings.Join(out.said(), "\n    "))
	}
	return nil
}

func quoted(args []string) string {
	var s []string
	for _, a := range args {
		if strings.ContainsAny(a, " ") {
			a = "'" + a + "'"
		}
		s = append(s, a)
	}
	return strings.Join(s, " ")
}

// output reads what "go build -v" prints: the name of each package as its
// compilation begins, downloads, and the compiler's complaints.
type output struct {
	pkg      string // the last to be compiled
	log      io.Writer
	tell     func(detail string)
	line     []byte // begun
	packages int
	last     []string // of the complaints
}

// complaints is how many lines of them an error shows.
const complaints = 15

var (
	packageLine  = regexp.MustCompile(`^[a-zA-Z0-9_.~-]+(/[a-zA-Z0-9_.~-]+)*$`)
	downloadLine = regexp.MustCompile(`^go: (?:downloading|extracting) (\S+)`)
)

func (o *output) Write(p []byte) (int, error) {
	if _, err := o.log.Write(p); err != nil {
		return 0, err
	}
	o.line = append(o.line, p...)
	for {
		i := bytes.IndexByte(o.line, '\n')
		if i < 0 {
			return len(p), nil
		}
		o.read(string(o.line[:i]))
		o.line = o.line[i+1:]
	}
}

// flush reads a last line without an end.
func (o *output) flush() {
	if len(o.line) > 0 {
		o.read(string(o.line))
		o.line = nil
	}
}

func (o *output) read(line string) {
	if m := downloadLine.FindStringSubmatch(line); m != nil {
		o.tell("downloading " + m[1])
		return
	}
	if !packageLine.MatchString(line) {
		if strings.TrimSpace(line) != "" {
			o.last = append(o.last, line)
			o.last = o.last[max(0, len(o.last)-complaints):]
		}
		return
	}
	o.packages++
	if line == o.pkg {
		o.tell("linking")
		return
	}
	o.tell(fmt.Sprintf("%d packages compiled, now %s", o.packages-1, line))
}

// said returns the last complaints.
func (o *output) said() []string {
	if len(o.last) == 0 {
		return []string{"(nothing but the names of packages)"}
	}
	return o.last
}
