// Package packet parses and builds the frames that Underlay looks at: Ethernet,
// ARP, IPv4, IPv6, TCP, UDP, ICMP, and the five-tuple that names a flow.
//
// Parse is strict about lengths and lenient about content: it reads what a
// capture holds, also when that is cut off or forged, and never panics (fuzzed).
// The builders fill in lengths and checksums. All values are plain data, safe to
// share once made. Multi-byte fields are in network byte order on the wire and
// in host order here.
package packet
