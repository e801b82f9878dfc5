package cluster

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// Programs are those of the machine that a lab runs.
type Programs struct {
	Etcd       string
	Containerd string
}

// cniPlugins are what a node has in /opt/cni/bin from the start.
var cniPlugins = []string{"loopback", "portmap", "ptp", "host-local", "bandwidth", "tuning", "firewall", "bridge"}

// cniPluginDir is where Debian keeps the CNI project's plugins.
const cniPluginDir = "/usr/lib/cni"

// packages are the Debian packages of what a cluster runs, by a program of
// each.
var packages = []struct{ program, name string }{
	{"etcd", "etcd-server"},
	{"containerd", "containerd"},
	{"ctr", "containerd"},
	{"containerd-shim-runc-v2", "containerd"},
	{"runc", "runc"},
	{"iptables", "iptables"},
	{"nft", "nftables"},
	{"conntrack", "conntrack"},
	{"ipset", "ipset"},
	{"mount", "mount"},
	{filepath.Join(cniPluginDir, "portmap"), "containernetworking-plugins"},
}

// FindPrograms finds what a cluster runs of the machine's programs. When some
// are missing, the error has the command that installs them.
func FindPrograms() (Programs, error) {
	var p Programs
	missing := []string{}
	for _, want := range packages {
		path, err := exec.LookPath(want.program)
		switch {
		case err != nil:
			if !slices.Contains(missing, want.name) {
				missing = append(missing, want.name)
			}
		case want.program == "etcd":
			p.Etcd = path
		case want.program == "containerd":
			p.Containerd = path
		}
	}
	if len(missing) > 0 {
		return p, fmt.Errorf("a Kubernetes node needs programs that are not installed; install them with: apt-get install -y --no-install-recommends %s", strings.Join(missing, " "))
	}
	return p, nil
}

// InstallPlugins copies the CNI project's plugins to dir, as an installation
// of a node does.
func InstallPlugins(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("install CNI plugins: %w", err)
	}
	for _, name := range cniPlugins {
		if err := copyFile(filepath.Join(cniPluginDir, name), filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("install CNI plugin %s: %w", name, err)
		}
	}
	return nil
}

func copyFile(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	if cerr := dst.Close(); err == nil {
		err = cerr
	}
	return err
}

// machineID is the same for the same node of the same lab.
func machineID(lab, machine string) string {
	sum := sha256.Sum256([]byte("underlay/" + lab + "/" + machine))
	return hex.EncodeToString(sum[:16]) // machine-id(5): 32 digits
}
