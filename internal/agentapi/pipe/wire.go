package pipe

import (
	"errors"
	"strings"
)

// Version is the version of a call.
const Version = 1

// MaxMessage bounds a message in either direction, in bytes, without the
// length in front of it: the environment, the network configuration, a result.
const MaxMessage = 1 << 20

// headerLen is the size of the length in front of a message, lead that of what
// stands before the environment.
const (
	headerLen = 4
	lead      = 2
)

// The plugin's exit statuses, which the answer begins with.
const (
	ExitOK     = 0 // stdout is a result
	ExitFailed = 1 // stdout is an error
)

// Call is one start of the plugin.
type Call struct {
	Env   []string // "CNI_COMMAND=ADD", …; nothing but what begins with CNI_
	Stdin []byte   // the network configuration
}

// Getenv returns a variable's value, "" when it is not set. Of several the
// first counts, as in getenv(3).
func (c *Call) Getenv(name string) string { return lookup(c.Env, name) }

func lookup(env []string, name string) string {
	for _, e := range env {
		if len(e) > len(name) && e[len(name)] == '=' && e[:len(name)] == name {
			return e[len(name)+1:]
		}
	}
	return ""
}

// IsCall tells a call from a message of another kind.
func IsCall(msg []byte) bool { return len(msg) > 0 && msg[0] == 0 }

var (
	errVersion = errors.New("the plugin speaks another version of the protocol")
	errCutOff  = errors.New("the call is cut off")
)

// Decode is the inverse of what a Caller sends.
func Decode(msg []byte) (*Call, error) {
	if len(msg) < lead || msg[0] != 0 {
		return nil, errCutOff
	}
	if msg[1] != Version {
		return nil, errVersion
	}
	var c Call
	rest := string(msg[lead:])
	for {
		e, after, ok := strings.Cut(rest, "\x00")
		if !ok {
			return nil, errCutOff
		}
		rest = after
		if e == "" {
			c.Stdin = []byte(rest)
			return &c, nil
		}
		c.Env = append(c.Env, e)
	}
}

// AppendCall appends the message of a call.
func AppendCall(b []byte, c *Call) []byte {
	b = append(b, 0, Version)
	for _, e := range c.Env {
		b = append(append(b, e...), 0)
	}
	return append(append(b, 0), c.Stdin...)
}

// AppendAnswer appends the message of an answer.
func AppendAnswer(b []byte, exit byte, stdout []byte) []byte {
	return append(append(b, exit), stdout...)
}
