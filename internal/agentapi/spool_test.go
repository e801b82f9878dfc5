package agentapi

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSpool(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "agent.sock")
	if err := DrainSpool(socket, func(Attachment) error { return errors.New("called") }); err != nil {
		t.Fatalf("without a spool: %v", err)
	}
	a, b := Attachment{ContainerID: "../a b", IfName: "eth0"}, Attachment{ContainerID: "b", IfName: "eth0"}
	for _, x := range []Attachment{a, b, a} { // a twice
		if err := Spool(socket, x); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(SpoolDir(socket), "junk"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	got := map[string]int{}
	err := DrainSpool(socket, func(x Attachment) error {
		got[x.ContainerID]++
		if x == b {
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
