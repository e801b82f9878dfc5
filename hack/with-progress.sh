#!/usr/bin/env bash
# Runs a command that may be silent for minutes and says every ten seconds that
# it still runs. Exits as the command does.
# Usage: hack/with-progress.sh "what it does" COMMAND...
set -uo pipefail

what=$1
shift
"$@" &
child=$!
trap 'kill "$child" 2>/dev/null' INT TERM
start=$SECONDS
while sleep 1 && kill -0 "$child" 2>/dev/null; do
	elapsed=$((SECONDS - start))
	((elapsed % 10 == 0 && elapsed > 0)) && echo "  $what: ${elapsed} s …" >&2
done
wait "$child"
