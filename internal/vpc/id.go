package vpc

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"strings"
)

// Identifiers as EC2 writes them: a prefix, then 17 hexadecimal digits (8 in
// what was made before 2016). They are opaque; only equality means something.
type (
	VPCID           string // vpc-0123456789abcdef0
	SubnetID        string // subnet-0123456789abcdef0
	ENIID           string // eni-0123456789abcdef0
	AttachmentID    string // eni-attach-0123456789abcdef0
	InstanceID      string // i-0123456789abcdef0
	SecurityGroupID string // sg-0123456789abcdef0
	RouteTableID    string // rtb-0123456789abcdef0
	NetworkACLID    string // acl-0123456789abcdef0
	GatewayID       string // igw-0123456789abcdef0
	EgressOnlyID    string // eigw-0123456789abcdef0
	NATGatewayID    string // nat-0123456789abcdef0
	AllocationID    string // eipalloc-0123456789abcdef0
	PeeringID       string // pcx-0123456789abcdef0
	PrefixListID    string // pl-0123456789abcdef0
)

// NewID returns prefix + "-" + 17 random hexadecimal digits.
func NewID(prefix string) string {
	var b [9]byte
	// crypto/rand.Read never returns an error since Go 1.24.
	_, _ = rand.Read(b[:])
	return prefix + "-" + hex.EncodeToString(b[:])[:17]
}

// CheckID reports why id is not an EC2 identifier with this prefix: nil, or an
// error that says what form was expected.
func CheckID(prefix, id string) error {
	digits, ok := strings.CutPrefix(id, prefix+"-")
	if ok && (len(digits) == 17 || len(digits) == 8) && strings.Trim(digits, "0123456789abcdef") == "" {
		return nil
	}
	return fmt.Errorf("%q is not of the form %s-0123456789abcdef0", id, prefix)
}
