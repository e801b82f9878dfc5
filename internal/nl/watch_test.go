package nl

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What a pod's ADD makes does not wake who watches for damage.
func TestWatcherSleepsThroughWhatIsMade(t *testing.T) {
	_, files, conns := namespaces(t)
	w, err := WatchIn(files[0])
	if err != nil {
		t.Fatal(err)
	}
	defer w.file.Close()
	rule := Rule{Priority: 31000, Table: 31000, Protocol: 117}
	var b Batch
	b.ClsactSet(1)
	b.RuleAdd(rule)
	b.RuleDelete(rule)
	if err := conns[0].Exec(&b); err != nil {
		t.Fatal(err)
	}
	if err := w.file.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4096)
	n, err := w.file.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	var types []uint16
	if err := eachMessage(buf[:n], func(m message) error { types = append(types, m.typ); return nil }); err != nil {
		t.Fatal(err)
	}
	if len(types) != 1 || types[0] != unix.RTM_DELRULE {
		t.Errorf("heard messages of types %v first, want %d alone", types, unix.RTM_DELRULE)
	}
}
