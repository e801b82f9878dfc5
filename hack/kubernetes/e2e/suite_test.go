package e2e

import (
	"context"

	"github.com/onsi/ginkgo/v2"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kubernetes/test/e2e/framework"
	e2edebug "k8s.io/kubernetes/test/e2e/framework/debug"
	e2enode "k8s.io/kubernetes/test/e2e/framework/node"
	e2epod "k8s.io/kubernetes/test/e2e/framework/pod"
	netutils "k8s.io/utils/net"
)

// prepare waits for the cluster and learns how many nodes it has.
func prepare(ctx context.Context) []byte {
	client, err := framework.LoadClientset()
	framework.ExpectNoError(err, "make a client from -kubeconfig")
	timeouts := framework.NewTimeoutContext()
	framework.ExpectNoError(e2enode.WaitForAllNodesSchedulable(ctx, client, timeouts.NodeSchedulable), "wait for schedulable nodes")
	if framework.TestContext.CloudConfig.NumNodes == framework.DefaultNumNodes {
		nodes, err := e2enode.GetReadySchedulableNodes(ctx, client)
		framework.ExpectNoError(err, "list the nodes")
		framework.TestContext.CloudConfig.NumNodes = len(nodes.Items)
	}
	err = e2epod.WaitForAlmostAllPodsReady(ctx, client, metav1.NamespaceSystem,
		framework.TestContext.MinStartupPods, framework.TestContext.AllowedNotReadyNodes, timeouts.SystemPodsStartup)
	if err != nil {
		e2edebug.DumpAllNamespaceInfo(ctx, client, metav1.NamespaceSystem)
		framework.Failf("wait for the pods of kube-system: %v", err)
	}
	version, err := client.DiscoveryClient.ServerVersion()
	framework.ExpectNoError(err, "ask for the server's version")
	ginkgo.GinkgoLogr.Info("cluster ready", "version", version.GitVersion, "nodes", framework.TestContext.CloudConfig.NumNodes)
	return nil
}

// ipFamily returns "ipv4" or "ipv6".
func ipFamily(ctx context.Context) string {
	client, err := framework.LoadClientset()
	framework.ExpectNoError(err, "make a client from -kubeconfig")
	svc, err := client.CoreV1().Services(metav1.NamespaceDefault).Get(ctx, "kubernetes", metav1.GetOptions{})
	framework.ExpectNoError(err, "get the API's Service")
	if netutils.IsIPv6String(svc.Spec.ClusterIP) {
		return "ipv6"
	}
	return "ipv4"
}
