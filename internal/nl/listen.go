package nl

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Ports of the kernel's own choice are within localPorts: of who listens on port 0,
// and of who connects. What is below is given to nobody by chance.
const (
	localPorts = "/proc/sys/net/ipv4/ip_local_port_range"
	firstApart = 20_000
	tries      = 100
)

// Listen listens for TCP on HOST:PORT. For port 0 it takes one that is free and that
// the kernel gives to nobody else, so that who listens on it finds it free when it
// is started anew. If there is none, the kernel chooses.
func Listen(address string) (net.Listener, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil || port != "0" {
		return net.Listen("tcp", address)
	}
	var end int // where those of the kernel's choice begin
	text, err := os.ReadFile(localPorts)
	if err == nil {
		_, err = fmt.Sscan(string(text), &end)
	}
	if err != nil || end <= firstApart {
		return net.Listen("tcp", address)
	}
	for range tries {
		l, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(firstApart+rand.IntN(end-firstApart))))
		if err == nil || !errors.Is(err, unix.EADDRINUSE) {
			return l, err
		}
	}
	return net.Listen("tcp", address)
}
