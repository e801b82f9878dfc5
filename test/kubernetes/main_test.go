package kubernetes

import (
	"cmp"
	"flag"
	"os"
	"testing"

	"github.com/underlay-cni/underlay/test/lab"
)

var (
	proxy      = flag.String("proxy", cmp.Or(os.Getenv("E2E_PROXY"), "nftables"), "`mode` of kube-proxy: nftables or iptables")
	procs      = flag.Int("procs", 3, "how many of upstream's specs run side by side")
	focus      = flag.String("focus", "", "of upstream's specs only those whose name matches this `regexp`")
	secondary  = flag.Bool("secondary", false, "no spec's pod gets an address of a node's first interface: others hold them all")
	outDir     = flag.String("out", os.Getenv("E2E_OUT"), "`folder` for logs and reports; a temporary one without it")
	kubeconfig = flag.String("kubeconfig", "", "for TestUpstream alone: a `file` that leads to a cluster that is there, instead of a lab")
	labName    = flag.String("lab", "", "`name` of a lab with Kubernetes that is up, instead of one that is made for the run")
	binDir     = flag.String("bin", "", "`folder` with e2e.test, ginkgo and kubectl, instead of building them")
	replicas   = flag.Int("replicas", 40, "pods of the Deployment that is scaled up and down")
	rounds     = flag.Int("rounds", 3, "how often it is")
	dense      = flag.Int("dense", 20, "pods of the node whose status is checked against an independent count; more than 25 take a lab with a larger node")
)

func TestMain(m *testing.M) {
	flag.Parse()
	if os.Getenv("TEST_KUBERNETES") == "" {
		os.Exit(m.Run()) // all is skipped: nothing to build for
	}
	os.Exit(lab.Main(m))
}
