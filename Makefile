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
DEMO_PACKAGES := iproute2 iputils-ping tcpdump awscli
# What regenerates the BPF objects; a build needs Go alone.
GENERATE_PACKAGES := clang-14 llvm-14 libbpf-dev linux-libc-dev clang-format-14

GOLANGCI := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0

.PHONY: help build demo test bench sim-tables generate lint verify packages-test packages-demo packages-generate clean

help: ## show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

build: ## all commands, into bin/ (the first time compiles the AWS SDK: minutes)
	@echo "building into bin/ (the first build compiles the AWS SDK and takes minutes)" >&2
	@$(PROGRESS) "still compiling" $(GO) build -trimpath -ldflags '-s -w' -o bin/ ./cmd/...

demo: packages-demo build ## a VPC with nodes and pods, each fact proven; KEEP=1 leaves it up
	@bin/underlay demo

# No cached results: the end-to-end tests build the commands themselves, which
# Go's test cache does not see.
test: packages-test ## all tests; root lets those run that need namespaces and BPF
	@$(PROGRESS) "still compiling or testing" $(GO) test -count=1 -timeout 14m ./...

bench: packages-test ## ratios, each measured interleaved in one run
	@$(GO) test -count=1 -timeout 30m -run '^$$' -bench . -benchtime 1x ./test/bench/...

sim-tables: build ## the simulation of 2,000 and 10,000 nodes, into docs/bench/sim
	@hack/sim-tables.sh

generate: packages-generate ## regenerate BPF objects, the EC2 codec and the list of its actions
	@$(GO) generate ./...

lint: ## golangci-lint, as .golangci.yml says
	@$(PROGRESS) "still linting" $(GO) run $(GOLANGCI) run ./...

verify: generate ## regenerate, and fail on a difference
	@git diff --exit-code --stat -- . || { echo "generated files differ from what is committed: commit the result of 'make generate'" >&2; exit 1; }
	@test -z "$$(git status --porcelain --untracked-files=normal -- internal api bpf)" || { git status --short -- internal api bpf; echo "generated files are not committed" >&2; exit 1; }
	@unformatted=$$(gofmt -l cmd internal test); test -z "$$unformatted" || { echo "gofmt: $$unformatted" >&2; exit 1; }

packages-test:
	@hack/install-packages.sh $(TEST_PACKAGES)

packages-demo:
	@hack/install-packages.sh $(DEMO_PACKAGES)

packages-generate:
	@hack/install-packages.sh $(GENERATE_PACKAGES)

clean: ## remove what a build made
	@rm -rf bin
