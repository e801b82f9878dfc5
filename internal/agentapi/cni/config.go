package cni

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/utils"

	"github.com/underlay-cni/underlay/internal/agentapi"
)

// config is a network configuration. Of Underlay's own keys there is "socket",
// which the plugin has read already.
type config struct {
	types.PluginConf
}

// parseConfig reads the configuration that the runtime wrote to the plugin's
// stdin.
func parseConfig(stdin []byte) (*config, error) {
	var c config
	if err := json.Unmarshal(stdin, &c); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, fmt.Sprintf("decode the network configuration: %v; correct the file in the runtime's CNI directory", err), "")
	}
	if c.CNIVersion == "" {
		c.CNIVersion = "0.1.0" // what the specification takes an absent one for
	}
	if err := utils.ValidateNetworkName(c.Name); err != nil {
		return nil, err
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
