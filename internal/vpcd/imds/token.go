package imds

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base32"
	"encoding/base64"
	"encoding/binary"
	"time"

	"github.com/underlay-cni/underlay/internal/vpc"
)

// KeySize is the size of the key that tokens are made with.
const KeySize = 32

// Bounds of a token's life in seconds (EC2 user guide, "Use IMDS").
const minTTL, maxTTL = 1, 21600

// A token is base64 of: 8 bytes time of expiry (Unix seconds, big endian), 32
// bytes HMAC-SHA256.
const tokenLen = 8 + sha256.Size

func mac(key []byte, purpose string, id vpc.InstanceID, data []byte) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(purpose))
	h.Write([]byte{0})
	h.Write([]byte(id))
	h.Write([]byte{0})
	h.Write(data)
	return h.Sum(nil)
}

// newToken makes a token of an instance.
func newToken(key []byte, id vpc.InstanceID, expires time.Time) string {
	b := binary.BigEndian.AppendUint64(make([]byte, 0, tokenLen), uint64(expires.Unix()))
	b = append(b, mac(key, "token", id, b)...)
	return base64.URLEncoding.EncodeToString(b)
}

// checkToken reports whether a token is of this instance and not yet expired.
func checkToken(key []byte, id vpc.InstanceID, token string, now time.Time) bool {
	b, err := base64.URLEncoding.Strict().DecodeString(token)
	if err != nil || len(b) != tokenLen {
		return false
	}
	return hmac.Equal(b[8:], mac(key, "token", id, b[:8])) &&
		now.Before(time.Unix(int64(binary.BigEndian.Uint64(b)), 0))
}

// credentialLife is how long the credentials of a role are good for.
const credentialLife = 6 * time.Hour

// credentials are those of the instance's role: stable for an hour at a time.
// They open nothing, as vpcd verifies no signatures.
func (s *Server) credentials(i *Instance) string {
	updated := s.now().UTC().Truncate(time.Hour)
	stamp := binary.BigEndian.AppendUint64(nil, uint64(updated.Unix()))
	id := mac(s.key, "access key id", i.ID, stamp)
	secret := mac(s.key, "secret access key", i.ID, stamp)
	session := mac(s.key, "session token", i.ID, stamp)
	return document(map[string]any{
		"Code": "Success", "Type": "AWS-HMAC",
		"LastUpdated": updated.Format(time.RFC3339), "Expiration": updated.Add(credentialLife).Format(time.RFC3339),
		"AccessKeyId":     "ASIA" + base32.StdEncoding.EncodeToString(id)[:16],
		"SecretAccessKey": base64.StdEncoding.EncodeToString(secret)[:40],
		"Token":           base64.StdEncoding.EncodeToString(session),
	})
}
