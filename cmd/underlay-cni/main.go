// Command underlay-cni is the CNI plugin: a pipe between the runtime and the
// node's agent. It hands on what it was started with and prints the answer; what
// CNI means is judged in the agent, by package agentapi/cni. Alone it says its
// versions, keeps a DEL for an agent that is down, and says that it is.
//
// It is started for every operation on every pod, so that its start is most of
// its work: see package pipe. The Go runtime's own part of that is made smaller
// by not asking the cgroup for its share of the CPUs (five files of /proc and
// /sys, one of them as long as the node has mounts) and by not naming its
// memory for /proc/self/maps.
//
//go:debug containermaxprocs=0
//go:debug updatemaxprocs=0
//go:debug decoratemappings=0
package main

import (
	"errors"
	"strconv"
	"syscall"

	"github.com/underlay-cni/underlay/internal/agentapi/pipe"
)

// defaultSocket is where the agent listens when the configuration does not say.
const defaultSocket = "/run/underlay/agent.sock"

// How long the plugin waits, in seconds. An ADD may have to wait for EC2;
// kubelet gives a sandbox four minutes, containerd and Nomad one and more. The
// agent's own deadline is below it, so that it is the agent who says what was
// missing.
const (
	longWait = 58 // ADD, GC
	wait     = 10
)

// about is what is said when no runtime has started the plugin.
const about = "underlay-cni: CNI plugin that gives a container an address of the VPC; it asks underlay-agent on the socket that its configuration names\n" +
	"CNI protocol versions supported: 0.3.1, 0.4.0, 1.0.0, 1.1.0\n"

// versions answers VERSION, with or without an agent.
const versions = `{"cniVersion":"1.1.0","supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0"]}` + "\n"

// CNI's error codes that the plugin answers with by itself (specification 1.1,
// section "Error"; agentapi has the agent's).
const (
	codeIO               = 5
	codeDecoding         = 6
	codeInvalidConfig    = 7
	codeInvalidNetns     = 8
	codeTryAgain         = 11
	codeNotAvailable     = 50
	codeAgentUnreachable = 100
	codeInternal         = 199
)

var call pipe.Caller

func main() {
	exit, out := run(syscall.Environ())
	for len(out) > 0 {
		n, err := syscall.Write(1, out)
		if err == syscall.EINTR {
			continue
		}
		if err != nil { // nobody is left to tell
			exit = pipe.ExitFailed
			break
		}
		out = out[n:]
	}
	syscall.Exit(int(exit))
}

// run does what the environment asks for and returns exit status and stdout.
func run(env []string) (exit byte, stdout []byte) {
	getenv := (&pipe.Call{Env: env}).Getenv
	command := getenv("CNI_COMMAND")
	switch command {
	case "":
		_, _ = syscall.Write(2, []byte(about))
		return pipe.ExitOK, nil
	case "VERSION":
		return pipe.ExitOK, []byte(versions)
	}
	if err := call.Take(env); err != nil {
		return failure(codeIO, "read the network configuration from stdin: "+err.Error()+"; the runtime must hand over less than a mebibyte", "")
	}
	socket, err := pipe.StringIn(call.Stdin(), "socket")
	if err != nil {
		return failure(codeDecoding, "decode the network configuration: "+err.Error()+"; correct the file in the runtime's CNI directory", "")
	}
	if socket == "" {
		socket = defaultSocket
	}
	if socket[0] != '/' {
		return failure(codeInvalidConfig, `socket "`+socket+`" is no absolute path; set "socket" to where underlay-agent listens`, "")
	}

	netns, seconds := -1, wait
	if command == "ADD" || command == "GC" {
		seconds = longWait
	}
	if path := getenv("CNI_NETNS"); path != "" && (command == "ADD" || command == "CHECK") {
		// The runtime's mounts need not be visible to the agent.
		if netns, err = syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0); err != nil {
			return failure(codeInvalidNetns, "open the network namespace "+path+": "+err.Error()+"; the runtime must make it before ADD", "")
		}
	}
	exit, stdout, err = call.Do(socket, netns, seconds)
	switch {
	case err == nil:
		return exit, stdout
	case errors.Is(err, pipe.ErrTimeout):
		return failure(codeTryAgain, "the agent on "+socket+" gave no answer in time; see its log", "")
	case !errors.Is(err, pipe.ErrUnreachable):
		return failure(codeInternal, err.Error()+"; install the underlay-cni that came with the agent on "+socket, "")
	case command == "DEL":
		// A runtime that cannot remove a container keeps it, and its node
		// cannot be drained. The agent takes the release up when it starts.
		if err := pipe.Spool(socket, getenv("CNI_CONTAINERID"), getenv("CNI_IFNAME")); err != nil {
			return failure(codeAgentUnreachable, "no agent answers on "+socket+", and the release cannot be kept for it: "+err.Error()+"; start underlay-agent", "")
		}
		return pipe.ExitOK, nil
	}
	code := codeAgentUnreachable
	if command == "STATUS" {
		code = codeNotAvailable
	}
	return failure(code, "no agent answers on "+socket+"; start underlay-agent on this node, or see why it ended in its log", err.Error())
}

// failure is an error in CNI's form.
func failure(code int, msg, details string) (exit byte, stdout []byte) {
	b := append([]byte("{\n    \"code\": "), strconv.Itoa(code)...)
	b = pipe.AppendQuoted(append(b, ",\n    \"msg\": "...), msg)
	if details != "" {
		b = pipe.AppendQuoted(append(b, ",\n    \"details\": "...), details)
	}
	return pipe.ExitFailed, append(b, "\n}\n"...)
}
