package cni

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/utils"

	"github.com/underlay-cni/underlay/internal/agentapi"
)

// config is a network configuration. Of Underlay's own keys there are "socket",
// which the plugin has read already, and those of ownKeys.
type config struct {
	types.PluginConf
	ownKeys
	Args struct {
		CNI ownKeys `json:"cni"`
	} `json:"args"`
	Runtime ownKeys `json:"runtimeConfig"`
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

// podOf reads who the workload is from CNI_ARGS, "KEY=VALUE;KEY=VALUE": Nomad's
// NOMAD_… or Kubernetes' K8S_POD_…, which podman and others set too. Keys that
// are neither are left to others, with or without IgnoreUnknown; a part without
// "=" is skipped. Nomad leaves out what has a semicolon, such as a job's ID.
//
// Nomad's count before Kubernetes': whoever writes a Nomad job chooses further
// keys ("cni { args { … } }" of its network block) and could call itself any
// pod, while nobody has a say in what kubelet hands over. NOMAD_REGION is that
// of the whole node and tells no workload from another.
func podOf(args string) agentapi.Pod {
	var pod, job agentapi.Pod
	var id, group string
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
		case "NOMAD_JOB_ID":
			id = value
		case "NOMAD_GROUP_NAME":
			group = value
		case "NOMAD_ALLOC_ID":
			job.UID = value
		}
	}
	if id != "" && group != "" {
		id += "/"
	}
	if job.Name = id + group; job.Name != "" || job.UID != "" {
		pod = job
	}
	return agentapi.Pod{
		Namespace: fit(pod.Namespace, agentapi.MaxPodNamespace),
		Name:      fit(pod.Name, agentapi.MaxPodName),
		UID:       fit(pod.UID, agentapi.MaxPodUID),
	}
}

// fit returns a name as it can be kept and shown: printable, and within limit
// bytes. One that is too long keeps its beginning and gets a hash of the whole,
// so that two which begin alike stay two. No pod stays down for its name.
func fit(name string, limit int) string {
	shown := strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return utf8.RuneError
		}
		return r
	}, name)
	if len(shown) <= limit {
		return shown
	}
	sum := sha256.Sum256([]byte(name))
	end := "~" + hex.EncodeToString(sum[:4])
	cut := limit - len(end)
	for !utf8.RuneStart(shown[cut]) {
		cut--
	}
	return shown[:cut] + end
}
