package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// runDir is where all labs are. It lives as long as the machine is up, as the
// namespaces and processes do that it describes.
const runDir = "/run/underlay"

// Lab is what up made. Its JSON form is what "underlay up -o json" prints;
// lab.json holds a labFile around it.
type Lab struct {
	Name     string    `json:"name"`
	Endpoint string    `json:"endpoint"` // "http://127.0.0.1:7424"
	VPCID    string    `json:"vpcId"`
	Nodes    []Node    `json:"nodes"`
	Outside  []Outside `json:"outside"`

	Kubernetes *Kubernetes `json:"kubernetes,omitempty"`
}

// Node is an instance with an agent.
type Node struct {
	Name        string     `json:"name"`
	InstanceID  string     `json:"instanceId"`
	Netns       string     `json:"netns"` // a path
	IP          netip.Addr `json:"ip"`
	SubnetID    string     `json:"subnetId"`
	AgentSocket string     `json:"agentSocket"`
	CNIConfDir  string     `json:"cniConfDir"`
	CNIBinDir   string     `json:"cniBinDir"`
	Init        int        `json:"init,omitempty"` // with Kubernetes: its first process, whose namespaces are the node's; 0 is off
}

// Outside is what is in the VPC and not in the cluster: a VM, or a managed
// service, which is no instance.
type Outside struct {
	Name       string     `json:"name"`
	InstanceID string     `json:"instanceId"` // "" for a managed service
	Netns      string     `json:"netns"`      // a path
	IP         netip.Addr `json:"ip"`
}

// labFile is lab.json.
type labFile struct {
	Version      int       `json:"version"`
	State        string    `json:"state"` // stateMaking, stateUp
	Created      time.Time `json:"created"`
	Region       string    `json:"region"`
	InstanceType string    `json:"instanceType"`
	Prefixes     bool      `json:"prefixes,omitempty"`  // the agents take addresses as /28s
	AgentArgs    []string  `json:"agentArgs,omitempty"` // further flags of the agents
	AgentEnv     []string  `json:"agentEnv,omitempty"`  // NAME=VALUE, for the agents
	Lab          Lab       `json:"lab"`
	Servers      []server  `json:"servers"`
}

// server is a small TCP server of ours in the namespace of an outside machine.
type server struct {
	On   string `json:"on"`
	Port int    `json:"port"`
	Proc proc   `json:"proc"`
	Log  string `json:"log"`
}

const (
	labFileVersion = 1
	stateMaking    = "making"
	stateUp        = "up"
)

// home is the place of one lab on disk.
type home struct {
	run  string // runDir; tests have another
	name string
}

func (h home) dir() string      { return filepath.Join(h.run, h.name) }
func (h home) file() string     { return filepath.Join(h.dir(), "lab.json") }
func (h home) lockFile() string { return filepath.Join(h.run, h.name+".lock") }
func (h home) bpf(elem ...string) string {
	return filepath.Join(append([]string{h.dir(), "bpf"}, elem...)...)
}
func (h home) vpcd(elem ...string) string {
	return filepath.Join(append([]string{h.dir(), "vpcd"}, elem...)...)
}
func (h home) vpcdPID() string             { return filepath.Join(h.dir(), "vpcd.pid") }
func (h home) vpcdLog() string             { return h.vpcd("vpcd.log") }
func (h home) pollerPID() string           { return filepath.Join(h.dir(), "poller.pid") }
func (h home) pollerLog() string           { return filepath.Join(h.dir(), "poller.log") }
func (h home) resolvConf() string          { return filepath.Join(h.dir(), "resolv.conf") }
func (h home) iamPolicy() string           { return filepath.Join(h.dir(), "iam-policy.json") }
func (h home) agentPID(node string) string { return filepath.Join(h.node(node), "agent.pid") }
func (h home) node(node string) string     { return filepath.Join(h.dir(), "nodes", node) }
func (h home) agentLog(node string) string { return filepath.Join(h.node(node), "agent.log") }
func (h home) outsideLog(name string) string {
	return filepath.Join(h.dir(), "outside", name+".log")
}
func (h home) pods() string              { return filepath.Join(h.dir(), "pods") }
func (h home) podFile(pod string) string { return filepath.Join(h.pods(), pod+".json") }
func (h home) podLog(pod string) string  { return filepath.Join(h.pods(), pod+".log") }
func (h home) podNetns(pod string) string {
	return "ul-" + h.name + "-pod-" + pod
}

// errNoLab is wrapped by what load returns when there is no such lab.
var errNoLab = errors.New("there is no such lab")

// load reads lab.json.
func (h home) load() (*labFile, error) {
	b, err := os.ReadFile(h.file())
	if errors.Is(err, fs.ErrNotExist) {
		hint := "underlay up"
		if h.name != defaultLab {
			hint += " --name " + h.name
		}
		others, _ := labs(h.run)
		if len(others) > 0 {
			return nil, fmt.Errorf("lab %s is not up (%w); make it with: %s; or name one that is, with --name: %s", h.name, errNoLab, hint, strings.Join(others, ", "))
		}
		return nil, fmt.Errorf("lab %s is not up (%w); make it with: %s", h.name, errNoLab, hint)
	}
	if err != nil {
		return nil, fmt.Errorf("read the lab: %w", err)
	}
	var f labFile
	if err := json.Unmarshal(b, &f); err != nil {
		return nil, fmt.Errorf("read %s: %w; take the lab down with: underlay down --name %s", h.file(), err, h.name)
	}
	if f.Version != labFileVersion {
		return nil, fmt.Errorf("read %s: it is of version %d, this program knows %d; take the lab down with the underlay that made it", h.file(), f.Version, labFileVersion)
	}
	return &f, nil
}

// loadUp is load for commands that need a lab that is whole.
func (h home) loadUp() (*labFile, error) {
	f, err := h.load()
	if err != nil {
		return nil, err
	}
	if f.State != stateUp {
		return nil, fmt.Errorf("lab %s is half made: wait for the underlay up that makes it, or clear it away with: underlay down --name %s", h.name, h.name)
	}
	return f, nil
}

func (h home) save(f *labFile) error {
	return writeJSON(h.file(), f)
}

// labs returns the names of the labs that have a directory, sorted.
func labs(run string) ([]string, error) {
	entries, err := os.ReadDir(run)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list labs: %w", err)
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && CheckLab(e.Name()) == nil {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// node returns a node by its name.
func (f *labFile) node(name string) (Node, error) {
	var names []string
	for _, n := range f.Lab.Nodes {
		if n.Name == name {
			return n, nil
		}
		names = append(names, n.Name)
	}
	return Node{}, fmt.Errorf("lab %s has no node %q; it has %s", f.Lab.Name, name, strings.Join(names, ", "))
}

// machineNetns returns the namespace of a node or of an outside machine.
func (f *labFile) machineNetns(name string) (string, error) {
	var names []string
	for _, n := range f.Lab.Nodes {
		if n.Name == name || n.InstanceID == name {
			return n.Netns, nil
		}
		names = append(names, n.Name)
	}
	if k := f.Lab.Kubernetes; k != nil {
		if k.ControlPlane.Name == name || k.ControlPlane.InstanceID == name {
			return k.ControlPlane.Netns, nil
		}
		names = append(names, k.ControlPlane.Name)
	}
	for _, o := range f.Lab.Outside {
		if o.Name == name || (o.InstanceID == name && name != "") {
			return o.Netns, nil
		}
		names = append(names, o.Name)
	}
	return "", fmt.Errorf("lab %s has no machine %q; it has %s", f.Lab.Name, name, strings.Join(names, ", "))
}

// Pod is what run made, in the form that run prints.
type Pod struct {
	Name      string   `json:"name"`
	Node      string   `json:"node"`
	IP        string   `json:"ip"`
	Netns     string   `json:"netns"` // a path
	ENI       string   `json:"eni"`
	MAC       string   `json:"mac"`
	AddMillis float64  `json:"addMillis"`                // CNI ADD alone, process start included
	Groups    []string `json:"securityGroups,omitempty"` // what its ENI carries, if it asked for some
	Error     string   `json:"error"`
}

// podFile is what stands in pods/POD.json.
type podFile struct {
	Pod         Pod       `json:"pod"`
	ContainerID string    `json:"containerId"`
	Created     time.Time `json:"created"`
	Command     []string  `json:"command,omitempty"`
	Groups      string    `json:"groups,omitempty"` // security groups as asked for, with commas
	GroupsMode  string    `json:"groupsMode,omitempty"`
	Subnet      string    `json:"subnet,omitempty"` // as asked for
	Proc        proc      `json:"proc,omitzero"`
}

func (h home) loadPod(name string) (*podFile, error) {
	b, err := os.ReadFile(h.podFile(name))
	if err != nil {
		return nil, err
	}
	var p podFile
	if err := json.Unmarshal(b, &p); err != nil {
		return nil, fmt.Errorf("read %s: %w", h.podFile(name), err)
	}
	return &p, nil
}

// loadPods returns the pods of a lab, sorted by name. A file that does not
// parse is no pod: its namespace is still found by rm --all and by down.
func (h home) loadPods() ([]*podFile, error) {
	entries, err := os.ReadDir(h.pods())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list pods: %w", err)
	}
	var pods []*podFile
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		if p, err := h.loadPod(name); err == nil {
			pods = append(pods, p)
		}
	}
	slices.SortFunc(pods, func(a, b *podFile) int { return natural(a.Pod.Name, b.Pod.Name) })
	return pods, nil
}

// readProc reads the name of a process from its file.
func readProc(path string) (proc, error) {
	var p proc
	b, err := os.ReadFile(path)
	if err != nil {
		return p, fmt.Errorf("find the process: %w", err)
	}
	if err := json.Unmarshal(b, &p); err != nil {
		return p, fmt.Errorf("read %s: %w", path, err)
	}
	return p, nil
}

// writeJSON writes v to path so that a reader sees the old or the new, whole.
func writeJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode %s: %w", path, err)
	}
	return writeFile(path, append(b, '\n'), 0o644)
}

func writeFile(path string, b []byte, mode os.FileMode) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer os.Remove(tmp.Name()) // nothing to remove after the rename
	_, err = tmp.Write(b)
	if err == nil {
		err = tmp.Chmod(mode)
	}
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// lock is a held lock on a lab.
type lock struct {
	f *os.File
}

// lockLab takes the lab's lock. It waits until ctx ends; the error then says
// who holds it. The file may be removed by a down that ends: who then holds a
// lock on a file that nobody else sees tries again.
func (h home) lockLab(ctx context.Context, exclusive bool) (*lock, error) {
	if err := os.MkdirAll(h.run, 0o755); err != nil {
		return nil, fmt.Errorf("make %s: %w", h.run, err)
	}
	how := unix.LOCK_SH
	if exclusive {
		how = unix.LOCK_EX
	}
	for {
		f, err := os.OpenFile(h.lockFile(), os.O_RDWR|os.O_CREATE, 0o644)
		if err != nil {
			return nil, fmt.Errorf("lock lab %s: %w", h.name, err)
		}
		err = unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err == nil {
			if h.sameLock(f) {
				return &lock{f}, nil
			}
			f.Close()
			continue
		}
		f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, fmt.Errorf("lock lab %s: %w", h.name, err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("lab %s is in use by %s: %w; wait for it or end it, then try again", h.name, h.holders(), context.Cause(ctx))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (h home) sameLock(f *os.File) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(h.lockFile())
	return err == nil && os.SameFile(a, b)
}

// release gives the lock back; remove also takes the file away, which only the
// holder of an exclusive lock may do.
func (l *lock) release(remove string) {
	if remove != "" {
		_ = os.Remove(remove)
	}
	l.f.Close()
}

// holderPIDs returns the processes that hold a flock on the lab's lock file.
func (h home) holderPIDs() []int {
	var st unix.Stat_t
	if unix.Stat(h.lockFile(), &st) != nil {
		return nil
	}
	b, err := os.ReadFile("/proc/locks")
	if err != nil {
		return nil
	}
	return parseLocks(string(b), unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
}

// parseLocks finds in /proc/locks who holds a flock on a file. A line reads
//
//	12: FLOCK  ADVISORY  WRITE 4711 00:19:1234 0 EOF
//
// with device numbers in hexadecimal; "->" in the second field marks a waiter.
func parseLocks(locks string, major, minor uint32, ino uint64) []int {
	var pids []int
	for line := range strings.Lines(locks) {
		f := strings.Fields(line)
		if len(f) < 6 || f[1] != "FLOCK" {
			continue
		}
		var maj, mnr uint32
		var n uint64
		var pid int
		if _, err := fmt.Sscanf(f[5], "%x:%x:%d", &maj, &mnr, &n); err != nil || maj != major || mnr != minor || n != ino {
			continue
		}
		if _, err := fmt.Sscanf(f[4], "%d", &pid); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids
}

func (h home) holders() string {
	var who []string
	for _, pid := range h.holderPIDs() {
		who = append(who, describeProcess(pid))
	}
	if len(who) == 0 {
		return "another underlay command"
	}
	return strings.Join(who, ", ")
}

// natural orders names with their numbers: web-2 before web-10.
func natural(a, b string) int {
	for a != "" && b != "" {
		na, nb := digits(a), digits(b)
		if na > 0 && nb > 0 {
			x, y := strings.TrimLeft(a[:na], "0"), strings.TrimLeft(b[:nb], "0")
			if len(x) != len(y) {
				return len(x) - len(y)
			}
			if c := strings.Compare(x, y); c != 0 {
				return c
			}
			a, b = a[na:], b[nb:]
			continue
		}
		if a[0] != b[0] {
			return int(a[0]) - int(b[0])
		}
		a, b = a[1:], b[1:]
	}
	return len(a) - len(b)
}

func digits(s string) int {
	n := 0
	for n < len(s) && s[n] >= '0' && s[n] <= '9' {
		n++
	}
	return n
}
