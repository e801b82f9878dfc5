// Package chart tests the Helm chart: what it renders, for several values, as
// the API's own types, and what it refuses. Helm is built once (hack/helm.sh);
// the first time that takes minutes, and the tests wait for it.
//
// What an API server says of the objects is tested where there is one:
// test/kubernetes/admission.
package chart
