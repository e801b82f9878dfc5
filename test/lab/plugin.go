package lab

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// CNIError is what a plugin prints when it refuses.
type CNIError struct {
	Code uint
	Msg  string
}

func (e *CNIError) Error() string { return fmt.Sprintf("%d: %s", e.Code, e.Msg) }

// Plugin runs underlay-cni as a runtime would, with an environment of variables
// CNI_… as in "CNI_COMMAND=ADD", and returns what it printed. A refusal is a
// *CNIError; what is none fails the test.
func Plugin(t testing.TB, config string, env ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(filepath.Join(Bin, "underlay-cni"))
	cmd.Env = append(append(os.Environ(), "CNI_IFNAME=eth0", "CNI_PATH="+Bin), env...)
	cmd.Stdin = strings.NewReader(config)
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := cmd.Run(); err == nil {
		return out.String(), nil
	}
	var e CNIError
	if err := json.Unmarshal(out.Bytes(), &e); err != nil {
		t.Fatalf("%v: no CNI error on stdout: %v\n%s", env, err, out.String())
	}
	return out.String(), &e
}
