package query

import (
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// maxSkew is how far the time of a request may be from ours ("RequestExpired",
// EC2 API Reference, "Common client error codes").
const maxSkew = 15 * time.Minute

const (
	signedForm    = "20060102T150405Z"
	missingCreds  = "AWS was not able to authenticate the request: access credentials are missing"
	invalidCreds  = "AWS was not able to validate the provided access credentials"
	defaultRegion = "us-east-1"
)

// identify reads who calls: the credential scope of a Signature Version 4 in
// the Authorization header or (a presigned request) in the query, or the access
// key of a Version 2 signature. Signatures are not verified: vpcd knows no
// secret keys.
func identify(r *http.Request, form url.Values, now time.Time) (Identity, *Error) {
	var credential, when string
	expires := maxSkew
	switch auth := r.Header.Get("Authorization"); {
	case auth != "":
		algorithm, fields, _ := strings.Cut(auth, " ")
		if !strings.HasPrefix(algorithm, "AWS4-") {
			return Identity{}, Errorf("AuthFailure", "%s", invalidCreds)
		}
		for f := range strings.SplitSeq(fields, ",") {
			if v, ok := strings.CutPrefix(strings.TrimSpace(f), "Credential="); ok {
				credential = v
			}
		}
		when = r.Header.Get("X-Amz-Date")
	case form.Has("X-Amz-Credential"):
		credential, when = form.Get("X-Amz-Credential"), form.Get("X-Amz-Date")
		if s, err := strconv.Atoi(form.Get("X-Amz-Expires")); err == nil {
			expires = time.Duration(s) * time.Second
		}
	case form.Has("AWSAccessKeyId"):
		return Identity{AccessKey: form.Get("AWSAccessKeyId")}, nil
	default:
		return Identity{}, Errorf("AuthFailure", "%s", missingCreds)
	}
	if when != "" {
		t, err := time.Parse(signedForm, when)
		if err != nil {
			return Identity{}, Errorf("AuthFailure", "%s", invalidCreds)
		}
		if now.Sub(t) > max(expires, maxSkew) || t.Sub(now) > maxSkew {
			return Identity{}, Errorf("RequestExpired", "Request has expired.")
		}
	}
	// AKID/20260102/us-east-1/ec2/aws4_request; SigV4A has no region.
	scope := strings.Split(credential, "/")
	n := len(scope)
	if n < 4 || n > 5 || scope[n-1] != "aws4_request" || scope[0] == "" {
		return Identity{}, Errorf("AuthFailure", "%s", invalidCreds)
	}
	if scope[n-2] != "ec2" {
		return Identity{}, Errorf("SignatureDoesNotMatch", "Credential should be scoped to correct service: 'ec2'.")
	}
	id := Identity{AccessKey: scope[0]}
	if n == 5 {
		id.Region = scope[2]
	}
	return id, nil
}
