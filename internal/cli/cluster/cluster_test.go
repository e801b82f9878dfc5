package cluster

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/cli/kubebuild"
)

var update = flag.Bool("update", false, "write golden files")

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("%s (-want +got; -update writes it):\n%s", name, d)
	}
}

var aDay = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func aConfig(dir string) *Config {
	return &Config{
		Lab: "demo", Dir: filepath.Join(dir, "home"), Data: filepath.Join(dir, "data"), Proxy: "nftables", CNI: CNIUnderlay, MaxPods: 29, LocalPort: 40000, Resolver: netip.MustParseAddr("10.0.0.2"), Domain: "ec2.internal",
		Artifacts: &kubebuild.Artifacts{Version: "v1.37.2", Bin: "/cache/bin", Images: []kubebuild.Image{
			{Name: "pause", Ref: "registry.k8s.io/pause:3.10.2", Tar: "/cache/images/pause.tar"},
			{Name: "coredns", Ref: "registry.k8s.io/coredns/coredns:v1.14.7", Tar: "/cache/images/coredns.tar"},
		}},
		ControlPlane: Machine{Name: ControlPlane, InstanceID: "i-0000000000000000c", Region: "us-east-1", IP: netip.MustParseAddr("10.0.0.6")},
		Nodes: []Machine{{
			Name: "node-1", InstanceID: "i-00000000000000001", Type: "m5.large", Zone: "us-east-1a", Region: "us-east-1", IP: netip.MustParseAddr("10.0.0.4"),
			Prefixes: []netip.Prefix{netip.MustParsePrefix("10.0.0.16/28"), netip.MustParsePrefix("10.0.0.32/28")},
		}},
		Programs: Programs{Etcd: "/usr/bin/etcd", Containerd: "/usr/bin/containerd"},
	}
}

// What is written is what a person would look at; the golden files are to be
// read.
func TestWhatAClusterIsMadeOf(t *testing.T) {
	dir := t.TempDir()
	c := aConfig(dir)
	if err := c.Write(aDay); err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{
		"control-plane.json": filepath.Join(Home(c.Dir, ControlPlane), specFile),
		"node.json":          filepath.Join(Home(c.Dir, "node-1"), specFile),
		"kubelet.json":       filepath.Join(Home(c.Dir, "node-1"), "etc", "kubelet.json"),
		"kube-proxy.json":    filepath.Join(Home(c.Dir, "node-1"), "etc", "kube-proxy.json"),
		"containerd.toml":    filepath.Join(Home(c.Dir, "node-1"), "etc", "containerd.toml"),
	} {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, name, []byte(strings.ReplaceAll(string(b), dir, "")))
	}
	dns, err := c.CoreDNS()
	if err != nil || !strings.Contains(string(dns), "image: registry.k8s.io/coredns/coredns:v1.14.7\n") || strings.Contains(string(dns), "{{") {
		t.Errorf("CoreDNS: %v:\n%s", err, dns)
	}
	s, err := ReadSpec(Home(c.Dir, "node-1"))
	if err != nil {
		t.Fatal(err)
	}
	want, err := c.nodeSpec(c.Nodes[0])
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, s); d != "" {
		t.Errorf("a specification is not read as it was written (-want +got):\n%s", d)
	}
}

func TestOtherCNIs(t *testing.T) {
	c := aConfig("")
	for _, cni := range []string{CNIPtp, CNINone} {
		c.CNI = cni
		if c.kubelet(c.Nodes[0])["registerWithTaints"] != nil {
			t.Errorf("with CNI %s a node waits for an agent that never comes", cni)
		}
		s, err := c.nodeSpec(c.Nodes[0])
		if err != nil {
			t.Fatal(err)
		}
		list, ok := s.Files["/etc/cni/net.d/10-ptp.conflist"]
		if ok != (cni == CNIPtp) {
			t.Errorf("with CNI %s: a config list of ptp: %v", cni, ok)
		}
		if ok {
			golden(t, "10-ptp.conflist", []byte(list))
		}
	}
}

func TestMissingImageIsNamed(t *testing.T) {
	c := aConfig(t.TempDir())
	c.Artifacts.Images = nil
	if err := c.Write(aDay); err == nil || !strings.Contains(err.Error(), "pause") {
		t.Errorf("without images: %v", err)
	}
}

func readCertificate(t *testing.T, path string) *x509.Certificate {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return parseCertificate(t, b)
}

func parseCertificate(t *testing.T, b []byte) *x509.Certificate {
	t.Helper()
	block, rest := pem.Decode(b)
	if block == nil || len(rest) > 0 {
		t.Fatalf("not one certificate: %s", b)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestCertificates(t *testing.T) {
	c := aConfig(t.TempDir())
	if err := c.Write(aDay); err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(readCertificate(t, c.pki("ca.crt")))
	at := aDay.Add(300 * 24 * time.Hour)
	verify := func(cert *x509.Certificate, name string, usage x509.ExtKeyUsage) error {
		_, err := cert.Verify(x509.VerifyOptions{Roots: roots, DNSName: name, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{usage}})
		return err
	}
	api := readCertificate(t, c.pki("apiserver.crt"))
	for _, name := range []string{"127.0.0.1", "10.0.0.6", "10.96.0.1", "localhost", "kubernetes.default.svc.cluster.local"} {
		if err := verify(api, name, x509.ExtKeyUsageServerAuth); err != nil {
			t.Errorf("the API server's certificate as %s: %v", name, err)
		}
	}
	kubelet := readCertificate(t, filepath.Join(Home(c.Dir, "node-1"), "etc/pki/kubelet.crt"))
	if err := verify(kubelet, "10.0.0.4", x509.ExtKeyUsageServerAuth); err != nil {
		t.Errorf("the kubelet's certificate: %v", err)
	}
	if verify(readCertificate(t, c.pki("kubelet-client.crt")), "", x509.ExtKeyUsageServerAuth) == nil {
		t.Error("a client's certificate is good for a server")
	}

	for path, want := range map[string]struct{ user, group, server string }{
		Kubeconfig(c.Dir):                {"admin", "system:masters", "https://127.0.0.1:40000"},
		VPCKubeconfig(c.Dir):             {"admin", "system:masters", "https://10.0.0.6:6443"},
		c.pki("controller-manager.conf"): {"system:kube-controller-manager", "", "https://127.0.0.1:6443"},
		c.pki("scheduler.conf"):          {"system:kube-scheduler", "", "https://127.0.0.1:6443"},
		filepath.Join(Home(c.Dir, "node-1"), "etc/kubelet.conf"):    {"system:node:node-1", "system:nodes", "https://10.0.0.6:6443"},
		filepath.Join(Home(c.Dir, "node-1"), "etc/kube-proxy.conf"): {"system:kube-proxy", "", "https://10.0.0.6:6443"},
	} {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var k kubeconfig
		if err := json.Unmarshal(b, &k); err != nil {
			t.Fatal(err)
		}
		cert := parseCertificate(t, k.Users[0].User.Cert)
		if err := verify(cert, "", x509.ExtKeyUsageClientAuth); err != nil {
			t.Errorf("%s: %v", path, err)
		}
		if cert.NotAfter.Sub(aDay) > certLife {
			t.Errorf("%s is good for longer than a year", path)
		}
		if got := strings.Join(cert.Subject.Organization, ","); cert.Subject.CommonName != want.user || got != want.group || k.Clusters[0].Cluster.Server != want.server {
			t.Errorf("%s is for user %q, groups %q, at %s; want %v", path, cert.Subject.CommonName, got, k.Clusters[0].Cluster.Server, want)
		}
	}
}

// Whoever reads a key of a lab is its administrator.
func TestSecretsAreTheOwnersAlone(t *testing.T) {
	c := aConfig(t.TempDir())
	if err := c.Write(aDay); err != nil {
		t.Fatal(err)
	}
	secrets := 0
	err := filepath.WalkDir(c.Dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if !strings.Contains(string(b), "PRIVATE KEY") && !strings.Contains(string(b), "client-key-data") {
			return nil
		}
		secrets++
		st, err := d.Info()
		if err == nil && st.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", path, st.Mode())
		}
		return err
	})
	if err != nil || secrets != 12 {
		t.Errorf("%d files with keys, %v", secrets, err)
	}
}
