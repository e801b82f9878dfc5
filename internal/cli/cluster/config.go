package cluster

import (
	"bytes"
	"crypto/x509"
	_ "embed"
	"encoding/pem"
	"fmt"
	"net/netip"
	"path/filepath"
	"text/template"
	"time"

	"github.com/underlay-cni/underlay/internal/cli/kubebuild"
)

// The service network of a lab, beside its VPC's 10.0.0.0/16.
const (
	serviceCIDR   = "10.96.0.0/16"
	serviceAPI    = "10.96.0.1" // the first address is the API server's own service
	serviceDNS    = "10.96.0.10"
	clusterDomain = "cluster.local"
)

// APIPort is where the API server listens in the control plane's namespace.
const APIPort = 6443

// Taint keeps pods off a node until its agent serves; the agent removes it.
const Taint = "underlay.dev/agent-not-ready"

// The CNIs that a lab can be made with.
const (
	CNIUnderlay = "underlay"
	CNIPtp      = "ptp" // the CNI project's ptp and host-local, on addresses of delegated prefixes: to compare with
	CNINone     = "none"
)

// CNIs are the known ones, the default first.
var CNIs = []string{CNIUnderlay, CNIPtp, CNINone}

// ProxyModes are the modes of kube-proxy, the default first.
var ProxyModes = []string{"nftables", "iptables"}

// Config describes a cluster before it is there.
type Config struct {
	Lab       string
	Dir       string // of the lab: what is small, and secret
	Data      string // of the lab, on a disk: images, containers, etcd
	Artifacts *kubebuild.Artifacts
	Proxy     string // kube-proxy's mode
	CNI       string
	MaxPods   int
	LocalPort int // of the forwarder to the API server

	Resolver netip.Addr // the VPC's name server
	Domain   string     // what the VPC's names end with

	ControlPlane Machine
	Nodes        []Machine

	Programs Programs
}

// image returns the name of one of the images.
func (c *Config) image(name string) (string, error) {
	i, ok := c.Artifacts.Image(name)
	if !ok {
		return "", fmt.Errorf("there is no image %s among those that were built", name)
	}
	return i.Ref, nil
}

// tars returns the archives of all images.
func (c *Config) tars() []string {
	var tars []string
	for _, i := range c.Artifacts.Images {
		tars = append(tars, i.Tar)
	}
	return tars
}

// Machine is an instance of the VPC.
type Machine struct {
	Name       string
	InstanceID string
	Type       string
	Zone       string
	Region     string
	IP         netip.Addr
	Prefixes   []netip.Prefix // for CNIPtp: the addresses of its pods
}

// ProviderID names the instance as Kubernetes does.
func (m Machine) ProviderID() string { return "aws:///" + m.Zone + "/" + m.InstanceID }

// The places of a cluster on disk.
func (c *Config) home(machine string) string { return Home(c.Dir, machine) }

// Home is the directory of what a machine's first process reads and writes
// outside: spec.json, state.json, its log, and etc/ for configuration.
func Home(dir, machine string) string { return filepath.Join(dir, "nodes", machine) }

// ControlPlane is the name of the machine that the control plane is on.
const ControlPlane = "control-plane"

// Kubeconfig is the administrator's kubeconfig of the lab in dir.
func Kubeconfig(dir string) string { return filepath.Join(dir, "kubernetes", "admin.conf") }

// VPCKubeconfig is the same for use inside the VPC.
func VPCKubeconfig(dir string) string { return filepath.Join(dir, "kubernetes", "admin-vpc.conf") }

func (c *Config) pki(name string) string { return filepath.Join(c.home(ControlPlane), "etc", name) }

// apiURL is the API server as nodes and the control plane reach it.
func (c *Config) apiURL() string {
	return "https://" + netip.AddrPortFrom(c.ControlPlane.IP, APIPort).String()
}

// Write makes the certificates, kubeconfigs, configurations and specifications
// of all machines. Keys are readable by their owner alone.
func (c *Config) Write(now time.Time) error {
	ca, caPair, err := newAuthority("underlay-lab-"+c.Lab, now)
	if err != nil {
		return err
	}
	issue := func(s subject) (p pair) {
		if err == nil {
			p, err = ca.issue(s)
		}
		return p
	}
	loopback := netip.MustParseAddr("127.0.0.1")
	api := issue(subject{user: "kube-apiserver", ips: []netip.Addr{loopback, c.ControlPlane.IP, netip.MustParseAddr(serviceAPI)}, names: []string{
		"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc." + clusterDomain,
	}})
	admin := issue(subject{user: "admin", groups: []string{"system:masters"}})
	controllers := issue(subject{user: "system:kube-controller-manager"})
	scheduler := issue(subject{user: "system:kube-scheduler"})
	toKubelets := issue(subject{user: "kube-apiserver-kubelet-client", groups: []string{"system:masters"}})
	frontProxy := issue(subject{user: "front-proxy-client"})
	proxy := issue(subject{user: "system:kube-proxy"})
	tokens := issue(subject{user: "service-account-tokens"}) // of which only the key is used
	if err != nil {
		return err
	}
	local := "https://" + netip.AddrPortFrom(loopback, APIPort).String()

	etc := &files{dir: filepath.Dir(c.pki("ca.crt"))}
	etc.pair("ca", caPair)
	etc.pair("apiserver", api)
	etc.pair("kubelet-client", toKubelets)
	etc.pair("front-proxy-client", frontProxy)
	etc.write("service-account.key", tokens.key, 0o600)
	etc.write("service-account.pub", tokens.public(), 0o644)
	etc.json("controller-manager.conf", newKubeconfig(c.Lab, "system:kube-controller-manager", local, caPair.cert, controllers), 0o600)
	etc.json("scheduler.conf", newKubeconfig(c.Lab, "system:kube-scheduler", local, caPair.cert, scheduler), 0o600)
	person := &files{dir: filepath.Dir(Kubeconfig(c.Dir))}
	person.json(filepath.Base(Kubeconfig(c.Dir)), newKubeconfig(c.Lab, "admin", fmt.Sprintf("https://127.0.0.1:%d", c.LocalPort), caPair.cert, admin), 0o600)
	person.json(filepath.Base(VPCKubeconfig(c.Dir)), newKubeconfig(c.Lab, "admin", c.apiURL(), caPair.cert, admin), 0o600)
	spec := &files{dir: c.home(ControlPlane)}
	spec.json(specFile, c.controlPlaneSpec(), 0o644)
	for _, f := range []*files{etc, person, spec} {
		if f.err != nil {
			return f.err
		}
	}

	for _, n := range c.Nodes {
		kubelet := issue(subject{user: "system:node:" + n.Name, groups: []string{"system:nodes"}, names: []string{n.Name}, ips: []netip.Addr{n.IP}})
		if err != nil {
			return err
		}
		f := &files{dir: c.home(n.Name)}
		f.write("etc/pki/ca.crt", caPair.cert, 0o644)
		f.pair("etc/pki/kubelet", kubelet)
		f.json("etc/kubelet.conf", newKubeconfig(c.Lab, "system:node:"+n.Name, c.apiURL(), caPair.cert, kubelet), 0o600)
		f.json("etc/kube-proxy.conf", newKubeconfig(c.Lab, "system:kube-proxy", c.apiURL(), caPair.cert, proxy), 0o600)
		f.json("etc/kubelet.json", c.kubelet(n), 0o644)
		f.json("etc/kube-proxy.json", c.kubeProxy(n), 0o644)
		toml, err := c.containerd()
		if err != nil {
			return err
		}
		f.write("etc/containerd.toml", toml, 0o644)
		s, err := c.nodeSpec(n)
		if err != nil {
			return err
		}
		f.json(specFile, s, 0o644)
		if f.err != nil {
			return f.err
		}
	}
	return nil
}

// public returns the public half of the key, in PEM.
func (p pair) public() []byte {
	block, _ := pem.Decode(p.cert)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		panic("cluster: our own certificate does not parse: " + err.Error())
	}
	der, err := x509.MarshalPKIXPublicKey(cert.PublicKey)
	if err != nil {
		panic("cluster: our own key does not encode: " + err.Error())
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

// object is a Kubernetes configuration object, written as JSON, which is YAML.
type object = map[string]any

// kubelet is a KubeletConfiguration (kubelet.config.k8s.io/v1beta1).
func (c *Config) kubelet(n Machine) object {
	o := object{
		"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
		"authentication": object{
			"anonymous": object{"enabled": false}, "webhook": object{"enabled": true},
			"x509": object{"clientCAFile": "/etc/kubernetes/pki/ca.crt"},
		},
		"authorization":            object{"mode": "Webhook"},
		"tlsCertFile":              "/etc/kubernetes/pki/kubelet.crt",
		"tlsPrivateKeyFile":        "/etc/kubernetes/pki/kubelet.key",
		"containerRuntimeEndpoint": "unix://" + containerdSocket,
		"providerID":               n.ProviderID(),
		"maxPods":                  c.MaxPods,
		"clusterDNS":               []string{serviceDNS},
		"clusterDomain":            clusterDomain,
		"resolvConf":               "/etc/resolv.conf",

		"cgroupDriver": "cgroupfs",
		"cgroupRoot":   cgroupOf(c.Lab, n.Name),
		"failCgroupV1": false, // the kernel's default hierarchy is the machine's choice
		// A container has no CAP_SYS_RESOURCE to lower these, or raise that.
		"oomScoreAdj": 0, "maxOpenFiles": 20000,
		"failSwapOn": false,
		// The default is below /usr, which is the machine's.
		"volumePluginDir": "/var/lib/kubelet/volumeplugins",

		// The disk is the machine's; nothing can be pulled again.
		"evictionHard":                object{"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
		"imageGCHighThresholdPercent": 100,
		"imageMinimumGCAge":           "24h",
		"imageMaximumGCAge":           "0s",
		"registryPullQPS":             0,
		"eventRecordQPS":              0,
		"nodeStatusUpdateFrequency":   "5s",
	}
	if c.CNI == CNIUnderlay {
		o["registerWithTaints"] = []object{{"key": Taint, "value": "true", "effect": "NoExecute"}}
	}
	return o
}

// kubeProxy is a KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1). As
// on EKS it knows no cluster CIDR: what is local cannot be told by address
// where pods have the VPC's.
func (c *Config) kubeProxy(n Machine) object {
	return object{
		"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
		"mode":               c.Proxy,
		"hostnameOverride":   n.Name,
		"clientConnection":   object{"kubeconfig": "/etc/kubernetes/kube-proxy.conf"},
		"clusterCIDR":        "",
		"oomScoreAdj":        0,
		"metricsBindAddress": "127.0.0.1:10249",
		// The size of the table is the whole machine's: leave it. The timeouts are
		// of the namespace, and kube-proxy's own.
		"conntrack": object{"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "24h0m0s", "tcpCloseWaitTimeout": "1h0m0s"},
	}
}

const containerdSocket = "/run/containerd/containerd.sock"

// containerdTOML is for containerd 1.6 and 1.7.
//
//go:embed containerd.toml
var containerdTOML string

func (c *Config) containerd() ([]byte, error) {
	pause, err := c.image("pause")
	if err != nil {
		return nil, err
	}
	return expand("containerd.toml", containerdTOML, map[string]string{"Socket": containerdSocket, "Pause": pause})
}

//go:embed coredns.yaml
var corednsYAML string

// CoreDNS returns the manifest of the cluster's DNS.
func (c *Config) CoreDNS() ([]byte, error) {
	image, err := c.image("coredns")
	if err != nil {
		return nil, err
	}
	return expand("coredns.yaml", corednsYAML, map[string]string{"Image": image, "Domain": clusterDomain, "Address": serviceDNS})
}

func expand(name, text string, data any) ([]byte, error) {
	t, err := template.New(name).Option("missingkey=error").Parse(text)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	var b bytes.Buffer
	if err := t.Execute(&b, data); err != nil {
		return nil, fmt.Errorf("fill in %s: %w", name, err)
	}
	return b.Bytes(), nil
}
