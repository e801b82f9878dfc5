package e2e

import (
	"context"
	"strconv"

	"github.com/onsi/ginkgo/v2"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kubernetes/test/e2e/framework"
	e2edebug "k8s.io/kubernetes/test/e2e/framework/debug"
	e2enode "k8s.io/kubernetes/test/e2e/framework/node"
	e2epod "k8s.io/kubernetes/test/e2e/framework/pod"
	netutils "k8s.io/utils/net"
)

// prepare waits for the cluster and returns how many nodes it has, in decimal.
func prepare(ctx context.Context) []byte {
	client, err := framework.LoadClientset()
	framework.ExpectNoError(err, "make a client from -kubeconfig")
	timeouts := framework.NewTimeoutContext()
	framework.ExpectNoError(e2enode.WaitForAllNodesSchedulable(ctx, client, timeouts.NodeSchedulable), "wait for schedulable nodes")
	nodes, err := e2enode.GetReadySchedulableNodes(ctx, client)
	framework.ExpectNoError(err, "list the nodes")
	err = e2epod.WaitForAlmostAllPodsReady(ctx, client, metav1.NamespaceSystem,
		framework.TestContext.MinStartupPods, framework.TestContext.AllowedNotReadyNodes, timeouts.SystemPodsStartup)
	if err != nil {
		e2edebug.DumpAllNamespaceInfo(ctx, client, metav1.NamespaceSystem)
		framework.Failf("wait for the pods of kube-system: %v", err)
	}
	version, err := client.DiscoveryClient.ServerVersion()
	framework.ExpectNoError(err, "ask for the server's version")
	ginkgo.GinkgoLogr.Info("cluster ready", "version", version.GitVersion, "nodes", len(nodes.Items))
	return strconv.AppendInt(nil, int64(len(nodes.Items)), 10)
}

// learn runs in each process: specs ask for the number of nodes, and for the
// family of the cluster's addresses, which is that of the API's own Service.
func learn(ctx context.Context, nodes []byte) {
	n, err := strconv.Atoi(string(nodes))
	framework.ExpectNoError(err, "parse the number of nodes")
	framework.TestContext.CloudConfig.NumNodes = n
	client, err := framework.LoadClientset()
	framework.ExpectNoError(err, "make a client from -kubeconfig")
	svc, err := client.CoreV1().Services(metav1.NamespaceDefault).Get(ctx, "kubernetes", metav1.GetOptions{})
	framework.ExpectNoError(err, "get the API's Service")
	framework.TestContext.IPFamily = "ipv4"
	if netutils.IsIPv6String(svc.Spec.ClusterIP) {
		framework.TestContext.IPFamily = "ipv6"
	}
}
