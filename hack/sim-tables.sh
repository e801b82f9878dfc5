#!/usr/bin/env bash
# Writes the simulation's tables for 2,000 and 10,000 nodes into
# docs/bench/sim, each with its command; takes some five minutes. The same
# command gives the same table, to the byte.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=docs/bench/sim
mkdir -p "$dir"

# table FILE ARGUMENTS…: what the command prints, the command above it.
table() {
	local file=$1
	shift
	echo "$dir/$file.txt" >&2
	{
		echo "\$ underlay sim $*"
		echo
		bin/underlay sim "$@" 2>/dev/null
	} >"$dir/$file.txt"
}

for nodes in 2000 10000; do
	table "rollout-$nodes" --nodes "$nodes" --plot "$dir/rollout-$nodes.svg"
	table "rollout-prefixes-$nodes" --nodes "$nodes" --prefixes
	for scenario in wave churn zone-loss exhaustion; do
		table "$scenario-$nodes" --nodes "$nodes" --scenario "$scenario"
	done
	table "wave-floor-10-$nodes" --nodes "$nodes" --scenario wave --floor 10
done
