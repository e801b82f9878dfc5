package ec2

import (
	"context"
	"errors"
	"net"
	"strings"

	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/underlay-cni/underlay/internal/ipam"
)

// Outcome returns how a call ended, as the plan understands it. Unknown is
// everything after which the call may have happened: no answer, or one that
// says the server failed.
func Outcome(err error) (ipam.Outcome, ipam.Class) {
	if err == nil {
		return ipam.Done, ipam.ClassOther
	}
	if c := code(err); c != "" {
		class, known := classes[c]
		switch {
		case c == "InvalidParameterValue":
			class = classOfMessage(err)
		case !known && serverFault(err):
			class = ipam.ClassUnavailable
		}
		if class == ipam.ClassUnavailable {
			return ipam.Unknown, class
		}
		return ipam.Refused, class
	}
	var send *smithyhttp.RequestSendError
	var resp *smithyhttp.ResponseError
	switch {
	case errors.As(err, &send) || errors.As(err, &resp) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled):
		if neverSent(err) {
			return ipam.Refused, ipam.ClassUnavailable
		}
		return ipam.Unknown, ipam.ClassUnavailable
	case strings.Contains(err.Error(), "get identity") || strings.Contains(err.Error(), "credentials"):
		return ipam.Refused, ipam.ClassDenied // no credentials: the SDK did not send anything
	}
	return ipam.Unknown, ipam.ClassOther
}

// classes gives the meaning of EC2's codes; what is not here is ClassOther.
// Source: the API reference's list of client error codes, and field reports
// for those it leaves out.
var classes = map[string]ipam.Class{
	"RequestLimitExceeded":        ipam.ClassThrottled,
	"Throttling":                  ipam.ClassThrottled,
	"ThrottlingException":         ipam.ClassThrottled,
	"ResourceLimitExceeded":       ipam.ClassThrottled,
	"RequestThrottled":            ipam.ClassThrottled,
	"EC2ThrottledException":       ipam.ClassThrottled,
	"SlowDown":                    ipam.ClassThrottled,
	"UnauthorizedOperation":       ipam.ClassDenied,
	"AuthFailure":                 ipam.ClassDenied,
	"AccessDenied":                ipam.ClassDenied,
	"AccessDeniedException":       ipam.ClassDenied,
	"Blocked":                     ipam.ClassDenied,
	"OptInRequired":               ipam.ClassDenied,
	"ExpiredToken":                ipam.ClassDenied,
	"InvalidClientTokenId":        ipam.ClassDenied,
	"SignatureDoesNotMatch":       ipam.ClassDenied,
	"RequestExpired":              ipam.ClassDenied,
	"PendingVerification":         ipam.ClassDenied,
	"UnrecognizedClientException": ipam.ClassDenied,

	"InsufficientFreeAddressesInSubnet": ipam.ClassSubnetFull,
	"InsufficientAddressCapacity":       ipam.ClassSubnetFull,
	"InsufficientCidrBlocks":            ipam.ClassNoPrefix,

	"PrivateIpAddressLimitExceeded":           ipam.ClassENIFull,
	"InvalidGroup.NotFound":                   ipam.ClassGroups,
	"InvalidGroupId.Malformed":                ipam.ClassGroups,
	"InvalidSecurityGroupID.NotFound":         ipam.ClassGroups,
	"InvalidSecurityGroupId.NotFound":         ipam.ClassGroups,
	"SecurityGroupsPerInterfaceLimitExceeded": ipam.ClassGroups,

	"AttachmentLimitExceeded":           ipam.ClassSlots,
	"NetworkInterfaceLimitExceeded":     ipam.ClassAccountLimit,
	"NetworkInterfaceNotFoundException": ipam.ClassNotFound,

	"InvalidNetworkInterfaceID.NotFound": ipam.ClassNotFound,
	"InvalidNetworkInterfaceId.NotFound": ipam.ClassNotFound,
	"InvalidAttachmentID.NotFound":       ipam.ClassNotFound,
	"InvalidInstanceID.NotFound":         ipam.ClassNotFound,

	"InvalidNetworkInterface.InUse": ipam.ClassInUse,
	"InvalidInterface.InUse":        ipam.ClassInUse,
	"Resource.AlreadyAssigned":      ipam.ClassInUse,
	"Resource.AlreadyAssociated":    ipam.ClassInUse,
	"IncorrectState":                ipam.ClassInUse,
	"IncorrectInstanceState":        ipam.ClassInUse,

	"InternalError":      ipam.ClassUnavailable,
	"InternalFailure":    ipam.ClassUnavailable,
	"ServerInternal":     ipam.ClassUnavailable,
	"ServiceUnavailable": ipam.ClassUnavailable,
	"Unavailable":        ipam.ClassUnavailable,
	"RequestTimeout":     ipam.ClassUnavailable,
}

// classOfMessage tells apart what EC2 answers with the one code
// InvalidParameterValue. The texts are those seen in the field.
func classOfMessage(err error) ipam.Class {
	var api smithy.APIError
	errors.As(err, &api)
	msg := strings.ToLower(api.ErrorMessage())
	switch {
	case strings.Contains(msg, "sufficient free ipv4 addresses or prefixes"):
		return ipam.ClassNoPrefix
	case strings.Contains(msg, "currently in use"), strings.Contains(msg, "already has an interface attached at device index"), strings.Contains(msg, "already attached"):
		return ipam.ClassInUse
	}
	return ipam.ClassOther
}

// code returns EC2's error code, "" when EC2 did not answer with one.
func code(err error) string {
	var api smithy.APIError
	if errors.As(err, &api) {
		return api.ErrorCode()
	}
	return ""
}

// NewError returns an error as a Client does when EC2 answers with a code: for
// those who stand in for a Client in tests.
func NewError(code, message string) error {
	return &smithy.GenericAPIError{Code: code, Message: message}
}

func serverFault(err error) bool {
	var resp *smithyhttp.ResponseError
	return errors.As(err, &resp) && resp.HTTPStatusCode() >= 500
}

// neverSent reports whether the connection was never made.
func neverSent(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial"
}

func isNotFound(err error) bool  { return classes[code(err)] == ipam.ClassNotFound }
func isThrottled(err error) bool { return classes[code(err)] == ipam.ClassThrottled }
