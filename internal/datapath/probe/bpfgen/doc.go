// Package bpfgen holds the program by which tests and benchmarks ask the node's
// policy, compiled from bpf/policy_probe.c and embedded. No command links it.
// Everything but this file is generated and committed, as in datapath/bpfgen.
package bpfgen

//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -type addr -type tuple -type verdict -type question Probe ../../../../bpf/policy_probe.c -- -O2 -g -Wall -Wextra -Werror -I/usr/include/x86_64-linux-gnu
