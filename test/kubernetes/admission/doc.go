// Package admission tests what the API server lets a node's agent do: the RBAC
// and the ValidatingAdmissionPolicy of the chart, with the agent's own kind of
// token. It needs an API server and no kubelet.
package admission
