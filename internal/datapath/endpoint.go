package datapath

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// State is where an endpoint is in its life.
type State uint32

// Adding → Live → Tombstone → forgotten. Adding is not seen after Open: what a
// crash left there is undone.
const (
	Adding    State = 1 // being made; passes no packet
	Live      State = 2 // made whole
	Tombstone State = 3 // released; the address is not to be used again yet
)

func (s State) String() string {
	switch s {
	case Adding:
		return "adding"
	case Live:
		return "live"
	case Tombstone:
		return "tombstone"
	}
	return fmt.Sprintf("state %d", uint32(s))
}

// Endpoint is one interface of one pod.
type Endpoint struct {
	// What Add is given.
	ContainerID string
	IfName      string     // in the pod
	Netns       string     // the namespace's path, as text: it is never opened
	Addr        netip.Addr // IPv4
	ENI         vpc.ENIID
	ENIIndex    int // 1..31, as given to SetENIs
	// The workload as its orchestrator names it; empty where there is none.
	PodNamespace, PodName, PodUID string
	Groups                        vpc.GroupSet
	MTU                           int // 0: Options.MTU
	// GroupsHere has the groups' gate of its policy judge all that it sends and
	// receives, and not only what the VPC does not see.
	GroupsHere bool
	// StackOnly keeps all its packets on the kernel's stack, for whoever has to
	// see them there: a program or a qdisc of another's on the host veth.
	StackOnly bool

	// What Add fills in.
	NetnsCookie uint64
	MAC         net.HardwareAddr // of the pod's end
	HostIfName  string
	HostIfIndex int
	PeerIfIndex int // in the pod's namespace
	State       State
	Created     time.Time
	Released    time.Time // zero unless State is Tombstone
}

// key names an endpoint as CNI does.
type key struct{ containerID, ifName string }

func (e *Endpoint) key() key { return key{e.ContainerID, e.IfName} }

// String is the label that people see on the host veth (ifalias) and in errors.
func (e *Endpoint) String() string {
	s := e.IfName + " of container " + e.ContainerID
	if e.PodName != "" {
		s = e.PodNamespace + "/" + e.PodName + " " + s
	}
	return s
}

var (
	// ErrExists: the container has an endpoint of that interface name; an
	// *ExistsError carries it.
	ErrExists = errors.New("endpoint exists")
	// ErrAddressInUse: the address has an owner, or is a tombstone; an
	// *AddressInUseError carries it.
	ErrAddressInUse = errors.New("address in use")
	// ErrNotFound: nothing is known of that container and interface.
	ErrNotFound = errors.New("endpoint not found")
	// ErrInterfaceTaken: the pod's namespace has a device of that name
	// that is not ours.
	ErrInterfaceTaken = errors.New("interface name taken")
	// ErrLinkMissing: an ENI has no device on this node (yet); a
	// *LinkMissingError lists which.
	ErrLinkMissing = errors.New("no device with the ENI's MAC")
)

// ExistsError is ErrExists with the endpoint that is there.
type ExistsError struct{ Endpoint Endpoint }

func (e *ExistsError) Error() string {
	return fmt.Sprintf("%s has address %s already (%s)", e.Endpoint.String(), e.Endpoint.Addr, e.Endpoint.State)
}
func (e *ExistsError) Unwrap() error { return ErrExists }

// AddressInUseError is ErrAddressInUse with the endpoint that has the address.
type AddressInUseError struct{ Endpoint Endpoint }

func (e *AddressInUseError) Error() string {
	return fmt.Sprintf("address %s belongs to %s (%s)", e.Endpoint.Addr, e.Endpoint.String(), e.Endpoint.State)
}
func (e *AddressInUseError) Unwrap() error { return ErrAddressInUse }

// hostIfName names the host veth of an endpoint: "ul" and twelve hexadecimal
// digits, within the 15 bytes that Linux allows.
func hostIfName(k key) string {
	sum := sha256.Sum256([]byte(k.containerID + "\x00" + k.ifName))
	return "ul" + hex.EncodeToString(sum[:6])
}

// hostMAC is that of every host veth. Each is a wire of its own with one pod
// at its end, so that one address serves all, and a pod keeps its neighbour
// entry whatever happens to the host's end. It is locally administered, and
// no pod's: their second byte is 0x75.
var hostMAC = net.HardwareAddr{0x02, 0x6c, 0x75, 0x00, 0x00, 0x01}

// HostMAC returns the MAC of every host veth.
func HostMAC() net.HardwareAddr { return bytes.Clone(hostMAC) }

// podMAC derives the pod's MAC from its address: locally administered, the
// same whenever the address is used, different for different addresses.
func podMAC(a netip.Addr) net.HardwareAddr {
	b := a.As4()
	return net.HardwareAddr{0x02, 0x75, b[0], b[1], b[2], b[3]}
}

// podGateway is the router that a pod sees; it is at the other end of its veth
// and no device has the address.
var podGateway = netip.AddrFrom4([4]byte{169, 254, 1, 1})
