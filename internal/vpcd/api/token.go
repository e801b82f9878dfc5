package api

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"time"

	"github.com/underlay-cni/underlay/internal/vpcd/query"
	"github.com/underlay-cni/underlay/internal/vpcd/store"
)

const (
	maxTokenLength = 64
	tokenLifetime  = 24 * time.Hour
)

// once returns what an earlier request with the same client token made, or nil
// when there was none. params is the request without its token.
func once(tx *store.Tx, action string, token *string, params any) ([]string, error) {
	if token == nil || *token == "" {
		return nil, nil
	}
	if len(*token) > maxTokenLength {
		return nil, query.Errorf("InvalidParameterValue", "The client token is longer than %d characters", maxTokenLength)
	}
	for _, c := range *token {
		if c < ' ' || c > '~' {
			return nil, query.Errorf("InvalidParameterValue", "The client token has a character that is not printable ASCII")
		}
	}
	t := tx.Token(action + "/" + *token)
	if t == nil {
		return nil, nil
	}
	sum, err := digest(params)
	if err != nil {
		return nil, err
	}
	if sum != t.Params {
		return nil, query.Errorf("IdempotentParameterMismatch", "The client token '%s' was used before, with other parameters", *token)
	}
	return t.Results, nil
}

// remember keeps what a request with a client token made.
func remember(tx *store.Tx, action string, token *string, params any, now time.Time, results []string) error {
	if token == nil || *token == "" {
		return nil
	}
	sum, err := digest(params)
	if err != nil {
		return err
	}
	tx.PutToken(&store.Token{Key: action + "/" + *token, Params: sum, Results: results, Created: now})
	return nil
}

func digest(params any) (string, error) {
	b, err := json.Marshal(params)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]), nil
}
