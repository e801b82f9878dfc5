#!/usr/bin/env bash
# Runs make in a privileged container, for who has Docker or Podman and no Debian
# with root. NOT TESTED: no container engine was at hand where it was written.
# The kernel is the host's (or that of Docker's own machine on a Mac): Linux 6.6
# or later with BPF.
#
# Usage: hack/container.sh [demo|test|…]      KEEP=1 is passed on
set -euo pipefail
cd "$(dirname "$0")/.."

engine=${ENGINE:-docker}
# Privileged: network namespaces, a bpffs mount and BPF programs. Volumes keep
# modules and the build cache, so that the AWS SDK is compiled once. No stamp of
# the commit: git in the container distrusts a tree that its user does not own.
exec "$engine" run --rm -it --privileged \
	-e KEEP -e GOFLAGS=-buildvcs=false \
	-v "$PWD":/src -w /src \
	-v underlay-modules:/go/pkg/mod -v underlay-build:/root/.cache/go-build \
	docker.io/library/golang:1.26-bookworm make "${@:-demo}"
