package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/underlay-cni/underlay/internal/agentapi"
	"github.com/underlay-cni/underlay/internal/agentapi/pipe"
)

// Backend does what CNI asks for; it is the agent. An error that is no
// *agentapi.Error travels with agentapi.CodeInternal. A context ends when the
// plugin hangs up. The namespace file is nil when none came along.
type Backend interface {
	Add(ctx context.Context, a *agentapi.Attachment, timeout time.Duration, netns *os.File) (*agentapi.Result, error)
	Del(ctx context.Context, a *agentapi.Attachment) error
	Check(ctx context.Context, a *agentapi.Attachment, netns *os.File) error
	GC(ctx context.Context, valid []agentapi.Attachment) error
	Status(ctx context.Context) error
}

// Versions of the specification in which a configuration may be and a result
// is given. The plugin says the same by itself.
var Versions = version.PluginSupports("0.3.1", "0.4.0", "1.0.0", "1.1.0")

// verb is one CNI_COMMAND.
type verb struct {
	attachment bool   // it names a container and an interface
	netns      bool   // it must name a namespace
	since      string // version of the specification that has it
	do         func(*request) (types.Result, error)
}

var verbs = map[string]verb{
	"ADD":    {attachment: true, netns: true, since: "0.1.0", do: add},
	"DEL":    {attachment: true, since: "0.1.0", do: del},
	"CHECK":  {attachment: true, netns: true, since: "0.4.0", do: check},
	"GC":     {since: "1.1.0", do: gc},
	"STATUS": {since: "1.1.0", do: status},
}

// request is a call that was found well-formed.
type request struct {
	ctx     context.Context
	backend Backend
	call    *pipe.Call
	config  *config
	netns   *os.File // nil: none came
}

// Run carries out a call and returns the plugin's exit status and output.
func Run(ctx context.Context, b Backend, call *pipe.Call, netns *os.File) (exit byte, stdout []byte) {
	res, c, err := run(ctx, b, call, netns)
	var out bytes.Buffer
	if err == nil && res != nil {
		err = print(&out, res, c.CNIVersion)
	}
	if err == nil {
		return pipe.ExitOK, out.Bytes()
	}
	b2, err2 := json.MarshalIndent(asError(err), "", "    ")
	if err2 != nil { // a struct of a number and two strings
		panic(err2)
	}
	return pipe.ExitFailed, append(b2, '\n')
}

// print writes a result in the form of a version.
func print(out *bytes.Buffer, res types.Result, configured string) error {
	res, err := res.GetAsVersion(configured)
	if err != nil {
		return err
	}
	// The library has one type for all of 1.x and leaves in what 1.1 added.
	if old, err := version.GreaterThan("1.1.0", configured); err != nil {
		return err
	} else if r, is := res.(*current.Result); old && is {
		for _, i := range r.Interfaces {
			i.Mtu = 0
		}
	}
	return res.PrintTo(out)
}

func run(ctx context.Context, b Backend, call *pipe.Call, netns *os.File) (types.Result, *config, error) {
	command := call.Getenv("CNI_COMMAND")
	v, known := verbs[command]
	if err := checkEnv(call, v); err != nil {
		return nil, nil, err
	}
	if !known {
		return nil, nil, types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("unknown CNI_COMMAND: %s", command), "")
	}
	c, err := parseConfig(call.Stdin)
	if err != nil {
		return nil, nil, err
	}
	if err := checkVersion(c.CNIVersion, command, v); err != nil {
		return nil, nil, err
	}
	if netns != nil {
		if err := isNetns(netns); err != nil {
			return nil, nil, types.NewError(types.ErrInvalidNetNS, fmt.Sprintf("%s is no network namespace: %v; CNI_NETNS must name one", call.Getenv("CNI_NETNS"), err), "")
		}
	}
	res, err := v.do(&request{ctx: ctx, backend: b, call: call, config: c, netns: netns})
	return res, c, err
}

// checkEnv looks for what the command needs. All that is missing is said at
// once; a command that is not known needs nothing.
func checkEnv(call *pipe.Call, v verb) error {
	var missing []string
	for _, e := range []struct {
		name   string
		needed bool
		valid  func(string) *types.Error
	}{
		{"CNI_CONTAINERID", v.attachment, utils.ValidateContainerID},
		{"CNI_NETNS", v.netns, nil},
		{"CNI_IFNAME", v.attachment, utils.ValidateInterfaceName},
		{"CNI_PATH", v.do != nil, nil},
	} {
		value := call.Getenv(e.name)
		switch {
		case !e.needed:
		case value == "":
			missing = append(missing, e.name)
		case e.valid != nil:
			if err := e.valid(value); err != nil {
				return err
			}
		}
	}
	if len(missing) > 0 {
		return types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("required env variables [%s] missing", strings.Join(missing, ",")), "")
	}
	if id := call.Getenv("CNI_CONTAINERID"); v.attachment && len(id) > agentapi.MaxContainerID {
		return types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("the container ID is %d bytes long, at most %d are kept; use a shorter CNI_CONTAINERID", len(id), agentapi.MaxContainerID), "")
	}
	return nil
}

// checkVersion tells whether we speak the configuration's version, and that
// version has the command.
func checkVersion(configured, command string, v verb) error {
	if err := new(version.Reconciler).Check(configured, Versions); err != nil {
		return types.NewError(types.ErrIncompatibleCNIVersion, "incompatible CNI versions", err.Details())
	}
	if ok, err := version.GreaterThanOrEqualTo(configured, v.since); err != nil || !ok {
		return types.NewError(types.ErrIncompatibleCNIVersion, "config version does not allow "+command, "")
	}
	return nil
}

// asError puts an error in CNI's form. Those of the CNI library get the next
// step, which it does not know; ours have one, after a semicolon.
func asError(err error) *types.Error {
	var ours *agentapi.Error
	var e *types.Error
	switch {
	case errors.As(err, &ours):
		return types.NewError(uint(ours.Code), ours.Message, ours.Details)
	case !errors.As(err, &e):
		return types.NewError(uint(agentapi.CodeInternal), err.Error()+"; see the agent's log", "")
	}
	if strings.Contains(e.Msg, ";") {
		return e
	}
	switch e.Code {
	case types.ErrIncompatibleCNIVersion:
		e.Msg += "; set \"cniVersion\" in the network configuration to one from 0.3.1 to 1.1.0 (CHECK wants 0.4.0, GC and STATUS 1.1.0)"
	case types.ErrDecodingFailure, types.ErrInvalidNetworkConfig:
		e.Msg += "; correct the network configuration in the runtime's CNI directory"
	case types.ErrInvalidEnvironmentVariables, types.ErrUnknownContainer:
		e.Msg += "; this is a CNI plugin, to be run by a container runtime, which sets the CNI_ variables"
	}
	return e
}
