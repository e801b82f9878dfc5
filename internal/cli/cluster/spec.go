package cluster

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
)

// Spec is what a machine's first process is told: whom to be, what to mount,
// what to run. It stands in spec.json, so that a node that is powered on again
// is the same.
type Spec struct {
	Lab     string `json:"lab"`
	Machine string `json:"machine"`
	Home    string `json:"home"`   // the machine's directory, outside
	Cgroup  string `json:"cgroup"` // of the machine in every hierarchy, "" is none: "/ul-demo/node-1"

	// Private machines get directories of their own for all that a kubelet
	// and a runtime write on a host. Others share all files with the machine
	// that the lab is on.
	Private bool              `json:"private"`
	Binds   []Bind            `json:"binds,omitempty"`
	Files   map[string]string `json:"files,omitempty"` // written after the mounts

	Programs []Program `json:"programs"`
}

// Bind shows a file or directory of outside at a place inside.
type Bind struct {
	From string `json:"from"`
	To   string `json:"to"`
}

// Program is one that the first process runs and keeps running. Programs start
// in order, each after those before it are ready.
type Program struct {
	Name string   `json:"name"`
	Argv []string `json:"argv"`
	Log  string   `json:"log"` // a path inside
	// After is waited for before the program starts, but not forever: a node
	// must boot without its API server.
	After  *Probe   `json:"after,omitempty"`
	Ready  *Probe   `json:"ready,omitempty"`
	Images []string `json:"images,omitempty"` // tarballs (outside) to load into containerd once it is ready
}

// Probe says how one sees that a program serves. One field is set.
type Probe struct {
	Unix  string `json:"unix,omitempty"`  // somebody listens on this socket
	TCP   string `json:"tcp,omitempty"`   // somebody listens on this address
	HTTPS string `json:"https,omitempty"` // this URL answers 200; the certificate is checked against CA
	CA    string `json:"ca,omitempty"`
}

// The files in a machine's Home.
const (
	specFile  = "spec.json"
	stateFile = "state.json"
	initLog   = "init.log"
)

// inside is where a private machine sees its Home.
const inside = "/run/node"

// Where things are that only a node's first process looks at.
const (
	binInside = "/run/node-bin" // the programs that were built
	logInside = "/var/log"      // of the node's own programs too
	etcInside = "/etc/kubernetes"
)

// LogDir is where the logs of a machine's programs are, outside.
func LogDir(dir, data, machine string) string {
	if machine == ControlPlane {
		return filepath.Join(Home(dir, machine), "log")
	}
	return filepath.Join(data, "nodes", machine, "log")
}

// InitLog is the log of a machine's first process.
func InitLog(dir, machine string) string { return filepath.Join(Home(dir, machine), initLog) }

// AgentDir is the directory that a node has at /run/underlay, outside.
func AgentDir(dir, machine string) string { return filepath.Join(Home(dir, machine), "run") }

// NodeData are the directories of a node that outlive its power, outside, by
// what they are called inside.
func NodeData(data, machine string) map[string]string {
	d := filepath.Join(data, "nodes", machine)
	return map[string]string{
		"/var/lib/containerd": filepath.Join(d, "containerd"),
		"/var/lib/kubelet":    filepath.Join(d, "kubelet"),
		"/var/lib/cni":        filepath.Join(d, "cni"),
		logInside:             filepath.Join(d, "log"),
		"/etc/cni":            filepath.Join(d, "etc-cni"),
		"/opt/cni":            filepath.Join(d, "opt-cni"),
	}
}

// ReadSpec reads the specification of a machine.
func ReadSpec(home string) (*Spec, error) {
	b, err := os.ReadFile(filepath.Join(home, specFile))
	if err != nil {
		return nil, fmt.Errorf("read what machine to be: %w", err)
	}
	var s Spec
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("read %s: %w", filepath.Join(home, specFile), err)
	}
	return &s, nil
}

// controlPlaneSpec has etcd, the API server, and those two that work by it.
// They share all files with the machine that the lab is on.
func (c *Config) controlPlaneSpec() *Spec {
	log := LogDir(c.Dir, c.Data, ControlPlane)
	program := func(name string, argv ...string) Program {
		return Program{Name: name, Argv: argv, Log: filepath.Join(log, name+".log")}
	}
	etcd := program("etcd", c.Programs.Etcd,
		"--name=etcd", "--data-dir="+filepath.Join(c.Data, "etcd"),
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380", "--initial-cluster=etcd=http://127.0.0.1:2380",
		// A lab ends with the machine: nothing need survive a power loss.
		"--unsafe-no-fsync",
	)
	etcd.Ready = &Probe{TCP: "127.0.0.1:2379"}
	api := program("kube-apiserver", filepath.Join(c.Artifacts.Bin, "kube-apiserver"),
		"--advertise-address="+c.ControlPlane.IP.String(), "--bind-address=0.0.0.0", fmt.Sprintf("--secure-port=%d", APIPort),
		"--etcd-servers=http://127.0.0.1:2379", "--service-cluster-ip-range="+serviceCIDR, "--allow-privileged=true",
		"--client-ca-file="+c.pki("ca.crt"), "--tls-cert-file="+c.pki("apiserver.crt"), "--tls-private-key-file="+c.pki("apiserver.key"),
		"--kubelet-client-certificate="+c.pki("kubelet-client.crt"), "--kubelet-client-key="+c.pki("kubelet-client.key"), "--kubelet-certificate-authority="+c.pki("ca.crt"),
		// A node's name is in no DNS.
		"--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc."+clusterDomain,
		"--service-account-key-file="+c.pki("service-account.pub"), "--service-account-signing-key-file="+c.pki("service-account.key"),
		"--requestheader-client-ca-file="+c.pki("ca.crt"), "--requestheader-allowed-names=front-proxy-client",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-", "--requestheader-group-headers=X-Remote-Group", "--requestheader-username-headers=X-Remote-User",
		"--proxy-client-cert-file="+c.pki("front-proxy-client.crt"), "--proxy-client-key-file="+c.pki("front-proxy-client.key"),
		// No kube-proxy is here; pods are reached by their own addresses.
		"--enable-aggregator-routing=true",
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--profiling=false",
	)
	api.Ready = &Probe{HTTPS: fmt.Sprintf("https://127.0.0.1:%d/readyz", APIPort), CA: c.pki("ca.crt")}
	controllers := program("kube-controller-manager", filepath.Join(c.Artifacts.Bin, "kube-controller-manager"),
		"--kubeconfig="+c.pki("controller-manager.conf"), "--authentication-kubeconfig="+c.pki("controller-manager.conf"), "--authorization-kubeconfig="+c.pki("controller-manager.conf"),
		"--service-account-private-key-file="+c.pki("service-account.key"), "--root-ca-file="+c.pki("ca.crt"),
		"--cluster-signing-cert-file="+c.pki("ca.crt"), "--cluster-signing-key-file="+c.pki("ca.key"),
		"--use-service-account-credentials=true", "--leader-elect=false", "--allocate-node-cidrs=false", "--profiling=false",
		// The default is below /usr, which is the machine's.
		"--flex-volume-plugin-dir="+filepath.Join(c.Data, "volumeplugins"),
	)
	scheduler := program("kube-scheduler", filepath.Join(c.Artifacts.Bin, "kube-scheduler"),
		"--kubeconfig="+c.pki("scheduler.conf"), "--authentication-kubeconfig="+c.pki("scheduler.conf"), "--authorization-kubeconfig="+c.pki("scheduler.conf"),
		"--leader-elect=false", "--profiling=false",
	)
	return &Spec{
		Lab: c.Lab, Machine: ControlPlane, Home: c.home(ControlPlane), Cgroup: cgroupOf(c.Lab, ControlPlane),
		Programs: []Program{etcd, api, controllers, scheduler},
	}
}

// nodeSpec has a runtime, a kubelet and kube-proxy, on files of their own.
func (c *Config) nodeSpec(n Machine) (*Spec, error) {
	program := func(name string, argv ...string) Program {
		return Program{Name: name, Argv: argv, Log: filepath.Join(logInside, name+".log")}
	}
	containerd := program("containerd", c.Programs.Containerd, "--config", etcInside+"/containerd.toml")
	containerd.Ready = &Probe{Unix: containerdSocket}
	containerd.Images = c.tars()
	kubelet := program("kubelet", binInside+"/kubelet",
		"--config="+etcInside+"/kubelet.json", "--kubeconfig="+etcInside+"/kubelet.conf",
		"--hostname-override="+n.Name, "--node-ip="+n.IP.String(),
		"--node-labels="+strings.Join([]string{
			"topology.kubernetes.io/region=" + n.Region,
			"topology.kubernetes.io/zone=" + n.Zone,
			"node.kubernetes.io/instance-type=" + n.Type,
		}, ","),
	)
	// It would try again by itself, with pauses of up to seven seconds.
	kubelet.After = &Probe{HTTPS: c.apiURL() + "/readyz", CA: etcInside + "/pki/ca.crt"}
	proxy := program("kube-proxy", binInside+"/kube-proxy", "--config="+etcInside+"/kube-proxy.json")

	s := &Spec{
		Lab: c.Lab, Machine: n.Name, Home: c.home(n.Name), Cgroup: cgroupOf(c.Lab, n.Name), Private: true,
		Binds: []Bind{
			{From: c.home(n.Name), To: inside},
			{From: c.Artifacts.Bin, To: binInside},
			{From: filepath.Join(c.home(n.Name), "etc"), To: etcInside},
			{From: AgentDir(c.Dir, n.Name), To: "/run/underlay"},
		},
		Files: map[string]string{
			"/etc/hostname":   n.Name + "\n",
			"/etc/machine-id": machineID(c.Lab, n.Name) + "\n",
			"/etc/hosts":      fmt.Sprintf("127.0.0.1 localhost\n%s %s\n", n.IP, n.Name),
			// As DHCP would say. CoreDNS asks it what it does not know itself.
			"/etc/resolv.conf": fmt.Sprintf("nameserver %s\nsearch %s\n", c.Resolver, c.Domain),
		},
		Programs: []Program{containerd, kubelet, proxy},
	}
	for to, from := range NodeData(c.Data, n.Name) {
		s.Binds = append(s.Binds, Bind{From: from, To: to})
	}
	sortBinds(s.Binds)
	if c.CNI == CNIPtp {
		list, err := ptpConflist(n.Prefixes)
		if err != nil {
			return nil, err
		}
		s.Files["/etc/cni/net.d/10-ptp.conflist"] = list
	}
	return s, nil
}

// PtpPodsPerPrefix is how many pods a /28 serves with CNIPtp: of its sixteen
// addresses host-local leaves out three, as of a subnet: the first, the last,
// and the gateway.
const PtpPodsPerPrefix = 13

// ptpConflist is the CNI project's own way to give pods addresses out of
// prefixes that are the node's.
func ptpConflist(prefixes []netip.Prefix) (string, error) {
	pool := []object{}
	for _, p := range prefixes {
		pool = append(pool, object{"subnet": p.String()})
	}
	list := object{
		"cniVersion": "1.0.0", "name": "ptp",
		"plugins": []object{
			{"type": "ptp", "ipMasq": false, "ipam": object{"type": "host-local", "ranges": [][]object{pool}, "routes": []object{{"dst": "0.0.0.0/0"}}}},
			{"type": "portmap", "capabilities": object{"portMappings": true}},
		},
	}
	b, err := json.MarshalIndent(list, "", "  ")
	if err != nil {
		return "", fmt.Errorf("encode the ptp config list: %w", err)
	}
	return string(b) + "\n", nil
}
