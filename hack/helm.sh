#!/usr/bin/env bash
# Builds Helm, the tool of the module hack/helm, into .cache/ and prints its path.
# The flags are those with which labs have Kubernetes' programs built: with
# others Go would compile all of it a second time. The first time takes two to
# four minutes, later ones a second.
set -euo pipefail
cd "$(dirname "$0")/helm"

CGO_ENABLED=0 GOFLAGS=-buildvcs=false go build -trimpath -ldflags '-s -w' -o ../../.cache/helm helm.sh/helm/v4/cmd/helm
realpath ../../.cache/helm
