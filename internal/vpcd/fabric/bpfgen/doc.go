// Package bpfgen holds the fabric's BPF programs as bpf2go made them of
// bpf/fabric.c, and the Go types of its maps. To change them: clang-14 and
// libbpf-dev, edit the C, go generate.
package bpfgen

//go:generate go tool bpf2go -cc clang-14 -target bpfel -type eni_flag -type route_kind -type address -type target -type eni -type station -type route_key -type route -type public -type counters -type rule -type policy -type flow_key -type flow -type fragment_key -type fragment -type acl_entry -type acl -type subnet_key -type record_key -type record -type skip_key -type skip -type logged -type address6 -type rule6 -type policy6 -type flow_key6 -type fragment_key6 -type fragment6 -type acl_entry6 -type acl6 -type record_key6 Fabric ../../../../bpf/fabric.c -- -O2 -g -Wall -Werror -I/usr/include/x86_64-linux-gnu
