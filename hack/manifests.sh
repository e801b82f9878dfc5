#!/usr/bin/env bash
# Writes what is made of the Helm chart: the plain manifests, and the table of
# its values in docs/reference/chart.md. Helm comes of hack/helm.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

chart=deploy/helm/underlay
helm=$(hack/helm.sh)

# What names Helm is of no use to who applies the file.
plain() { sed -e '/^# Source: /d' -e '/^ *app.kubernetes.io\/managed-by: Helm$/d' -e '/^ *helm.sh\/chart: /d' -e '/./,$!d'; }

# render FILE FLAG...: the chart with these flags, into FILE, or nothing.
render() {
	local file=$1
	shift
	"$helm" template underlay $chart --namespace kube-system "$@" >"$file.new"
	{
		cat "$file.head"
		plain <"$file.new"
	} >"$file.whole"
	mv "$file.whole" "$file"
}

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

cat >"$out/underlay.yaml.head" <<'END'
# Underlay's node agent, without Helm. Made of deploy/helm/underlay (make
# manifests): change the chart, not this file.
#
# Before you apply it: set --cluster to your cluster's name, and give the nodes'
# role the policy docs/reference/iam-policy.json. On Kubernetes before 1.30,
# leave out the two ValidatingAdmissionPolicies and their bindings.
#
#   kubectl apply -f deploy/manifests/underlay.yaml
#   kubectl -n kube-system rollout status daemonset/underlay
END
render "$out/underlay.yaml"

cat >"$out/uninstall.yaml.head" <<'END'
# Takes Underlay off the nodes: in place of the agents, this cleans each node and
# stays. Made of deploy/helm/underlay (make manifests). Drain the nodes first,
# and set --cluster as it was: by it the interfaces are known.
#
#   kubectl apply -f deploy/manifests/uninstall.yaml
#   kubectl -n kube-system rollout status daemonset/underlay      # ends when every node is clean
#   kubectl delete -f deploy/manifests/uninstall.yaml
END
render "$out/uninstall.yaml" --set uninstall=true --set updateStrategy.rollingUpdate.maxUnavailable=100%

mkdir -p deploy/manifests
cp "$out/underlay.yaml" "$out/uninstall.yaml" deploy/manifests/
(cd hack/helm && CGO_ENABLED=0 GOFLAGS=-buildvcs=false go run -trimpath ./chartdoc ../../$chart ../../docs/reference/chart.md)
