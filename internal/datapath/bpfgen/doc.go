// Package bpfgen holds the node's BPF programs, compiled from bpf/node.c and
// embedded, with the Go types of what the two share. Everything but this file
// is generated and committed: a build needs Go alone, `go generate` needs
// clang 14, llvm-strip 14 and the headers of libbpf.
package bpfgen

//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -type addr -type iface -type iface_counters -type endpoint -type layout_meta -type drop_reason -type iface_flags -type node_const -type conn_key -type conn -type share -type idle -type tuple -type fragment_key -type fragment -type eni -type net_key -type event -type conn_way -type conn_seed -type cpu -type router -type conn_set -type sweep -type stayed -type provenance -type conn_state -type conn_flag -type path_count -type gate -type policy_endpoint -type policy_flags -type eni_flag -type net_flag Node ../../../bpf/node.c -- -O2 -g -Wall -Wextra -Werror -I/usr/include/x86_64-linux-gnu
