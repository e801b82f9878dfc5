package agentapi

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/underlay-cni/underlay/internal/agentapi/pipe"
)

func TestSpool(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "agent.sock")
	if err := DrainSpool(socket, func(Attachment) error { return errors.New("called") }); err != nil {
		t.Fatalf("without a spool: %v", err)
	}
	a, b := Attachment{ContainerID: "a.b", IfName: `e"0`}, Attachment{ContainerID: "b", IfName: "eth0"}
	for _, x := range []Attachment{a, b, a} { // a twice
		if err := pipe.Spool(socket, x.ContainerID, x.IfName); err != nil {
			t.Fatal(err)
		}
	}
	for _, id := range []string{"", "../x", ".hidden", "a/b"} {
		if err := pipe.Spool(socket, id, "eth0"); err == nil {
			t.Errorf("kept a release of container %q", id)
		}
	}
	if err := os.WriteFile(filepath.Join(pipe.SpoolDir(socket), "junk"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	got := map[string]int{}
	err := DrainSpool(socket, func(x Attachment) error {
		got[x.ContainerID]++
		if x.ContainerID == b.ContainerID {
			return errors.New("not now")
		}
		return nil
	})
	if err == nil {
		t.Error("neither the junk nor the refusal was reported")
	}
	if diff := cmp.Diff(map[string]int{a.ContainerID: 1, "b": 1}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	clear(got)
	if err := DrainSpool(socket, func(x Attachment) error { got[x.ContainerID]++; return nil }); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(map[string]int{"b": 1}, got); diff != "" {
		t.Errorf("the second time (-want +got):\n%s", diff)
	}
}
