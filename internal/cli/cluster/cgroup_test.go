package cluster

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	mountsV1 = `30 24 0:25 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:5 - cgroup cgroup rw,cpu,cpuacct
32 30 0:27 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
33 30 0:28 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
34 30 0:29 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
35 30 0:30 / /sys/fs/cgroup/net_cls,net_prio rw - cgroup cgroup rw,net_cls,net_prio
36 24 0:31 / /elsewhere/cpuset rw - cgroup cgroup rw,cpuset
`
	mountsV2 = `30 24 0:25 / /sys rw - sysfs sysfs rw
31 30 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate
`
)

func TestHierarchies(t *testing.T) {
	for _, c := range []struct {
		mounts string
		want   []hierarchy
	}{
		{mountsV1, []hierarchy{{"cpu,cpuacct", "cpu,cpuacct"}, {"memory", "memory"}, {"systemd", "none,name=systemd"}, {"net_cls,net_prio", "net_cls,net_prio"}}},
		{mountsV2, []hierarchy{{}}},
		{"", nil},
		{"1 2 3\n - cgroup\n", nil},
	} {
		if d := cmp.Diff(c.want, hierarchies(c.mounts), cmp.AllowUnexported(hierarchy{})); d != "" {
			t.Errorf("of %q (-want +got):\n%s", c.mounts, d)
		}
	}
	if got := (hierarchy{"memory", "memory"}).dir(cgroupOf("demo", "node-1")); got != "/sys/fs/cgroup/memory/ul-demo/node-1" {
		t.Errorf("v1: %s", got)
	}
	if got := (hierarchy{}).dir(cgroupOf("demo", "node-1")); got != "/sys/fs/cgroup/ul-demo/node-1" {
		t.Errorf("v2: %s", got)
	}
}

func FuzzHierarchies(f *testing.F) {
	f.Add(mountsV1)
	f.Add(mountsV2)
	f.Fuzz(func(t *testing.T, mounts string) {
		for _, h := range hierarchies(mounts) {
			if !h.unified() && h.options == "" {
				t.Errorf("a hierarchy %q without controllers", h.name)
			}
		}
	})
}
