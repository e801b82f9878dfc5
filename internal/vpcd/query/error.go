package query

import (
	"encoding/xml"
	"fmt"
	"net/http"
	"strings"
)

// Error is an error of the EC2 API. Handlers return it (wrapped or not); any
// other error of theirs answers InternalError and is logged.
type Error struct {
	Code    string // "InvalidVpcID.NotFound"
	Message string
	Status  int // HTTP status
}

func (e *Error) Error() string { return e.Code + ": " + e.Message }

// Errorf makes an Error with the HTTP status that belongs to the code.
func Errorf(code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...), Status: StatusOf(code)}
}

// statuses of codes that are not 400 (EC2 API Reference, "Error codes": client
// codes are 400 unless they concern who calls, server codes are 5xx).
var statuses = map[string]int{
	"AuthFailure":                  http.StatusUnauthorized,
	"OptInRequired":                http.StatusUnauthorized,
	"UnauthorizedOperation":        http.StatusForbidden,
	"SignatureDoesNotMatch":        http.StatusForbidden,
	"Blocked":                      http.StatusForbidden,
	"DryRunOperation":              http.StatusPreconditionFailed,
	"InternalError":                http.StatusInternalServerError,
	"InternalFailure":              http.StatusInternalServerError,
	"ServerInternal":               http.StatusInternalServerError,
	"InsufficientAddressCapacity":  http.StatusInternalServerError,
	"InsufficientInstanceCapacity": http.StatusInternalServerError,
	"ServiceUnavailable":           http.StatusServiceUnavailable,
	"Unavailable":                  http.StatusServiceUnavailable,
	"RequestLimitExceeded":         http.StatusServiceUnavailable,
}

// StatusOf returns the HTTP status that answers an error code.
func StatusOf(code string) int {
	if s, ok := statuses[code]; ok {
		return s
	}
	return http.StatusBadRequest
}

// body is the XML that answers e.
func (e *Error) body(requestID string) []byte {
	var b strings.Builder
	b.WriteString(`<?xml version="1.0" encoding="UTF-8"?><Response><Errors><Error><Code>`)
	escape(&b, e.Code)
	b.WriteString(`</Code><Message>`)
	escape(&b, e.Message)
	b.WriteString(`</Message></Error></Errors><RequestID>`)
	escape(&b, requestID)
	b.WriteString(`</RequestID></Response>`)
	return []byte(b.String())
}

func escape(b *strings.Builder, s string) {
	// A strings.Builder never fails; what XML cannot hold becomes U+FFFD.
	_ = xml.EscapeText(b, []byte(s))
}
