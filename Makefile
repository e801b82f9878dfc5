# Two commands do everything on a Debian machine with Go and root:
#   make demo   the main job, each fact with the command that proves it
#   make test   all tests
# Both install the Debian packages that they need and say which.

SHELL := /bin/bash
GO ?= go
PROGRESS := hack/with-progress.sh

# Static programs: the plugin, started for every pod, begins in half the time
# without a dynamic linker, and a build needs Go alone.
export CGO_ENABLED := 0

# What the tests and the demo drive or look with.
TEST_PACKAGES := iproute2 iputils-ping nftables tcpdump bpftool awscli python3-boto3 procps iptables containernetworking-plugins containerd runc podman
# What a lab with Kubernetes runs beside what is built here, and whose tools are
# copied into its test image.
KUBERNETES_PACKAGES := etcd-server containerd runc containernetworking-plugins conntrack iptables nftables ipset iproute2 procps \
	busybox-static dash bash curl wget netcat-openbsd bind9-dnsutils bind9-host iperf socat tcpdump iputils-ping libc-bin util-linux
DEMO_PACKAGES := iproute2 iputils-ping tcpdump awscli
# What regenerates the BPF objects; a build needs Go alone.
GENERATE_PACKAGES := clang-14 llvm-14 libbpf-dev linux-libc-dev clang-format-14

GOLANGCI := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0

.PHONY: help build demo test bench e2e-k8s bench-k8s kubernetes sim-tables generate manifests image lint verify packages-test packages-demo packages-kubernetes packages-generate clean

help: ## show this help
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

build: ## all commands, into bin/ (the first time compiles the AWS SDK: minutes)
	@echo "building into bin/ (the first build compiles the AWS SDK and takes minutes)" >&2
	@$(PROGRESS) "still compiling" $(GO) build -trimpath -ldflags '-s -w' -o bin/ ./cmd/...

demo: packages-demo build ## a VPC with nodes and pods, each fact proven; KEEP=1 leaves it up
	@bin/underlay demo

# No cached results: the end-to-end tests build the commands themselves, which
# Go's test cache does not see.
test: packages-test ## all tests; root lets those run that need namespaces and BPF
	@$(PROGRESS) "still compiling Helm, which test/chart runs (minutes, the first time)" hack/helm.sh >/dev/null
	@$(PROGRESS) "still compiling or testing" $(GO) test -count=1 -timeout 14m ./...

# BENCH names benchmarks; BENCHFLAGS=-turns=1 is a trial, which keeps no figure.
BENCH ?= .

bench: packages-test ## ratios, each measured interleaved in one run
	@$(GO) test -count=1 -timeout 60m -run '^$$' -bench '$(BENCH)' -benchtime 1x ./test/bench $(BENCHFLAGS)
	@$(GO) test -count=1 -timeout 10m -run '^$$' -bench Policy -benchtime 1x ./internal/datapath

# What E2E_RUN names, in a lab with kube-proxy in the mode E2E_PROXY; logs and
# reports go to E2E_OUT. E2E_FOCUS: only those of upstream's specs that match.
E2E_PROXY ?= nftables
E2E_RUN ?= .
E2E_OUT ?= /tmp/underlay-e2e
E2E_FOCUS ?=
e2e-k8s: packages-test packages-kubernetes ## on a real Kubernetes: upstream's network specs, and checks of our own (builds it once: 5 to 30 minutes)
	@TEST_KUBERNETES=1 $(GO) test -count=1 -v -timeout 85m -run '$(E2E_RUN)' ./test/kubernetes -proxy $(E2E_PROXY) -out $(E2E_OUT) -focus '$(E2E_FOCUS)'

bench-k8s: packages-test packages-kubernetes ## pod created to Ready, as a ratio to ptp with host-local
	@TEST_KUBERNETES=1 $(GO) test -count=1 -v -timeout 60m -run '^$$' -bench . -benchtime 1x ./test/kubernetes

kubernetes: packages-kubernetes build ## build Kubernetes' programs and images into the cache (5 to 30 minutes once)
	@bin/underlay kubernetes build

sim-tables: build ## the simulation of 2,000 and 10,000 nodes, into docs/bench/sim
	@hack/sim-tables.sh

generate: packages-generate ## regenerate BPF objects, the EC2 codec and the list of its actions
	@$(GO) generate ./...

manifests: ## the plain manifests and the table of values, from the Helm chart
	@$(PROGRESS) "still compiling Helm (the first time takes minutes)" hack/manifests.sh

# Underlay's version is the chart's, unless it is given.
VERSION ?= $(shell sed -n 's/^appVersion: *//p' deploy/helm/underlay/Chart.yaml)

image: build ## Underlay's image for amd64 and arm64, into dist/ (the first time takes minutes)
	@mkdir -p dist
	@bin/underlay kubernetes image dist/underlay-$(VERSION).tar --tag $(VERSION)

lint: ## golangci-lint, as .golangci.yml says
	@$(PROGRESS) "still linting" $(GO) run $(GOLANGCI) run ./...

verify: generate manifests ## regenerate, and fail on a difference
	@git diff --exit-code --stat -- . || { echo "generated files differ from what is committed: commit the result of 'make generate manifests'" >&2; exit 1; }
	@test -z "$$(git status --porcelain --untracked-files=normal -- internal api bpf)" || { git status --short -- internal api bpf; echo "generated files are not committed" >&2; exit 1; }
	@unformatted=$$(gofmt -l cmd internal test); test -z "$$unformatted" || { echo "gofmt: $$unformatted" >&2; exit 1; }

packages-test:
	@hack/install-packages.sh $(TEST_PACKAGES)

packages-demo:
	@hack/install-packages.sh $(DEMO_PACKAGES)

packages-kubernetes:
	@hack/install-packages.sh $(KUBERNETES_PACKAGES)

packages-generate:
	@hack/install-packages.sh $(GENERATE_PACKAGES)

clean: ## remove what a build made
	@rm -rf bin
