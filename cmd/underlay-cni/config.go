package main

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/underlay-cni/underlay/internal/agentapi"
)

// defaultSocket is where the agent listens when the configuration does not say.
const defaultSocket = "/run/underlay/agent.sock"

// config is the plugin's part of a network configuration.
type config struct {
	types.PluginConf
	Socket string `json:"socket"`
}

// parseConfig reads the configuration that the runtime wrote to stdin.
func parseConfig(stdin []byte) (*config, error) {
	var c config
	if err := json.Unmarshal(stdin, &c); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, fmt.Sprintf("decode the network configuration: %v; correct the file in the runtime's CNI directory", err), "")
	}
	if c.Socket == "" {
		c.Socket = defaultSocket
	}
	if !filepath.IsAbs(c.Socket) {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("socket %q is no absolute path; set \"socket\" to where underlay-agent listens", c.Socket), "")
	}
	return &c, nil
}

// podOf reads who the workload is from CNI_ARGS, "KEY=VALUE;KEY=VALUE":
// Kubernetes' K8S_POD_… or Nomad's NOMAD_…. Keys that are neither are left to
// others; a part without "=" is skipped.
func podOf(args string) agentapi.Pod {
	var pod, job agentapi.Pod
	for part := range strings.SplitSeq(args, ";") {
		key, value, _ := strings.Cut(part, "=")
		switch key {
		case "K8S_POD_NAMESPACE":
			pod.Namespace = value
		case "K8S_POD_NAME":
			pod.Name = value
		case "K8S_POD_UID":
			pod.UID = value
		case "NOMAD_NAMESPACE":
			job.Namespace = value
		case "NOMAD_GROUP_NAME":
			job.Name = strings.TrimPrefix(job.Name+"/"+value, "/")
		case "NOMAD_JOB_ID":
			job.Name = strings.TrimSuffix(value+"/"+job.Name, "/")
		case "NOMAD_ALLOC_ID":
			job.UID = value
		}
	}
	if pod.Name != "" {
		return pod
	}
	return job
}
