// Package imds asks the instance metadata service who this node is and which
// addresses are live on its interfaces.
//
// Version 2 alone: a token is fetched first, and there is no falling back. A
// mapping shows up here after EC2 acknowledged it, sometimes seconds after;
// that is what the service is asked for. What it lacks proves nothing, EC2 is
// the truth.
//
// A Client is safe for concurrent use.
package imds
