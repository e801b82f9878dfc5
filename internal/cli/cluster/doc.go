// Package cluster is a Kubernetes on instances of a lab: what its machines are
// made of, their first process, and what is needed to speak to it. Package cli
// starts and ends them.
//
//	loopback of the machine            instance control-plane
//	┌───────────────────────┐          ┌──────────────────────────────────────┐
//	│ kubectl ─► forwarder ─┼─ netns ──┼► kube-apiserver :6443 ─► etcd        │
//	└───────────────────────┘          │  kube-controller-manager, scheduler  │
//	                                   │  of the machine: all files           │
//	                                   │  own: net, pid, mnt (/proc), uts, ipc│
//	                                   └──────────────────┬───────────────────┘
//	                                                      │ the VPC
//	  instance node-1                                     │
//	 ┌────────────────────────────────────────────────────┴──────────────────┐
//	 │ 1 underlay node-init ─┬─ containerd ── (images) ── shims ── pods      │
//	 │   reaps, starts again ├─ kubelet                                      │
//	 │   what ends           └─ kube-proxy                                   │
//	 │                                                                       │
//	 │ of the machine: /usr, /bin, /lib, /dev, /tmp, /root …                 │
//	 │ layers over the machine's, in memory: /etc /opt /var                  │
//	 │ own, in memory: /run /sys /sys/fs/bpf /proc, a view of the cgroups    │
//	 │ bound, and there after power-off:                                     │
//	 │   /var/lib/{containerd,kubelet,cni} /var/log /etc/cni /opt/cni ◄ DATA │
//	 │   /etc/kubernetes /run/node                                    ◄ HOME │
//	 │   /run/underlay (the agent's socket, seen from outside)        ◄ HOME │
//	 └───────────────────────────────────────────────────────────────────────┘
//
// HOME is nodes/NODE of the lab's directory, DATA its place on a disk. Config
// says what there is to be; Write turns it into files, pure but for the keys;
// among them is spec.json, which is all that a machine's first process (Init)
// goes by, so that a node comes back as it was when its power returns.
//
// Invariants. Nothing of the machine outside the lab's directories, network
// namespaces and cgroup subtree (/sys/fs/cgroup/*/ul-LAB) is written: mounts
// are made in namespaces of their own, kernel parameters that a kubelet sets
// have files laid over them. All that runs on a node runs in its PID
// namespace, so that the end of its first process is a power-off.
//
// Concurrency. reaper and supervisor are for the goroutines of Init; all else
// here is a value or a function without state.
package cluster
