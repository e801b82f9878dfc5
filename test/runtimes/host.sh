# Makes the calling process the init of a machine of its own, in the network
# namespace of a lab's node: the file system is a copy on write of the real one;
# cgroups, /run and /var/lib are its own. All that runs in it ends when its stdin
# does.
#
# Usage, as PID 1 of new mount, PID, UTS and IPC namespaces:
#   bash /…/host.sh DIR CGROUP NODE BIN
# with an empty directory, a name for the cgroup, the node's directory, which
# appears as /run/underlay as on a real node, and that of what is tested, which
# appears as /run/bin.
set -eu
dir=$1 cgroup=$2 node=$3 bin=$4 stage=${5:-cgroup}

if [ "$stage" = cgroup ]; then
	# Every kernel has the second version of cgroups, whichever the machine
	# uses; where that is the first, this one has no controllers.
	mount --make-rprivate /
	mount -t cgroup2 cgroup2 "$dir"
	mkdir -p "$dir/$cgroup/init"
	echo 0 >"$dir/$cgroup/cgroup.procs"
	exec unshare --cgroup bash "$0" "$dir" "$cgroup" "$node" "$bin" root
fi

echo 0 >"$dir/$cgroup/init/cgroup.procs" # processes live in leaves
mount -t tmpfs tmpfs "$dir"
mkdir "$dir/upper" "$dir/work" "$dir/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$dir/upper,workdir=$dir/work" "$dir/root"
cd "$dir/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount --rbind /dev dev
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mount -t tmpfs tmpfs var/lib # a runtime's layers cannot lie on an overlay
mkdir run/underlay run/bin run/real
mount --bind "$node" run/underlay
mount --bind "$bin" run/bin
pivot_root . run/real
umount --lazy /run/real
hostname node

# The plugins where a person puts them, and no networks but ours.
rm -rf /etc/cni /opt/cni
mkdir -p /etc/cni/net.d /opt/cni/bin
cp /run/bin/underlay-cni /opt/cni/bin
cp /usr/lib/cni/portmap /opt/cni/bin
echo ready
while read -r _; do :; done
